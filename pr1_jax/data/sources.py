"""Random-access sources of problems and traces, as records of text.

Made by code (`embedded`), or read from local files, tensorflow-datasets or the Hugging
Face hub. JSON lines and parquet are held in memory, the others are read as they are
asked for. Packages that only one of them needs are imported there.
"""

import fnmatch
import functools
import glob
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import logging

from pr1_jax.data import tasks

_SUFFIX = re.compile(r"\.(jsonl|parquet|array_record)(-\d+-of-\d+)?$")

_FIELDS = ("question", "answer", "response")
_FILTER = re.compile(r"(?P<data>.*)#(?P<column>[\w.]+)=(?P<value>[^#]*)")
_TFDS_NAME = re.compile(r"\w+(/[\w.-]+)?(:[0-9*]+(\.[0-9*]+){2})?")
_MISSING = object()
_BENCHMARK = re.compile(r"(?:([\w.-]+)=)?(.*?)(?:@([0-9]{1,6}))?", re.DOTALL)
_EMBEDDED = "embedded:"

Source = Sequence[dict[str, str]]  # or any other random-access source of such records


class Benchmark(NamedTuple):
    """Held-out problems, and how many responses each of them gets."""

    source: str
    samples: int


def benchmarks(given: str, samples: int) -> dict[str, Benchmark]:
    """Reads `data.eval`: a source, or several as `NAME=SOURCE@SAMPLES,…`.

        >>> benchmarks("mine=/data/mine.jsonl@4,gsm8k=tfds:gsm8k", samples=1)
        {'mine': Benchmark(source='/data/mine.jsonl', samples=4),
         'gsm8k': Benchmark(source='tfds:gsm8k', samples=1)}

    Args:
      samples: where none are said. A source without a name gets its last part as one.

    Raises:
      ValueError: two of them have one name, or one has no source or no samples.
    """
    found: dict[str, Benchmark] = {}
    for part in re.split(r",\s*(?=[\w.-]+=)", given):
        name, source, number = _BENCHMARK.fullmatch(part.strip()).groups()
        path = re.split("[#@]", source)[0].rstrip("/")
        last = re.split("[:/]", path)[-1].partition(".")[0]
        name = name or re.sub(r"[^\w-]", "_", last) or "eval"
        if not source or number and not int(number):
            raise ValueError(f"data.eval={part}: expected NAME=SOURCE@SAMPLES,…")
        if name in found:
            raise ValueError(f"data.eval={given}: two benchmarks are named {name!r}")
        found[name] = Benchmark(source, int(number or samples))
    return found


def is_made_by_code(name: str) -> bool:
    """Whether a source is drawn record by record, so that nothing is to be shuffled."""
    return name.startswith(_EMBEDDED)


def open_source(
    name: str,
    split: str,
    *,
    seed: int,
    columns: Mapping[str, str] | None = None,
    traces: bool = False,
    task: str = "search",
) -> Source:
    """Opens a random-access source of records: `question`, `answer`, `response`.

    Args:
      name: `embedded:easy`, `embedded:hard` of a task made by code; a local .jsonl, .parquet or .array_record
        file (of JSON objects), or a folder or glob of them; `tfds:NAME`, prepared
        before; `hf:OWNER/NAME`, with `/FOLDER` or `/FILE` where it holds several.
        Of the latter two `@SPLIT` behind it takes another split.
        With `#COLUMN=VALUE` behind it, only the records that have this value.
      split: `train` or `eval`, of embedded, tfds and hub data (there, `test`). A local
        file is the split; of a folder all files are read, so name those of one split
        by a glob.
      seed: of data made by code.
      columns: where a field has another name: `{"question": "problem"}`; of several,
        `"problem,prompt"`, the first that a record has; `"reward_model.ground_truth"`
        is one inside another. A question may be a list of chat messages: the record
        then also has `messages`, their JSON, and as `question` the user's words.
      traces: whether records have a cold-start `response`; their `answer` may then be
        lacking, and is "".
      task: made by code, with its options, as `tasks.make` reads it.

    Raises:
      ValueError: one line that names what is wrong, and where.
      FileNotFoundError: no such file, or data that has to be prepared before.
    """
    if is_made_by_code(name):
        family = name.removeprefix(_EMBEDDED)
        return tasks.make(task).records(family, split, seed=seed, traces=traces)
    given = {field: names for field, names in (columns or {}).items() if names}
    if unknown := sorted(set(given) - set(_FIELDS)):
        raise ValueError(f"data.columns has {unknown}, expected some of {_FIELDS}")
    required = ("question", "response" if traces else "answer")
    read = functools.partial(
        _read_record,
        columns={
            field: tuple(given.get(field, field).split(","))
            for field in dict.fromkeys(("question", "answer", *required))
        },
        required=required,
    )
    if chosen := _FILTER.fullmatch(name):
        rows = [
            (row, where)
            for row, where in _open_rows(chosen["data"], split)
            if _text(_lookup(row, chosen["column"])) == chosen["value"]
        ]
    else:
        rows = _open_rows(name, split)
    if not isinstance(rows, list):
        return _LazySource(rows, read)
    if not rows:
        raise ValueError(f"{name} holds no records")
    return [read(row, where) for row, where in rows]


