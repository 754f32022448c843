"""Rows of data files: JSON lines, parquet, array_record, tensorflow-datasets, the hub.

JSON lines and parquet are held in memory, the others are read when they are asked for.
A package that only one of them needs is imported there. Each row comes with a text that
says where it stands, for messages: `data.jsonl:7`, a line, or `data.parquet row 7`;
both count from 1. A line that is not JSON is a row as well, a `Dropped` that says so.
"""

import fnmatch
import glob
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
from absl import logging

_SUFFIX = re.compile(r"\.(jsonl|parquet|array_record)(-\d+-of-\d+)?$")
# Kinds of files that data often come in and that are not read, with code for their rows.
_OTHERS = {"json": "json.load", "csv": "csv.DictReader"}
_TFDS_NAME = re.compile(r"\w+(/[\w.-]+)?(:[0-9*]+(\.[0-9*]+){2})?")

# Why no record is made of a row.
UNREADABLE = "unreadable"


class Dropped(ValueError):
    """Why a row, or the record made of it, cannot be used; its text names the place.

    Attributes:
      reason: a name to count it under (`streams.REASONS`).
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


Row = tuple[Mapping[str, Any] | Dropped, str]


def open_rows(name: str, split: str) -> "list[Row] | LazyRows":
    """Rows of a local file, folder or glob, of `tfds:NAME` or of `hf:OWNER/NAME`.

    Raises:
      ValueError, FileNotFoundError: one line that names what is wrong.
    """
    kind, _, rest = name.partition(":")
    if kind in ("tfds", "hf"):
        rest, _, chosen = rest.partition("@")
        split = chosen or {"eval": "test"}.get(split, split)
    if kind == "tfds":
        return LazyRows(_open_tfds(rest, split), name)
    files = _hub_files(rest, split) if kind == "hf" else _local_files(name)
    arrays = [file for file in files if _SUFFIX.search(file)[1] == "array_record"]
    if len(arrays) == len(files):
        return LazyRows(_open_array_records(arrays, name), name)
    if arrays:
        raise ValueError(f"{name} holds array_record files and others: name one kind")
    readers = {"jsonl": _read_jsonl, "parquet": _read_parquet}
    return [row for file in files for row in readers[_SUFFIX.search(file)[1]](file)]


class LazyRows:
    """Rows of array_record files, read when they are asked for."""

    def __init__(self, rows: Any, name: str):
        self._rows, self._name = rows, name
        if not len(rows):
            raise ValueError(f"{name} holds no records")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(index)  # which ends an iteration
        where = _place(self._name, index)
        try:
            row = self._rows[index]
        except (RuntimeError, ValueError, OSError) as error:
            raise ValueError(f"cannot read {where}: {first_line(error)}") from error
        return (_parse_json(row, where) if isinstance(row, bytes) else row), where


def _place(name: str, index: int) -> str:
    return f"{name} row {index + 1} (counted from 1)"


def _parse_json(line: bytes, where: str) -> dict[str, Any] | Dropped:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Dropped(UNREADABLE, f"{where}: not JSON: {first_line(error)}")
    match row:
        case dict():
            return row
        case _:
            return Dropped(UNREADABLE, f"{where}: not a JSON object")


def _read_jsonl(file: str) -> Iterator[Row]:
    is_first = True
    with open(file, "rb") as lines:  # bytes: U+2028 within a text ends no line
        for number, line in enumerate(lines, 1):
            if line.strip():
                where = f"{file}:{number}"
                row = _parse_json(line, where)
                if is_first and isinstance(row, Dropped):
                    _check_one_a_line(file)
                is_first = False
                yield row, where


def _check_one_a_line(file: str) -> None:
    """Raises ValueError if a file is an array, or begins with an object of many lines."""
    with open(file, encoding="utf-8-sig", errors="replace") as text:
        whole = text.read().strip()
    try:
        value, end = json.JSONDecoder().raw_decode(whole)
    except (ValueError, RecursionError):
        return
    if isinstance(value, list) and end == len(whole):
        raise ValueError(f"{file} is a JSON array, {_expected(file, 'json')}")
    if isinstance(value, dict) and "\n" in whole[:end]:
        raise ValueError(
            f"{file} has a JSON object over several lines, expected one object a line"
        )


def _expected(file: str, kind: str) -> str:
    """What is read instead of a file of another kind, and how it is made."""
    rows = f"{_OTHERS[kind]}(open({file!r}, newline=''))"
    command = f"import csv, json; [print(json.dumps(row)) for row in {rows}]"
    return f'expected one JSON object a line: python -c "{command}" > NEW.jsonl'


def _read_parquet(file: str) -> Iterator[Row]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"to read {file} the package pyarrow is needed") from error
    try:
        batches = pyarrow.parquet.ParquetFile(file).iter_batches()
        rows = (row for batch in batches for row in batch.to_pylist())
        for index, row in enumerate(rows):
            yield row, _place(file, index)
    except PermissionError:
        raise
    except Exception as error:  # damaged files raise many kinds
        text = f"cannot read {file}, copy or make it anew: {first_line(error)}"
        raise ValueError(text) from error


def _open_array_records(files: Sequence[str], name: str) -> Sequence[bytes]:
    try:
        return grain.sources.ArrayRecordDataSource(files)
    except (RuntimeError, ValueError, OSError) as error:
        text = f"cannot read {name}, copy or make it anew: {first_line(error)}"
        raise ValueError(text) from error


def _local_files(name: str) -> list[str]:
    path = os.path.expanduser(name)
    files = [path] if os.path.exists(path) else glob.glob(path)
    if os.path.isdir(path):
        files = [os.path.join(path, file) for file in os.listdir(path)]
    elif not files:
        raise FileNotFoundError(f"no data at {name!r}: no such file or folder")
    return _readable([file for file in files if os.path.isfile(file)], name)


def _readable(files: Sequence[str], name: str) -> list[str]:
    readable = sorted(file for file in files if _SUFFIX.search(file))
    if readable:
        return readable
    for file in sorted(files):
        kind = file.rpartition(".")[2]
        first = next(_read_jsonl(file), (None,))[0] if kind == "json" else None
        is_lines = isinstance(first, dict)
        if is_lines:
            raise ValueError(f"{file} has one JSON object a line: name it .jsonl")
        if kind in _OTHERS:
            raise ValueError(f"{file} is a .{kind} file, {_expected(file, kind)}")
    raise ValueError(f"{name} has no .jsonl, .parquet or .array_record file")


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
        raise ValueError(f"cannot open tfds:{name}: {first_line(error)}") from error
    if not prepared:
        raise FileNotFoundError(
            f"tfds:{name} is not prepared as array_record: {command}"
        )
    try:
        return builder.as_data_source(split=split)
    except (ValueError, NotImplementedError) as error:
        raise ValueError(f"cannot open tfds:{name}: {first_line(error)}") from error


def _hub_files(name: str, split: str) -> list[str]:
    """Downloads the files of a hub dataset that the split or the name points at."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise ValueError(f"hf:{name} needs the package huggingface_hub") from error
    owner, _, rest = name.partition("/")
    repo, _, inside = rest.partition("/")
    if (kind := inside.rpartition(".")[2]) in _OTHERS:
        file = os.path.basename(inside)
        raise ValueError(f"hf:{name} is a .{kind} file, {_expected(file, kind)}")
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
        raise ValueError(f"cannot load hf:{name}: {first_line(error)}") from error
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    names = [path.relative_to(folder).as_posix() for path in paths]
    # Earlier downloads of other parts may lie in the same folder.
    names = [n for n in names if any(fnmatch.fnmatch(n, w) for w in wanted)]
    files = _readable(names, f"hf:{name} (split {split!r})")
    parts = sorted({os.path.dirname(file) for file in files})
    if len(parts) > 1:
        raise ValueError(f"hf:{name} holds several datasets, name one: {parts}")
    return [os.path.join(folder, file) for file in files]


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its kind where it says nothing."""
    return clipped((str(error).strip() or type(error).__name__).splitlines()[0])


def clipped(value: object) -> str:
    """At most 500 characters of a value as text."""
    text = str(value)
    return text if len(text) <= 500 else f"{text[:500]}…"
