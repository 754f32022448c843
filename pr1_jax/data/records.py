"""Records: what the columns of a row say, as texts (docs/data.md)."""

import dataclasses
import decimal
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pr1_jax.data import chats
from pr1_jax.data.rows import UNREADABLE, Dropped, Row, clipped

Record = dict[str, str]
COLUMNS = {  # of each field, where no others are named
    "question": "question,messages,conversations",
    "answer": "answer",
    "response": "response",
}
# Reasons to drop a record: nothing stands where the field is looked for.
NO_QUESTION, NO_ANSWER, NO_RESPONSE = (f"no_{field}" for field in COLUMNS)
_MISSING = object()
_EMPTY = re.compile(  # marks around an answer, and no answer
    r"(?:\\(?:boxed|fbox|text|mathrm|left|right|[,;! ])|[\s{}\[\]()$\"'.,:;*_-])*"
)
_INVISIBLE = ("Cc", "Cf", "Zl", "Zp", "Zs")  # categories: controls, formats, spaces
# A number with separators of thousands, its currency before or per cent behind it.
_GROUPED = re.compile(r"[-−+]?(\\?\$|€|£)?[-−+]?[1-9]\d{0,2}(,\d{3})+(\.\d+)?(\\?%)?")
# A heading of an answer, and what the line below may not have: `\boxed`, which is found
# in a text as well, or the bullet of a list, which could be a minus.
_HEADING = re.compile(r"#{1,6}\s*[*_]*(the )?(final )?answer[\s*_:]*", re.IGNORECASE)
_NOT_BELOW = re.compile(r".*\\boxed|([-−–+*•]|\d+[.)])\s")


def read_record(
    row: Row, *, columns: Mapping[str, Sequence[str]], traces: bool
) -> Record:
    """The texts of a row: `question` and `answer`, of a trace also `response`.

    A question that is a chat is the last turn of its user; the record then has
    `messages`, too, as JSON. Where no column has the response of a trace, it is the last
    turn of the assistant in a chat, and the messages are those before it.

    Args:
      columns: names by field. The first whose value is neither null nor blank counts;
        `outer.inner` is a column inside another.
      traces: whether a response is needed. An answer is not, then, and may be "".

    Raises:
      Dropped: what is needed is null, blank or not text; names place and column.
    """
    content, where = row
    if isinstance(content, Dropped):
        raise content
    cells = _Cells(content, where, columns)
    record = _read_trace(cells) if traces else _read_problem(cells)
    for field, text in record.items():
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON may spell one: "\\ud83d"
            character = ascii(text[error.start])
            raise Dropped(
                UNREADABLE,
                f"{where}: the {field} holds {character}, half a character: "
                "save the data as UTF-8 anew",
            ) from error
    return record


def holds(row: Row, column: str, value: str) -> bool:
    """Whether a column of a row has this value; also if the row cannot be read."""
    content, _ = row
    if isinstance(content, Dropped):
        return True
    return _text(_one(_lookup(content, column))) == value


class _Cell(NamedTuple):
    column: str
    value: Any


@dataclasses.dataclass(frozen=True)
class _Cells:
    """A row, and the columns that its fields are read from."""

    content: Mapping[str, Any]
    where: str
    columns: Mapping[str, Sequence[str]]

    def all(self, field: str) -> list[_Cell]:
        """What stands in the columns of a field, without nulls and blanks."""
        names = self.columns[field]
        cells = [_Cell(name, _one(_lookup(self.content, name))) for name in names]
        return [cell for cell in cells if not _is_nothing(cell.value)]

    def first(self, field: str) -> _Cell:
        """The first of `all`; raises `Dropped` if there is none."""
        for cell in self.all(field):
            return cell
        names = self.columns[field]
        values = {name: _lookup(self.content, name) for name in names}
        there = [name for name in names if values[name] is not _MISSING]
        if there:
            match _one(values[there[0]]):
                case str() | bytes():
                    found = "blank"
                case list() | tuple() | dict():
                    found = "empty"
                case _:
                    found = "null"
            text = f"{there[0]!r} is {found}, expected the {field}"
            raise Dropped(f"no_{field}", f"{self.where}: {text}")
        wanted = " or ".join(map(repr, names))
        raise Dropped(
            f"no_{field}",
            f"{self.where} has no column {wanted} for {field!r} (data.columns), "
            f"it has {clipped(sorted(self.content))}",
        )

    def text(self, cell: _Cell) -> str:
        """The text of a cell; raises `Dropped` if it is something else."""
        text, fault = _text(cell.value), chats.fault(cell.value)
        if text is None or fault:
            kind = type(cell.value).__name__
            what = f"a chat, but {fault}" if fault else f"{kind}, expected text"
            detail = f"{self.where}: {cell.column!r} is {what}"
            raise Dropped(UNREADABLE, detail)
        return text