def _open_rows(name: str, split: str) -> "list[tuple[dict[str, Any], str]] | _LazyRows":
    """Rows, each with the place that it comes from."""
    kind, _, rest = name.partition(":")
    if kind in ("tfds", "hf"):
        rest, _, chosen = rest.partition("@")
        split = chosen or {"eval": "test"}.get(split, split)
    if kind == "tfds":
        return _LazyRows(_open_tfds(rest, split), name)
    files = _hub_files(rest, split) if kind == "hf" else _local_files(name)
    arrays = [file for file in files if _SUFFIX.search(file)[1] == "array_record"]
    if len(arrays) == len(files):
        return _LazyRows(_open_array_records(arrays, name), name)
    if arrays:
        raise ValueError(f"{name} holds array_record files and others: name one kind")
    readers = {"jsonl": _read_jsonl, "parquet": _read_parquet}
    return [row for file in files for row in readers[_SUFFIX.search(file)[1]](file)]


class _LazyRows:
    """Rows of array_record files, read when they are asked for."""

    def __init__(self, rows: Any, name: str):
        self._rows, self._name = rows, name
        if not len(rows):
            raise ValueError(f"{name} holds no records")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Mapping[str, Any], str]:
        if not 0 <= index < len(self):
            raise IndexError(index)  # which ends an iteration
        where = f"{self._name} record {index}"
        try:
            row = self._rows[index]
        except (RuntimeError, ValueError, OSError) as error:
            raise ValueError(f"cannot read {where}: {_first_line(error)}") from error
        return (_parse_json(row, where) if isinstance(row, bytes) else row), where


class _LazySource:
    """Reads a record when it is asked for; the first one at once, to check it."""

    def __init__(self, rows: _LazyRows, read: Callable[..., dict[str, str]]):
        self._rows, self._read = rows, read
        self[0]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, str]:
        return self._read(*self._rows[index])


def _read_record(
    row: Mapping[str, Any],
    where: str,
    *,
    columns: Mapping[str, Sequence[str]],
    required: Sequence[str],
) -> dict[str, str]:
    """The text of the first of the named columns; the answer without its working."""
    record = {}
    for field, names in columns.items():
        held = [name for name in names if _lookup(row, name) is not _MISSING]
        if not held and field not in required:
            record[field] = ""
            continue
        if not held:
            wanted = " or ".join(map(repr, names))
            raise ValueError(
                f"{where} has no column {wanted} for {field!r} (data.columns), "
                f"it has {_clipped(sorted(row))}"
            )
        value = _lookup(row, held[0])
        if field == "question" and (messages := _messages(value)):
            record["messages"] = json.dumps(messages, ensure_ascii=False)
            said = [m["content"] for m in messages if m["role"] == "user"]
            value = "\n\n".join(said)
        record[field] = _text(value)
        if record[field] is None:
            kind = type(value).__name__
            raise ValueError(f"{where}: {held[0]!r} is {kind}, expected text")
    for field, text in record.items():
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON may spell one: "\\ud83d"
            character = ascii(text[error.start])
            raise ValueError(
                f"{where}: the {field} holds {character}, half a character: "
                "save the data as UTF-8 anew"
            ) from error
    _, mark, final = record["answer"].rpartition("####")  # GSM8K
    if mark:
        record["answer"] = final.strip().replace(",", "")
    return record


def _lookup(row: Mapping[str, Any], name: str) -> Any:
    """The value of a column, or of one inside another: `outer.inner`."""
    if name in row:
        return row[name]
    outer, dot, inner = name.partition(".")
    inside = row.get(outer)
    return _lookup(inside, inner) if dot and isinstance(inside, Mapping) else _MISSING


def _text(value: Any) -> str | None:
    match value:
        case str(text):
            return text
        case bytes(text):
            return text.decode("utf-8", "surrogateescape")  # refused by the caller
        case int() | float() | np.number() as number:
            return str(number)
        case [str(text)]:  # verl's ground truths
            return text
        case _:
            return None


def _messages(value: Any) -> list[dict[str, str]]:
    """Chat messages, or none if the value is something else."""
    listed = list(value) if isinstance(value, list | tuple | np.ndarray) else []
    is_message = lambda m: (
        isinstance(m, Mapping)
        and all(isinstance(m.get(key), str) for key in ("role", "content"))
    )
    if not all(map(is_message, listed)):
        return []
    return [{k: v for k, v in m.items() if isinstance(v, str)} for m in listed]


