"""What suites measured: tables with plots, Markdown, JSON, and one picture a suite."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.axes

from pr1_jax.system import files, pictures, tables
from pr1_jax.system.tables import Spread

_COLUMNS, _DOTS_PER_INCH = 3, 70


@dataclasses.dataclass(frozen=True)
class Plot:
    """A panel: columns over the column `x`, those named as limits dashed.

    Attributes:
      by: a column; a line for each of its values.
      bars: whether `x` are names.
    """

    x: str
    y: tuple[str, ...]
    limits: tuple[str, ...] = ()
    by: str = ""
    bars: bool = False


@dataclasses.dataclass(frozen=True)
class Table(tables.Table):
    """A table, and how it is drawn, if at all."""

    plot: Plot | None = None

    def data(self) -> dict[str, Any]:
        """All of it for JSON."""
        rows = [{name: _data(x) for name, x in row.items()} for row in self.rows]
        return {"title": self.title, "note": self.note, "rows": rows}


def _data(value: Any) -> Any:
    if isinstance(value, Spread):
        low, high = min(value.values), max(value.values)
        return {"median": _rounded(value.median)} | {
            "min": _rounded(low),
            "max": _rounded(high),
        }
    return _rounded(value)


def _rounded(value: Any) -> Any:
    """Five digits that count."""
    return float(f"{value:.5g}") if isinstance(value, float) else value


def markdown(suites: Mapping[str, Mapping[str, Any]], about: Mapping[str, Any]) -> str:
    """All tables, and why a suite failed."""
    parts = ["# Benchmark\n\n", *(f"- {k}: {v}\n" for k, v in about.items()), "\n"]
    for name, suite in suites.items():
        parts.append(f"## {name}\n\n")
        if "error" in suite:
            parts.append(f"failed: {suite['error']}\n\n")
        parts += [table.markdown() + "\n" for table in suite["tables"]]
    return "".join(parts)


def json_data(suites: Mapping[str, Mapping[str, Any]], about: Mapping) -> dict:
    """All figures: of repeats the median and the range."""
    data = {
        name: suite | {"tables": [table.data() for table in suite["tables"]]}
        for name, suite in suites.items()
    }
    return files.plain({**about, "suites": data})


def draw(folder: Path, suite: str, drawn: Sequence[Table]) -> None:
    """Draws `<suite>.png`, a panel for each table that has a plot; else nothing."""
    drawn = [table for table in drawn if table.plot and table.rows]
    if not drawn:
        return
    columns = min(_COLUMNS, len(drawn))
    rows = -(-len(drawn) // columns)
    figure = pictures.figure(rows, columns, width=5.3, height=3.9)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, table in zip(grid, drawn):
        pictures.style(axes, table.title, size=12)
        (_draw_bars if table.plot.bars else _draw_lines)(axes, table)
        axes.set_ylim(bottom=0)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=10, labelcolor=pictures.INK)
    for axes in grid[len(drawn) :]:
        axes.set_axis_off()
    pictures.save(figure, folder / f"{suite}.png", dots_per_inch=_DOTS_PER_INCH)


def _groups(table: Table) -> dict[Any, list[Mapping[str, Any]]]:
    """Rows by the value of the column that makes lines; None where there is none."""
    by, groups = table.plot.by, {}
    for row in table.rows:
        groups.setdefault(row[by] if by else None, []).append(row)
    return groups


def _draw_lines(axes: matplotlib.axes.Axes, table: Table) -> None:
    plot, colors = table.plot, iter(pictures.COLORS * 3)
    for group, rows in _groups(table).items():
        x = [row[plot.x] for row in rows]
        prefix = "" if group is None else f"{plot.by} {group}: "
        for name in plot.y:
            middle, low, high = (
                [_value(name, row[name], end) for row in rows]
                for end in (None, min, max)
            )
            color = next(colors)
            axes.plot(x, middle, color=color, lw=2.2, marker="o", label=prefix + name)
            axes.fill_between(x, low, high, color=color, alpha=0.15, lw=0)
        for name in plot.limits:
            values = [_value(name, row[name]) for row in rows]
            style = {"color": pictures.FAINT, "lw": 1.5, "ls": "--"}
            axes.plot(x, values, label=prefix + name, **style)
    axes.set_xscale("log", base=2)
    ticks = sorted({row[plot.x] for row in table.rows})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(plot.x, color=pictures.FAINT)


def _draw_bars(axes: matplotlib.axes.Axes, table: Table) -> None:
    plot, groups = table.plot, _groups(table)
    names = list(dict.fromkeys(str(row[plot.x]) for row in table.rows))
    (column,) = plot.y
    width = 0.8 / len(groups)
    for i, (group, rows) in enumerate(groups.items()):
        x = [names.index(str(row[plot.x])) + (i + 0.5) * width - 0.4 for row in rows]
        values = [_value(column, row[column]) for row in rows]
        color = pictures.COLORS[i % len(pictures.COLORS)]
        label = None if group is None else f"{plot.by} {group}"
        axes.bar(x, values, width * 0.92, color=color, label=label)
    axes.set_xticks(range(len(names)), [name.replace(" ", "\n") for name in names])
    axes.set_ylabel(column, color=pictures.FAINT)


def _value(name: str, value: Any, end: Callable | None = None) -> float:
    """A figure as it is drawn; of repeats the median, or their `end`, min or max."""
    if isinstance(value, Spread):
        value = end(value.values) if end else value.median
    return value * (100 if tables.is_share(name) else 1)
