"""Records of text by random access: problems and traces, whatever they are read from.

A source is made by code (`embedded:…`), or its rows are read from files, tensorflow-datasets
or the Hugging Face hub (`rows`), and the columns named in the config make the record.
"""

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pr1_jax.data import tasks
from pr1_jax.data.rows import LazyRows, clipped, open_rows

_FIELDS = ("question", "answer", "response")
_FILTER = re.compile(r"(?P<data>.*)#(?P<column>[\w.]+)=(?P<value>[^#]*)")
_MISSING = object()
_BENCHMARK = re.compile(r"(?:([\w.-]+)=)?(.*?)(?:@([0-9]{1,6}))?", re.DOTALL)
_EMBEDDED = "embedded:"

Record = dict[str, str]
Source = Sequence[Record]  # or anything else with a length and items


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
    named: dict[str, Benchmark] = {}
    for part in re.split(r",\s*(?=[\w.-]+=)", given):
        name, source, number = _BENCHMARK.fullmatch(part.strip()).groups()
        path = re.split("[#@]", source)[0].rstrip("/")
        last = re.split("[:/]", path)[-1].partition(".")[0]
        name = name or re.sub(r"[^\w-]", "_", last) or "eval"
        if not source or number and not int(number):
            raise ValueError(f"data.eval={part}: expected NAME=SOURCE@SAMPLES,…")
        if name in named:
            raise ValueError(f"data.eval={given}: two benchmarks are named {name!r}")
        named[name] = Benchmark(source, int(number or samples))
    return named


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
        held = lambda row: _text(_lookup(row, chosen["column"])) == chosen["value"]
        rows = [both for both in open_rows(chosen["data"], split) if held(both[0])]
    else:
        rows = open_rows(name, split)
    if not isinstance(rows, list):
        return _LazySource(rows, read)
    if not rows:
        raise ValueError(f"{name} holds no records")
    return [read(row, where) for row, where in rows]


class _LazySource:
    """Reads a record when it is asked for; the first one at once, to check it."""

    def __init__(self, rows: LazyRows, read: Callable[..., Record]):
        self._rows, self._read = rows, read
        self[0]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        return self._read(*self._rows[index])


def _read_record(
    row: Mapping[str, Any],
    where: str,
    *,
    columns: Mapping[str, Sequence[str]],
    required: Sequence[str],
) -> Record:
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
                f"it has {clipped(sorted(row))}"
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
    messages = []
    for item in listed:
        if not isinstance(item, Mapping):
            return []
        messages.append({k: v for k, v in item.items() if isinstance(v, str)})
        if not {"role", "content"} <= messages[-1].keys():
            return []
    return messages
