"""One picture an experiment, drawn from `results.json` alone.

Lines are means over seeds with the range of the seeds behind them; points have 95 %
intervals. Names stand at what they name.
"""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pr1_jax.study import cells
from pr1_jax.system import pictures
from pr1_jax.system.pictures import BLUE, FAINT, GREEN, GREY, INK, ORANGE, VIOLET, style

_DOTS_PER_INCH = 90
_APART = 0.09  # names of lines, as a share of the axes
_COLORS = {
    "sft": GREY,
    "accuracy": ORANGE,
    "alternating": BLUE,
    "parallel_only": VIOLET,
    "sequential": GREEN,
    "scaffold": BLUE,
    "late": ORANGE,
    "forced": ORANGE,
    "causal_sampling": VIOLET,
    "causal_sampling_published": VIOLET,
    "no_cold_start": GREEN,
    "sft_causal": GREY,
    "causal_without_easy": VIOLET,
    "causal_easy": VIOLET,
    "causal_with_easy": VIOLET,
    "structured_easy": ORANGE,
    "structured_with_easy": ORANGE,
}

Results = Mapping[str, Any]


def _panels(columns: int, height: float = 3.4) -> tuple[Figure, Sequence[Axes]]:
    figure = pictures.figure(1, columns, width=4.3, height=height)
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _color(name: str) -> str:
    return _COLORS.get(name, BLUE)


def _known(results: Results, names: Sequence[str]) -> list[str]:
    return [name for name in names if name in results["cells"]]


