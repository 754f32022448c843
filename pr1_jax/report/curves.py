"""One picture of a run: `curves.png`, the charts of the page that tell its course."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from pr1_jax.report import reading
from pr1_jax.report.charts import CHARTS, Chart
from pr1_jax.system import pictures
from pr1_jax.workdir import metric_table

_WINDOW = "#fde68a"
_COLUMNS = 3


def plot_curves(run: reading.Run) -> None:
    """Draws `curves.png` into the run's workdir, 1600 pixels wide.

    Charts without a value are left out.
    """
    charts = [c for group in CHARTS.values() for c in group if c.in_picture]
    charts = [chart for chart in charts if _stages(run, chart)]
    count = max(len(charts), 1)
    rows, columns = -(-count // _COLUMNS), min(_COLUMNS, count)
    figure = pictures.figure(rows, columns, width=16 / columns, height=3.9)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, chart in zip(grid, charts):
        _draw(axes, run, chart)
    for axes in grid[len(charts) :]:
        axes.set_axis_off()
    title = run.name if charts else f"{run.name}: no step has been logged yet"
    if names := sorted({window.reward for window in run.windows}):
        title += f"    (shaded: steps with the reward {', '.join(names)})"
    figure.suptitle(title, fontsize=13, color=pictures.FAINT, x=0.01, ha="left")
    pictures.save(figure, run.path / "curves.png", dots_per_inch=100)


def _stages(run: reading.Run, chart: Chart) -> list[tuple[str, slice, int]]:
    """Name, rows and first step, counted through, of the stages that a chart has."""
    stages, before = [], 0
    for name, first, count in run.stages:
        rows = slice(first, first + count)
        columns = [run.columns[m][rows] for m in chart.metrics if m in run.columns]
        if np.isfinite(columns).any():
            stages.append((name, rows, before))
            before += run.rows[first + count - 1]["step"]
    return stages


def _draw(axes: Axes, run: reading.Run, chart: Chart) -> None:
    pictures.style(axes, chart.title, size=13)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    stages = _stages(run, chart)
    lines = [
        line for line in zip(chart.metrics, pictures.COLORS) if line[0] in run.columns
    ]
    for name, rows, before in stages:
        steps = before + np.array([row["step"] for row in run.rows[rows]])
        for window in (w for w in run.windows if w.stage == name):
            first, last = before + window.first - 0.5, before + window.last + 0.5
            axes.axvspan(first, last, color=_WINDOW, alpha=0.55, lw=0)
        for metric, color in lines:
            _draw_line(axes, chart, steps, run.columns[metric][rows], color)
        if len(stages) > 1:
            at = {"textcoords": "offset points", "xycoords": ("data", "axes fraction")}
            axes.axvline(
                before + 0.5, color=pictures.FAINT, linewidth=0.8, linestyle=":"
            )
            axes.annotate(name, (before + 0.5, 0), (3, 4), color=pictures.FAINT, **at)
    if len(lines) > 1:
        for metric, color in lines:
            words = metric_table.describe(metric).short
            axes.plot([], [], color=color, linewidth=2.2, label=words)
    _draw_held_out(axes, run, chart, stages)
    _set_scale(axes, chart.scale)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=11, labelcolor=pictures.INK)


def _draw_line(
    axes: Axes, chart: Chart, steps: np.ndarray, values: np.ndarray, color: str
) -> None:
    """Draws a metric over one stage, smoothed unless there is little of it."""
    if chart.scale == "log":
        values = np.where(values > 0, values, np.nan)
    few = len(values) <= 8
    if not few and chart.scale != "log":
        axes.plot(steps, values, color=color, linewidth=1, alpha=0.3)
        values = _smoothed(values)
    marker = "o" if few else None
    axes.plot(steps, values, color=color, linewidth=2.2, marker=marker)


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Centred moving mean over about a twelfth of the points, NaN left out."""
    width = 2 * max(len(values) // 24, 1) + 1
    known = np.isfinite(values)
    total = np.convolve(np.where(known, values, 0.0), np.ones(width), "same")
    count = np.convolve(known, np.ones(width), "same")
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _draw_held_out(
    axes: Axes,
    run: reading.Run,
    chart: Chart,
    stages: Sequence[tuple[str, slice, int]],
) -> None:
    """Draws the evaluations before and after stages, with their intervals."""
    steps = {rows.start: before for _, rows, before in reversed(stages)}
    for _, rows, before in stages:
        steps.setdefault(rows.stop, before + run.rows[rows.stop - 1]["step"])
    points = [
        (
            steps[at] + 0.5,
            value,
            line.get(f"{chart.held_out}_low", value),
            line.get(f"{chart.held_out}_high", value),
        )
        for _, at, line in run.evaluations
        if at in steps and (value := line.get(chart.held_out)) is not None
    ]
    if points:
        x, value, low, high = np.array(points, float).T
        axes.errorbar(
            x,
            value,
            [np.maximum(value - low, 0), np.maximum(high - value, 0)],
            fmt="o",
            color=pictures.INK,
            markerfacecolor="white",
            capsize=4,
            zorder=3,
            label="held-out, 95 %",
        )


def _set_scale(axes: Axes, scale: str) -> None:
    if scale == "log":
        axes.set_yscale("log")
    elif scale == "share":
        axes.set_ylim(0, 1.03)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    elif scale == "zero":
        axes.set_ylim(bottom=0)
        short = lambda x, _: f"{x / 1000:g}k" if x >= 10_000 else f"{x:g}"
        axes.yaxis.set_major_formatter(FuncFormatter(short))
