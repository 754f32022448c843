"""One table of figures, for the terminal and for Markdown; one figure of repeats."""

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import rich.box
import rich.console
import rich.table
import rich.text


@dataclasses.dataclass(frozen=True)
class Spread:
    """One figure of several repeats, shown as the median and the range."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The value that stands for all of them."""
        return statistics.median(self.values)

    def map(self, function: Callable[[float], float]) -> "Spread":
        """The figure that `function` makes of every repeat."""
        return Spread(tuple(map(function, self.values)))

    def times(self, factor: float) -> "Spread":
        """The figure in another unit."""
        return self.map(lambda value: value * factor)

    def rate(self, amount: float) -> "Spread":
        """Of seconds: `amount` per second."""
        return self.map(lambda value: amount / value)

    def over(self, other: "Spread") -> "Spread":
        """Ratios to another figure, repeat by repeat: of work that took turns."""
        pairs = zip(self.values, other.values, strict=True)
        return Spread(tuple(value / base for value, base in pairs))


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of figures by column, in the order in which columns first occur.

    A cell is text, a number, a `Spread` or None (empty). Fractions in a column whose
    name has "share" or "MFU" in it are shown in per cent.
    """

    title: str
    rows: Sequence[Mapping[str, Any]]
    note: str = ""

    @property
    def columns(self) -> list[str]:
        """Names of all columns, in order."""
        return list(dict.fromkeys(name for row in self.rows for name in row))

    def cells(self) -> list[list[str]]:
        """All rows as text."""
        return [
            [cell(name, row.get(name)) for name in self.columns] for row in self.rows
        ]

    def terminal(self) -> rich.console.Group:
        """The table for the terminal, its title above and its note below it."""
        narrow = {"padding": (0, 1), "collapse_padding": True, "pad_edge": False}
        shown = rich.table.Table(box=rich.box.SIMPLE, **narrow)
        for name in self.columns:
            shown.add_column(rich.text.Text(name), overflow="fold")
        for row in self.cells():
            shown.add_row(*map(rich.text.Text, row))
        title = [rich.text.Text(self.title, style="bold")] if self.title else []
        note = [rich.text.Text(self.note + "\n", style="dim")] if self.note else []
        return rich.console.Group(*title, shown, *note)

    def markdown(self) -> str:
        """The table in Markdown, with its title and note."""
        lines = [self.columns, ["---"] * len(self.columns), *self.cells()]
        rows = "".join("| " + " | ".join(line) + " |\n" for line in lines)
        title = f"**{self.title}**\n\n" if self.title else ""
        return title + rows + (f"\n{self.note}\n" if self.note else "")


def is_share(column: str) -> bool:
    """Whether a column is shown in per cent."""
    return "share" in column or "MFU" in column


def cell(column: str, value: Any) -> str:
    """A value as text; of repeats the median, and the range where they differ."""
    if value is None:
        return ""
    if isinstance(value, Spread):
        value = value.times(100 if is_share(column) else 1)
        text = number(value.median)
        if len(set(value.values)) > 1:
            text += f" ({number(min(value.values))}–{number(max(value.values))})"
        return text + (" %" if is_share(column) else "")
    if isinstance(value, float):
        return f"{number(100 * value)} %" if is_share(column) else number(value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def number(value: float) -> str:
    """Three digits at least: 0.0123, 1.23, 12.3, 1,234."""
    if value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
