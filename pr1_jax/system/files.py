"""Files that are whole or not there, JSON, and JSON lines."""

import errno
import json
import math
import os
import pathlib
import tempfile
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

_CANNOT_WRITE = (errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EFBIG, errno.EACCES)


class DamagedFileError(ValueError):
    """A file that is ours does not hold what was written; another start meets it again."""


def replace_file(
    path: str | os.PathLike[str], data: bytes, *, durable: bool = False
) -> None:
    """Writes `data` to `path` so that a reader sees the old or the new file.

    Args:
      durable: waits for the disk, so that this holds after a power cut, too.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    os.replace(temporary, path)


def cache_folder() -> pathlib.Path:
    """The package's folder in the user's cache, made; else a temporary one."""
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    folder = pathlib.Path(cache) / "pr1_jax"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return pathlib.Path(tempfile.mkdtemp(prefix="pr1_jax-"))


def write_error(error: BaseException) -> str | None:
    """Why something could not be written, if that is what an error says.

    Looks at the errors that led to it, too: libraries wrap what the system said.
    """
    while error is not None:
        for code in _CANNOT_WRITE:
            known = isinstance(error, OSError) and error.errno == code
            if known or os.strerror(code) in str(error):
                return os.strerror(code)
        error = error.__cause__ or error.__context__
    return None


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes `value` as indented JSON, atomically; NaN and infinities as null."""
    replace_file(path, json_text(value).encode(), durable=True)


def json_text(value: Any) -> str:
    """`value` as indented JSON, with a line break at its end."""
    text = json.dumps(plain(value), indent=2, allow_nan=False, ensure_ascii=False)
    return text + "\n"


def read_json(path: str | os.PathLike[str], default: Any) -> Any:
    """The JSON value in a file, or `default` where there is no file.

    Raises:
      DamagedFileError: the file is not JSON, as where it was not written whole, or is
        of another type than the default; names it.
    """
    path = pathlib.Path(path)
    if not path.exists():
        return default
    way_out = "put a copy of it back, or delete it"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path} is not JSON: {error}; {way_out}") from error
    if default is not None and not isinstance(value, type(default)):
        kinds = type(value).__name__, type(default).__name__
        raise DamagedFileError(
            "{} holds a {}, not a {}; {}".format(path, *kinds, way_out)
        )
    return value


def read_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object in a file that a stranger may have written.

    Raises:
      FileNotFoundError: there is no such file. ValueError: it holds something else.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    return parse_object(path, path.read_bytes())


def parse_object(path: str | os.PathLike[str], data: bytes) -> dict[str, Any]:
    """The JSON object that a file holds; ValueError names the file if it is none."""
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} does not hold a JSON object: {error}") from error
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise ValueError(f"{path} does not hold a JSON object: {kind}")  # noqa: TRY004
    return value


def json_line(record: Mapping[str, Any]) -> bytes:
    """One record as a line of JSON, tags legible; half a surrogate pair stays as it is.

    Raises:
      ValueError: a number is NaN or infinite.
    """
    text = json.dumps(record, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode("utf-8", "surrogatepass")


def write_json_lines(
    path: str | os.PathLike[str], records: Iterable[Mapping[str, Any]]
) -> None:
    """Writes records as JSON lines, atomically."""
    replace_file(path, b"".join(map(json_line, records)))


def read_json_lines(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads JSON lines, without a half-written last one; no file is no lines.

    Raises:
      DamagedFileError: a line is not a JSON object; names the file and the line.
    """
    path = pathlib.Path(path)
    if not path.exists():
        return []
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    records = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            records.append(json.loads(line))
            wrong = "" if isinstance(records[-1], dict) else "not an object"
        except (ValueError, RecursionError):
            wrong = "not JSON"
        if wrong:
            raise DamagedFileError(
                f"{path}, line {number}: {wrong}: {line[:80]!r}; put a copy of the file "
                "back, or take the line out"
            )
    return records


def plain(value: Any) -> Any:
    """Turns mappings, sequences, paths and arrays into what JSON can hold."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return plain(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, os.PathLike) else value


def write_json_by_key(path: str | os.PathLike[str], value: Mapping[str, Any]) -> None:
    """Writes an object as compact JSON, a line a key, atomically."""
    options = {"separators": (",", ":"), "allow_nan": False, "ensure_ascii": False}
    lines = [
        f"{json.dumps(name, ensure_ascii=False)}:{json.dumps(item, **options)}"
        for name, item in plain(value).items()
    ]
    replace_file(path, ("{\n" + ",\n".join(lines) + "\n}\n").encode())
