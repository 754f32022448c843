"""What suites found: tables for the terminal, Markdown, JSON, and one figure a suite."""

import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.axes
import matplotlib.figure
import rich.box
import rich.console
import rich.table
import rich.text

from pr1_jax.bench.timing import Spread
from pr1_jax.system import files

_COLORS = ("#2563eb", "#e8710a", "#059669", "#7c3aed")
_INK, _FAINT, _GRID = "#1f2937", "#6b7280", "#e5e7eb"
_COLUMNS, _DOTS_PER_INCH = 3, 100


@dataclasses.dataclass(frozen=True)
class Plot:
    """A panel: columns over the column `x`, those named as limits dashed.

    Attributes:
      by: a column; a line for each of its values. bars: whether `x` are names.
    """

    x: str
    y: tuple[str, ...]
    limits: tuple[str, ...] = ()
    by: str = ""
    bars: bool = False
    log_x: bool = True


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of figures by column. A column named as a share is shown in per cent."""

    title: str
    rows: Sequence[Mapping[str, Any]]
    note: str = ""
    plot: Plot | None = None

    @property
    def columns(self) -> list[str]:
        """Names of all columns, in order."""
        return list(dict.fromkeys(name for row in self.rows for name in row))

    def cells(self) -> list[list[str]]:
        """All rows as text."""
        return [
            [cell(name, row.get(name)) for name in self.columns] for row in self.rows
        ]

    def data(self) -> dict[str, Any]:
        """All of it for JSON."""
        rows = [{name: _data(x) for name, x in row.items()} for row in self.rows]
        return {"title": self.title, "note": self.note, "rows": rows}


def _data(value: Any) -> Any:
    if isinstance(value, Spread):
        return {
            "median": value.median,
            "min": min(value.values),
            "max": max(value.values),
            "values": list(value.values),
        }
    return value


def _center(value: Any) -> float:
    return value.median if isinstance(value, Spread) else value


def _is_share(name: str) -> bool:
    return "share" in name or "MFU" in name


def cell(name: str, value: Any) -> str:
    """A figure as text; of several, the median and the range."""
    if value is None:
        return ""
    if isinstance(value, Spread):
        value = value.times(100 if _is_share(name) else 1)
        text = _number(value.median)
        if len(set(value.values)) > 1:
            text += f" ({_number(min(value.values))}–{_number(max(value.values))})"
        return text + (" %" if _is_share(name) else "")
    if isinstance(value, float):
        return f"{_number(100 * value)} %" if _is_share(name) else _number(value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def _number(value: float) -> str:
    """Three digits at least: 0.0123, 1.23, 12.3, 1,234."""
    if value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def terminal(table: Table) -> rich.console.Group:
    """For the terminal."""
    shown = rich.table.Table(*table.columns, box=rich.box.SIMPLE)
    for row in table.cells():
        shown.add_row(*row)
    note = [rich.text.Text(table.note + "\n", style="dim")] if table.note else []
    title = rich.text.Text(table.title, style="bold")
    return rich.console.Group(title, shown, *note)


def markdown(suites: Mapping[str, Mapping[str, Any]], about: Mapping[str, Any]) -> str:
    """All tables. Of a suite that failed, why."""
    parts = ["# Benchmark\n\n", *(f"- {k}: {v}\n" for k, v in about.items()), "\n"]
    for name, suite in suites.items():
        parts.append(f"## {name}\n\n")
        if "error" in suite:
            parts.append(f"failed: {suite['error']}\n\n")
        for table in suite["tables"]:
            lines = [table.columns, ["---"] * len(table.columns), *table.cells()]
            rows = "".join("| " + " | ".join(line) + " |\n" for line in lines)
            note = f"\n{table.note}\n" if table.note else ""
            parts.append(f"**{table.title}**\n\n{rows}{note}\n")
    return "".join(parts)


def json_data(suites: Mapping[str, Mapping[str, Any]], about: Mapping) -> dict:
    """All figures, every repeat's among them."""
    found = {
        name: suite | {"tables": [table.data() for table in suite["tables"]]}
        for name, suite in suites.items()
    }
    return files.plain({**about, "suites": found})


def draw(folder: Path, suite: str, tables: Sequence[Table]) -> None:
    """Draws `<suite>.png`, a panel for each table that has a plot; else nothing."""
    tables = [table for table in tables if table.plot and table.rows]
    if not tables:
        return
    columns = min(_COLUMNS, len(tables))
    rows = -(-len(tables) // columns)
    size = (5.3 * columns, 0.5 + 3.9 * rows)
    figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, table in zip(grid, tables):
        _style(axes, table.title)
        (_draw_bars if table.plot.bars else _draw_lines)(axes, table)
        axes.set_ylim(bottom=0)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=10, labelcolor=_INK)
    for axes in grid[len(tables) :]:
        axes.set_axis_off()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=_DOTS_PER_INCH, facecolor="white")
    files.replace_file(folder / f"{suite}.png", image.getvalue())


def _style(axes: matplotlib.axes.Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=_INK)
    axes.grid(axis="y", color=_GRID, linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", labelsize=10, colors=_FAINT, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)


def _draw_lines(axes: matplotlib.axes.Axes, table: Table) -> None:
    plot = table.plot
    groups = dict.fromkeys(row[plot.by] for row in table.rows) if plot.by else [None]
    colors = iter(_COLORS * 3)
    for group in groups:
        rows = [row for row in table.rows if group is None or row[plot.by] == group]
        x = [row[plot.x] for row in rows]
        prefix = "" if group is None else f"{plot.by} {group}: "
        for name in plot.y:
            values = [_percent(name, row[name]) for row in rows]
            color = next(colors)
            axes.plot(x, values, color=color, lw=2.2, marker="o", label=prefix + name)
            if any(isinstance(row[name], Spread) for row in rows):
                low, high = (
                    [_percent(name, _extreme(row[name], end)) for row in rows]
                    for end in (min, max)
                )
                axes.fill_between(x, low, high, color=color, alpha=0.15, lw=0)
        for name in plot.limits:
            values = [_percent(name, row[name]) for row in rows]
            axes.plot(x, values, color=_FAINT, lw=1.5, ls="--", label=prefix + name)
    if plot.log_x:
        axes.set_xscale("log", base=2)
    places = sorted({row[plot.x] for row in table.rows})
    axes.set_xticks(places, [f"{place:,}" for place in places])
    axes.minorticks_off()
    axes.set_xlabel(plot.x, color=_FAINT)


def _draw_bars(axes: matplotlib.axes.Axes, table: Table) -> None:
    plot = table.plot
    names = list(dict.fromkeys(str(row[plot.x]) for row in table.rows))
    groups = list(dict.fromkeys(row[plot.by] for row in table.rows)) if plot.by else [0]
    (column,) = plot.y
    width = 0.8 / len(groups)
    for i, group in enumerate(groups):
        rows = [row for row in table.rows if not plot.by or row[plot.by] == group]
        places = [
            names.index(str(row[plot.x])) + (i + 0.5) * width - 0.4 for row in rows
        ]
        values = [_percent(column, row[column]) for row in rows]
        color = _COLORS[i % len(_COLORS)]
        label = f"{plot.by} {group}" if plot.by else None
        axes.bar(places, values, width * 0.92, color=color, label=label)
    axes.set_xticks(range(len(names)), [name.replace(" ", "\n") for name in names])
    axes.set_ylabel(column, color=_FAINT)


def _percent(name: str, value: Any) -> float:
    return _center(value) * (100 if _is_share(name) else 1)


def _extreme(value: Any, end) -> float:
    return end(value.values) if isinstance(value, Spread) else value
