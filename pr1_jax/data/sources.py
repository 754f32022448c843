"""Records of text by random access: problems and traces, whatever they are read from.

A source is made by code (`embedded:…`), or its rows are read from files, tensorflow-datasets
or the Hugging Face hub (`rows`), and the columns named in the config make the record
(`records`).
"""

import functools
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from pr1_jax.data import records, tasks
from pr1_jax.data.records import COLUMNS, Record
from pr1_jax.data.rows import Dropped, LazyRows, Row, open_rows

_FILTER = re.compile(r"(?P<data>.*)#(?P<column>[\w.]+)=(?P<value>[^#]*)")
_BENCHMARK = re.compile(r"(?:([\w.-]+)=)?(.*?)(?:@([0-9]{1,6}))?", re.DOTALL)
_EMBEDDED = "embedded:"
_MIN_USABLE = 0.1  # of the records of a file; with fewer, it is not what was meant
_FIRST = (
    100  # records that are looked at where they are read later, to find a usable one
)

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
    task: str = "partner",
    strict: bool = False,
) -> Source:
    """Opens a random-access source of records: `question`, `answer`, `response`.

    Its item is a record, or raises `Dropped` where the row is of no use; an iteration
    passes over these. So it is as long as its data, and places in it stay the same.

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
        `"problem,prompt"`, the first that is neither null nor blank in a row;
        `"reward_model.ground_truth"` is one inside another. A question may be a chat
        (`records.read_record`).
      traces: whether records have a cold-start `response`; their `answer` may then be
        lacking, and is "".
      task: made by code, with its options, as `tasks.make` reads it.
      strict: whether a row of no use is an error, at once or, of data that are read
        when they are asked for, there.

    Raises:
      ValueError: one line that names what is wrong, and where; also if hardly any row
        is of use.
      FileNotFoundError: no such file, or data that has to be prepared before.
    """
    if is_made_by_code(name):
        family = name.removeprefix(_EMBEDDED)
        return tasks.make(task).records(family, split, seed=seed, traces=traces)
    given = {field: names for field, names in (columns or {}).items() if names}
    if unknown := sorted(set(given) - set(COLUMNS)):
        raise ValueError(f"data.columns has {unknown}, expected some of {(*COLUMNS,)}")
    read = functools.partial(
        records.read_record,
        columns={
            field: [name.strip() for name in names.split(",")]
            for field, names in {**COLUMNS, **given}.items()
        },
        traces=traces,
    )
    if chosen := _FILTER.fullmatch(name):
        held = lambda row: records.holds(row, chosen["column"], chosen["value"])
        rows = [row for row in open_rows(chosen["data"], split) if held(row)]
    else:
        rows = open_rows(name, split)
    if not len(rows):
        raise ValueError(f"{name} holds no records")
    if strict:
        read = functools.partial(_read_or_fail, read=read)
    if isinstance(rows, list):
        items = [_read_or_drop(row, read) for row in rows]
        dropped = [item for item in items if isinstance(item, Dropped)]
        _check_usable(name, len(items), dropped)
        return _Sifted(items) if dropped else items
    source = _LazySource(rows, read)
    source.check(name)
    return source


class _Sifted:
    """Records in memory, some of which are of no use; an iteration passes those over."""

    def __init__(self, items: Sequence[Record | Dropped]):
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Record:
        item = self._items[index]
        if isinstance(item, Dropped):  # a new one: each raise adds to its traceback
            raise Dropped(item.reason, str(item))
        return item

    def __iter__(self) -> Iterator[Record]:
        return (item for item in self._items if not isinstance(item, Dropped))


class _LazySource:
    """Records that are read when they are asked for; an iteration as of `_Sifted`."""

    def __init__(self, rows: LazyRows, read: Callable[[Row], Record]):
        self._rows, self._read = rows, read

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        return self._read(self._rows[index])

    def __iter__(self) -> Iterator[Record]:
        items = (_read_or_drop(row, self._read) for row in self._rows)
        return (item for item in items if not isinstance(item, Dropped))

    def check(self, name: str) -> None:
        """Reads records until one is of use; raises ValueError if none is soon."""
        dropped = []
        for row in itertools.islice(self._rows, _FIRST):
            item = _read_or_drop(row, self._read)
            if not isinstance(item, Dropped):
                return
            dropped.append(item)
        _check_usable(name, len(dropped), dropped)


def _read_or_drop(row: Row, read: Callable[[Row], Record]) -> Record | Dropped:
    try:
        return read(row)
    except Dropped as drop:
        return drop.with_traceback(None)


def _read_or_fail(row: Row, read: Callable[[Row], Record]) -> Record:
    try:
        return read(row)
    except Dropped as drop:
        raise ValueError(f"{drop} (data.strict)") from drop


def _check_usable(name: str, number: int, dropped: Sequence[Dropped]) -> None:
    """Raises ValueError if of so many records too few are left without the dropped."""
    usable = number - len(dropped)
    if usable < _MIN_USABLE * number:
        raise ValueError(
            f"{name}: {usable} of {number} records can be used; the first of the "
            f"others: {dropped[0]}"
        )