def _parse_json(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON: {_first_line(error)}") from error
    match row:
        case dict():
            return row
        case _:
            raise ValueError(f"{where}: not a JSON object")


def _read_jsonl(file: str) -> Iterator[tuple[dict[str, Any], str]]:
    with open(file, "rb") as lines:  # bytes: U+2028 within a text ends no line
        for number, line in enumerate(lines, 1):
            if line.strip():
                where = f"{file}:{number}"
                yield _parse_json(line, where), where


def _read_parquet(file: str) -> Iterator[tuple[dict[str, Any], str]]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"to read {file} the package pyarrow is needed") from error
    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches():
            for row in batch.to_pylist():
                yield row, file
    except PermissionError:
        raise
    except Exception as error:  # damaged files raise many kinds
        text = f"cannot read {file}, copy or make it anew: {_first_line(error)}"
        raise ValueError(text) from error


def _open_array_records(files: Sequence[str], name: str) -> Sequence[bytes]:
    try:
        return grain.sources.ArrayRecordDataSource(files)
    except (RuntimeError, ValueError, OSError) as error:
        text = f"cannot read {name}, copy or make it anew: {_first_line(error)}"
        raise ValueError(text) from error


def _local_files(name: str) -> list[str]:
    path = os.path.expanduser(name)
    found = [path] if os.path.exists(path) else glob.glob(path)
    if os.path.isdir(path):
        found = [os.path.join(path, file) for file in os.listdir(path)]
    elif not found:
        raise FileNotFoundError(f"no data at {name!r}: no such file or folder")
    return _readable([file for file in found if os.path.isfile(file)], name)


def _readable(files: Sequence[str], name: str) -> list[str]:
    files = sorted(file for file in files if _SUFFIX.search(file))
    if not files:
        raise ValueError(f"{name} has no .jsonl, .parquet or .array_record file")
    return files


def _open_tfds(name: str, split: str) -> Sequence[dict[str, Any]]:
    """A prepared dataset of tensorflow-datasets; nothing is downloaded."""
    if not _TFDS_NAME.fullmatch(name):  # others stand for code and data elsewhere
        raise ValueError(
            f"tfds:{name} is not tfds:NAME, tfds:NAME/CONFIG or tfds:NAME:1.0.0; "
            "data of the Hugging Face hub are hf:OWNER/NAME"
        )
    import tensorflow_datasets as tfds

    command = (
        'python -c "import tensorflow_datasets as tfds; tfds.text; '
        f"tfds.builder('{name}', file_format='array_record').download_and_prepare()\""
    )
    try:
        builder = tfds.builder(name, file_format="array_record")
        prepared = builder.is_prepared()
    except tfds.core.registered.DatasetNotFoundError:
        prepared = False
    except ValueError as error:
        raise ValueError(f"cannot open tfds:{name}: {_first_line(error)}") from error
    if not prepared:
        raise FileNotFoundError(
            f"tfds:{name} is not prepared as array_record: {command}"
        )
    try:
        return builder.as_data_source(split=split)
    except (ValueError, NotImplementedError) as error:
        raise ValueError(f"cannot open tfds:{name}: {_first_line(error)}") from error


def _hub_files(name: str, split: str) -> list[str]:
    """Downloads the files of a hub dataset that the split or the name points at."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise ValueError(f"hf:{name} needs the package huggingface_hub") from error
    owner, _, rest = name.partition("/")
    repo, _, inside = rest.partition("/")
    if _SUFFIX.search(inside):
        wanted = [inside]
    else:
        folder = inside.strip("/") + "/" if inside else ""
        wanted = [f"{folder}*{split}*.{kind}" for kind in ("parquet", "jsonl")]
    logging.info(
        "loading %s of %s from the Hugging Face hub", wanted, f"{owner}/{repo}"
    )
    try:
        folder = huggingface_hub.snapshot_download(
            f"{owner}/{repo}", repo_type="dataset", allow_patterns=wanted
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load hf:{name}: {_first_line(error)}") from error
    found = [path for path in Path(folder).rglob("*") if path.is_file()]
    names = [path.relative_to(folder).as_posix() for path in found]
    # Earlier downloads of other parts may lie in the same folder.
    names = [n for n in names if any(fnmatch.fnmatch(n, w) for w in wanted)]
    files = _readable(names, f"hf:{name} (split {split!r})")
    parts = sorted({os.path.dirname(file) for file in files})
    if len(parts) > 1:
        raise ValueError(f"hf:{name} holds several datasets, name one: {parts}")
    return [os.path.join(folder, file) for file in files]


def _first_line(error: BaseException) -> str:
    return _clipped((str(error).strip() or type(error).__name__).splitlines()[0])


def _clipped(found: object) -> str:
    text = str(found)
    return text if len(text) <= 500 else f"{text[:500]}…"