def _course(results: Results, name: str, figure: str) -> np.ndarray | None:
    """A cell's figure over RL steps, float [seeds, steps], smoothed over an eighth."""
    rows = results["cells"].get(name, {}).get("courses", {}).get(figure, [])
    if not rows:
        return None
    shortest = min(map(len, rows))
    rows = np.array([row[:shortest] for row in rows], float)  # None becomes NaN
    width = max(1, shortest // 8)
    known = np.isfinite(rows)
    smooth = lambda row: np.convolve(row, np.ones(width), "same")
    total = np.array([smooth(row) for row in np.where(known, rows, 0.0)])
    count = np.array([smooth(row.astype(float)) for row in known])
    with np.errstate(invalid="ignore"):
        return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _draw_courses(
    axes: Axes,
    results: Results,
    names: Sequence[str],
    figure: str,
    title: str,
    *,
    from_zero: bool = False,
) -> None:
    """Lines over RL steps, each named at its end."""
    style(axes, title)
    ends = []
    for name in _known(results, names):
        rows = _course(results, name, figure)
        if rows is None or np.isnan(rows).all():
            continue
        known = np.isfinite(rows).any(axis=0)
        steps, rows = np.arange(1, rows.shape[1] + 1)[known], rows[:, known]
        mean = np.nanmean(rows, axis=0)
        axes.plot(steps, mean, color=_color(name), linewidth=2)
        low, high = np.nanmin(rows, axis=0), np.nanmax(rows, axis=0)
        axes.fill_between(steps, low, high, color=_color(name), alpha=0.15, lw=0)
        ends.append((float(mean[-1]), float(steps[-1]), name))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    axes.set_xlabel("RL step", color=FAINT, fontsize=9)
    if from_zero:
        axes.set_ylim(bottom=-0.03 * axes.get_ylim()[1])
    _name_ends(axes, results, ends)


def _draw_ratio(axes: Axes, results: Results, names: Sequence[str]) -> None:
    axes.set_ylim(-0.03, 1.03)
    title = "Responses with a block, in training"
    _draw_courses(axes, results, names, "parallel_ratio", title)
    _percent(axes)


def _name_ends(axes: Axes, results: Results, ends: Sequence[tuple]) -> None:
    """Names of lines at their ends, moved apart where they would overlap."""
    if not ends:
        return
    axes.autoscale_view()
    shown = axes.transData + axes.transAxes.inverted()
    ends = sorted(ends)
    heights = [shown.transform((x, y))[1] for y, x, _ in ends]
    for i in range(1, len(ends)):
        heights[i] = max(heights[i], heights[i - 1] + _APART)
    top = 1.0
    for i in reversed(range(len(ends))):
        top = heights[i] = min(heights[i], top)
        top -= _APART
    for (y, x, name), height in zip(ends, heights):
        axes.annotate(
            results["cells"][name]["title"],
            (x, y),
            xytext=(1.02, height),
            textcoords=axes.transAxes,
            va="center",
            fontsize=9,
            color=_color(name),
            annotation_clip=False,
        )


def _percent(axes: Axes, along: str = "y") -> None:
    axis = axes.yaxis if along == "y" else axes.xaxis
    axis.set_major_formatter(lambda x, _: f"{round(100 * x, 2):g}%")


def _draw_points(
    axes: Axes,
    results: Results,
    names: Sequence[str],
    metric: str,
    title: str,
    *,
    named: bool = True,
) -> None:
    """A row a cell: its mean, 95 % interval, and pale the seeds."""
    style(axes, title, grid="x")
    names = _known(results, names)
    for row, name in enumerate(names):
        of_cell = results["cells"][name]["metrics"][metric]
        color = _color(name)
        seeds = of_cell["by_seed"]
        axes.plot(seeds, [row] * len(seeds), "o", color=color, alpha=0.3, ms=5, mew=0)
        axes.plot([of_cell["low"], of_cell["high"]], [row, row], color=color, lw=2)
        axes.plot(of_cell["value"], row, "o", color=color, ms=7)
        axes.annotate(
            f"{100 * of_cell['value']:.1f}",
            (of_cell["value"], row),
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            fontsize=8.5,
            color=INK,
        )
    titles = [results["cells"][name]["title"] for name in names]
    axes.set_yticks(range(len(names)), titles if named else [""] * len(names))
    axes.set_ylim(len(names) - 0.4, -0.7)
    if named:
        axes.tick_params(axis="y", labelcolor=INK)
    low, high = axes.get_xlim()
    axes.set_xlim(max(low, -0.05), min(high, 1.05))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    _percent(axes, "x")


def _draw_lengths(axes: Axes, results: Results, names: Sequence[str]) -> None:
    """A row a cell: from sequential steps to tokens of a response."""
    style(axes, "Steps in sequence ○ and tokens ●", grid="x")
    names = _known(results, names)
    for row, name in enumerate(names):
        metrics = results["cells"][name]["metrics"]
        steps, tokens = (
            metrics[metric]["value"] for metric in ("sequential_steps", "total_tokens")
        )
        color = _color(name)
        axes.plot([steps, tokens], [row, row], color=color, lw=2, alpha=0.4)
        axes.plot(tokens, row, "o", color=color, ms=7)
        axes.plot(steps, row, "o", color=color, ms=7, mfc="white", mew=1.8)
    axes.set_yticks(range(len(names)), [""] * len(names))
    axes.set_ylim(len(names) - 0.4, -0.7)
    axes.set_xlim(left=0)


def rewards(results: Results) -> Figure:
    """Table 4: blocks over training; accuracy and lengths at the end."""
    figure, axes = _panels(3)
    names = cells.MEMBERS["rewards"]
    _draw_ratio(axes[0], results, names)
    _draw_points(axes[1], results, names, "accuracy", "Held-out accuracy")
    _draw_lengths(axes[2], results, names)
    return figure


def curriculum(results: Results) -> Figure:
    """Table 3: accuracy and blocks at the end."""
    figure, axes = _panels(2, 4.0)
    names = cells.MEMBERS["curriculum"]
    _draw_points(axes[0], results, names, "accuracy", "Held-out accuracy")
    title = "Responses with a block"
    _draw_points(axes[1], results, names, "parallel_ratio", title, named=False)
    return figure


def position(results: Results) -> Figure:
    """Figure 3: where blocks start, over training, and how many there are."""
    figure, axes = _panels(2)
    names = ("late", "alternating")
    title = "Where blocks start"
    _draw_courses(axes[0], results, names, "position", title, from_zero=True)
    axes[0].set_ylabel("share of the response", color=FAINT, fontsize=9)
    _percent(axes[0])
    _draw_ratio(axes[1], results, names)
    return figure


def scaffold(results: Results) -> Figure:
    """Figure 4: accuracy and blocks over training, and accuracy at the end."""
    figure, axes = _panels(3)
    names = cells.MEMBERS["scaffold"]
    _draw_courses(axes[0], results, names, "accuracy", "Accuracy, in training")
    _percent(axes[0])
    _draw_ratio(axes[1], results, names)
    for one in axes[:2]:
        if results["switch"]:
            one.axvline(results["switch"] + 0.5, color=FAINT, lw=1, ls=":")
    _draw_points(axes[2], results, names, "accuracy", "Held-out accuracy", named=False)
    return figure


def shortcuts(results: Results) -> Figure:
    """What the published code's shortcuts cost: gap, accuracy, memory."""
    figure, axes = _panels(3)
    title = "Mean log-prob gap, sampler to trainer"
    axes[0].set_yscale("log")
    names = ("alternating", "forced", "causal_sampling")
    _draw_courses(axes[0], results, names, "gap_mean", title)
    names = cells.MEMBERS["shortcuts"]
    _draw_points(axes[1], results, names, "accuracy", "Held-out accuracy")
    style(axes[2], "Memory of attention (MB)")
    for name, color in (("dense", ORANGE), ("exact", BLUE)):
        tokens = [row["tokens"] for row in results["dense"]]
        size = [row[f"{name}_bytes"] / 1e6 for row in results["dense"]]
        if tokens:
            axes[2].loglog(tokens, size, color=color, lw=2, marker="o", ms=5)
            at = (tokens[-1], size[-1])
            label = {"xytext": (6, 0), "textcoords": "offset points", "va": "center"}
            axes[2].annotate(name, at, **label, fontsize=9, color=color)
            axes[2].set_xticks(tokens, map(str, tokens))
    axes[2].minorticks_off()
    axes[2].set_xlabel("tokens", color=FAINT, fontsize=9)
    return figure


FIGURES: dict[str, Callable[[Results], Figure]] = {
    "rewards": rewards,
    "curriculum": curriculum,
    "position": position,
    "scaffold": scaffold,
    "shortcuts": shortcuts,
}


def save(results: Results, experiments: Sequence[str], folder: pathlib.Path) -> None:
    """Writes `<experiment>.png` of each."""
    for name in experiments:
        path = folder / f"{name}.png"
        pictures.save(FIGURES[name](results), path, dots_per_inch=_DOTS_PER_INCH)