def _read_problem(cells: _Cells) -> Record:
    question = cells.first("question")
    record = _asked(cells, question, chats.read(question.value))
    cell = cells.first("answer")
    record["answer"] = reference(cells.text(cell))
    if _is_nothing(record["answer"]):
        detail = f"{cells.where}: nothing follows #### in {cell.column!r}"
        raise Dropped(NO_ANSWER, detail)
    if _EMPTY.fullmatch(record["answer"]):
        detail = f"{cells.where}: {cell.column!r} is {clipped(record['answer'])}, blank"
        raise Dropped(NO_ANSWER, detail)
    return record


def _read_trace(cells: _Cells) -> Record:
    question = cells.first("question")
    answer = next((_text(cell.value) for cell in cells.all("answer")), None)
    record = {"answer": reference(answer or "")}
    chat = ""
    if given := cells.all("response"):
        record |= _asked(cells, question, chats.read(question.value))
        messages = chats.read(given[0].value)
        if not messages:
            return record | {"response": cells.text(given[0])}
        if solution := chats.solution(messages):
            return record | {"response": solution}
        chat = given[0].column
    else:
        for cell in cells.all("question"):
            messages = chats.read(cell.value)
            if solution := chats.solution(messages):
                record |= _asked(cells, cell, chats.before_solution(messages))
                return record | {"response": solution}
            chat = cell.column if messages else chat
    if not chat:
        for cell in cells.all("question"):
            cells.text(cell)  # a chat that cannot be read may have had one
        cells.first("response")  # says that there is none
    detail = f"{cells.where}: the chat in {chat!r} has no solution"
    raise Dropped(NO_RESPONSE, detail)


def _asked(cells: _Cells, cell: _Cell, chat: Sequence[chats.Message]) -> Record:
    """The question of a record, of a chat also its messages."""
    if not chat and not chats.read(cell.value):
        return {"question": cells.text(cell)}
    if question := chats.question(chat):
        written = json.dumps(chat, ensure_ascii=False)
        return {"question": question, "messages": written}
    raise Dropped(
        NO_QUESTION,
        f"{cells.where}: the chat in {cell.column!r} asks nothing: before its solution "
        "no turn of a user, or a blank one",
    )


def reference(answer: str) -> str:
    """The reference answer in an answer with its working; "" if none follows `####`.

    What stands behind the last `####` counts if nothing but it follows, as in GSM8K, and
    the line below a heading `#### Answer` at the end; a plain number there loses its
    separators of thousands. All else stays as it is.

        >>> reference("2 * 500 = 1000\\n#### 1,000"), reference("#### (1,2)")
        ('1000', '(1,2)')
        >>> reference("#### Answer\\nIt is 5."), reference("#### So\\nIt is 5.")
        ('It is 5.', '#### So\\nIt is 5.')
    """
    head, mark, final = answer.rstrip().rpartition("####")
    final = final.strip()
    *_, above, last = ["", "", *filter(None, map(str.strip, answer.split("\n")))]
    if _HEADING.fullmatch(above) and not _NOT_BELOW.match(last):
        final = last
    elif not mark or head.endswith("#") or "\n" in final:
        return answer
    return final.replace(",", "") if _GROUPED.fullmatch(final) else final


def _lookup(row: Mapping[str, Any], name: str) -> Any:
    """The value of a column, or of one inside another: `outer.inner`."""
    if name in row:
        return row[name]
    outer, dot, inner = name.partition(".")
    inside = row.get(outer, _MISSING)
    if dot and inside is None:
        return None
    return _lookup(inside, inner) if dot and isinstance(inside, Mapping) else _MISSING


def _one(value: Any) -> Any:
    """The item of a list of one text or number, as verl's ground truths are."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    match value:
        case [str() | bytes() | int() | float() | None as item]:
            return item
        case _:
            return value


def _is_nothing(value: Any) -> bool:
    """Whether a value is null (NaN is, too), blank or empty."""
    match value:
        case str():
            return all(unicodedata.category(char) in _INVISIBLE for char in value)
        case bytes():
            return not value.strip()
        case float() | np.floating():
            return bool(np.isnan(value))
        case list() | tuple() | dict():
            return not value
        case _:
            return value is None or value is _MISSING


def _text(value: Any) -> str | None:
    """A value as text; None if it is none."""
    match value:
        case str():
            return value
        case bytes():
            return value.decode("utf-8", "surrogateescape")  # refused by the caller
        case int() | float() | np.number() | decimal.Decimal():
            return str(value)
        case _:
            return None
