"""One picture of a run: `curves.png`, drawn from `metrics.jsonl`.

Small multiples over the steps of training, and the held-out accuracy of each
evaluation as bars. Stages of a kind (two RL stages, say) follow each other on
one axis. A panel without data is left out. Matplotlib's figure is used without
pyplot, so nothing global is touched and no display is needed.
"""

import dataclasses
import io
import itertools
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from pr1_jax.system import files
from pr1_jax.workdir import metrics

_COLUMNS = 3
_DOTS_PER_INCH = 100
_COLORS = ("#2563eb", "#e8710a")
_PALE, _SHADE = "#93b4f4", "#fde68a"
_INK, _FAINT, _GRID = "#1f2937", "#6b7280", "#e5e7eb"
_SFT, _RL = "loss/sft", "reward/mean"  # the figure that tells a stage's kind


@dataclasses.dataclass(frozen=True)
class _Panel:
    """What one panel draws: figures (metric, name in the legend) of one kind."""

    title: str
    kind: str
    figures: tuple[tuple[str, str], ...]
    scale: str = "linear"  # linear, log, percent or count
    smooth: bool = True


_PANELS = (
    _Panel("SFT loss", _SFT, ((_SFT, ""),)),
    _Panel("RL reward", _RL, ((_RL, ""),)),
    _Panel("Rollout accuracy", _RL, (("rollout/accuracy", ""),), "percent"),
    _Panel(
        "Parallel ratio (responses with a block)",
        _RL,
        (("rollout/parallel_ratio", ""),),
        "percent",
    ),
    _Panel(
        "Length of a response",
        _RL,
        (
            ("rollout/total_tokens", "tokens"),
            ("rollout/sequential_steps", "sequential steps"),
        ),
        "count",
    ),
    _Panel("Policy entropy (nats per token)", _RL, (("policy/entropy", ""),)),
    _Panel(
        "Log-prob gap, sampler to trainer",
        _RL,
        (("rollout/logp_gap_max", "largest"), ("rollout/logp_gap_mean", "mean")),
        "log",
        smooth=False,
    ),
    _Panel("Tokens per second", _RL, (("perf/tokens_per_sec", ""),), "count"),
)


@dataclasses.dataclass(frozen=True)
class _Track:
    """The lines of all stages of one kind, laid end to end.

    Attributes:
      steps: [N] steps counted through, from the first stage on.
      records: the N lines.
      stages: for each stage its name and the slice of its lines.
    """

    steps: np.ndarray
    records: Sequence[dict[str, Any]]
    stages: Sequence[tuple[str, slice]]

    def figure(self, name: str) -> np.ndarray:
        """Returns a metric as float [N], NaN where a line lacks it."""
        values = [record.get(name) for record in self.records]
        return np.array([np.nan if v is None else v for v in values], float)


def _track(records: Sequence[dict[str, Any]], kind: str) -> _Track:
    chosen = [record for record in records if kind in record]
    steps, stages = [], []
    for stage, lines in itertools.groupby(chosen, key=lambda record: record["stage"]):
        first, offset = len(steps), steps[-1] if steps else 0
        steps += [offset + line["step"] for line in lines]
        stages.append((stage, slice(first, len(steps))))
    return _Track(np.array(steps, int), chosen, stages)


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Centred moving mean over about a twelfth of the points, NaN left out."""
    width = 2 * max(len(values) // 24, 1) + 1
    known = np.isfinite(values)
    total = np.convolve(np.where(known, values, 0.0), np.ones(width), "same")
    count = np.convolve(known, np.ones(width), "same")
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _short(value: float, _position: int | None = None) -> str:
    """12500.0 -> '12.5k'."""
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:g}"


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", color=_INK)
    axes.grid(axis="y", color=_GRID, linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", labelsize=11, colors=_FAINT, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)


def _set_scale(axes: Axes, scale: str) -> None:
    if scale == "log":
        axes.set_yscale("log")
    elif scale == "percent":
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    elif scale == "count":
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(FuncFormatter(_short))


def _shade_tiered(axes: Axes, track: _Track) -> None:
    """Shades the steps whose reward was `tiered`."""
    tiered = track.steps[track.figure("reward/tiered") == 1.0]
    runs = np.split(tiered, np.flatnonzero(np.diff(tiered) > 1) + 1)
    for run in (run for run in runs if len(run)):
        axes.axvspan(run[0] - 0.5, run[-1] + 0.5, color=_SHADE, alpha=0.55, lw=0)


def _mark_stages(axes: Axes, track: _Track) -> None:
    """Names the stages: under the axis if there is one, else where each starts."""
    if len(track.stages) == 1:
        axes.set_xlabel(f"step of {track.stages[0][0]}", color=_FAINT)
        return
    axes.set_xlabel("step", color=_FAINT)
    for stage, lines in track.stages:
        start = track.steps[lines.start] - 0.5
        axes.axvline(start, color=_FAINT, linewidth=1, linestyle=":")
        axes.annotate(
            stage,
            (start, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(4, -4),
            textcoords="offset points",
            va="top",
            fontsize=10,
            color=_FAINT,
        )


def _drawable(panel: _Panel, track: _Track, name: str) -> np.ndarray:
    """Returns a metric as float [N], NaN where there is nothing to draw."""
    values = track.figure(name)
    return np.where(values > 0, values, np.nan) if panel.scale == "log" else values


def _draw_line(
    axes: Axes, steps: np.ndarray, values: np.ndarray, smooth: bool, color: str
) -> None:
    """Draws one metric over one stage, smoothed unless there is little of it."""
    few = len(values) <= 8
    if smooth and not few:
        axes.plot(steps, values, color=color, linewidth=1, alpha=0.3)
        values = _smoothed(values)
    marker = "o" if few else None
    axes.plot(steps, values, color=color, linewidth=2.2, marker=marker)


def _draw_panel(axes: Axes, panel: _Panel, track: _Track) -> None:
    _style(axes, panel.title)
    _shade_tiered(axes, track)
    for (name, label), color in zip(panel.figures, _COLORS, strict=False):
        values = _drawable(panel, track, name)
        if np.isnan(values).all():
            continue
        for _, lines in track.stages:
            _draw_line(axes, track.steps[lines], values[lines], panel.smooth, color)
        axes.plot([], [], color=color, linewidth=2.2, label=label)
    _set_scale(axes, panel.scale)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    _mark_stages(axes, track)
    if len(panel.figures) > 1:
        axes.legend(frameon=False, fontsize=11, labelcolor=_INK)


def _evaluations(records: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns the last line with an accuracy of each stage, in order, by name."""
    found = {}
    for record in records:
        if record.get("eval/accuracy") is not None:
            found[re.sub(r"^eval_\d+_", "after\n", record["stage"])] = record
    return {name.replace("after\nbase", "base"): line for name, line in found.items()}


def _draw_bar(axes: Axes, place: float, line: dict, name: str, **style) -> None:
    """Draws metric `name` of an evaluation, its interval and its value."""
    value, low, high = line[name], line.get(f"{name}_low"), line.get(f"{name}_high")
    axes.bar(place, value, **style)
    if low is not None and high is not None:
        # The value can lie outside its interval by rounding only.
        error = [[max(value - low, 0)], [max(high - value, 0)]]
        axes.errorbar(place, value, error, ecolor=_INK, elinewidth=1.5, capsize=4)
    axes.annotate(
        f"{100 * value:.0f}%",
        (place, max(value, high or 0)),
        xytext=(0, 4),
        textcoords="offset points",
        ha="center",
        fontsize=11,
        color=_INK,
    )


def _draw_evaluations(axes: Axes, evaluations: dict[str, dict[str, Any]]) -> None:
    """Draws each evaluation's accuracy, beside it that with `<Parallel>` banned."""
    _style(axes, "Held-out accuracy, 95 % interval")
    banned_name, paired = "eval/accuracy_banned", False
    for place, line in enumerate(evaluations.values()):
        pair = line.get(banned_name) is not None
        width, shift = (0.38, 0.2) if pair else (0.55, 0.0)
        bars = {"width": width, "color": _COLORS[0]}
        _draw_bar(axes, place - shift, line, "eval/accuracy", **bars)
        if pair:
            bars["color"] = _PALE
            _draw_bar(axes, place + shift, line, banned_name, **bars)
        paired |= pair
    if paired:
        for color, name in ((_COLORS[0], "blocks allowed"), (_PALE, "blocks banned")):
            axes.bar(0, 0, color=color, label=name)
        axes.legend(frameon=False, fontsize=11, labelcolor=_INK, loc="upper left")
    _set_scale(axes, "percent")
    axes.set_ylim(0, 1.3 if paired else 1.12)
    axes.set_yticks(np.linspace(0, 1, 6))
    axes.set_xticks(range(len(evaluations)), list(evaluations))
    axes.set_xlim(-0.6, len(evaluations) - 0.4)


def plot_curves(workdir: str | os.PathLike[str]) -> pathlib.Path:
    """Draws `curves.png` from `metrics.jsonl`, both in `workdir`.

    Returns:
      The path of the picture, 1600 pixels wide.
    """
    workdir = pathlib.Path(workdir)
    records = metrics.read_metrics(workdir / "metrics.jsonl")
    tracks = {kind: _track(records, kind) for kind in (_SFT, _RL)}
    panels = []
    for panel in _PANELS:
        track = tracks[panel.kind]
        drawable = [_drawable(panel, track, name) for name, _ in panel.figures]
        if np.isfinite(drawable).any():
            panels.append(panel)
    evaluations = _evaluations(records)

    count = max(len(panels) + bool(evaluations), 1)
    columns = min(_COLUMNS, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(16, 0.6 + 3.9 * rows), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, panel in zip(grid, panels, strict=False):
        _draw_panel(axes, panel, tracks[panel.kind])
    if evaluations:
        _draw_evaluations(grid[len(panels)], evaluations)
    for axes in grid[len(panels) + bool(evaluations) :]:
        axes.set_axis_off()
    title = workdir.resolve().name if records else f"{workdir}: no metrics yet"
    if (tracks[_RL].figure("reward/tiered") == 1.0).any():
        title += "    (shaded: steps with the tiered reward)"
    figure.suptitle(title, fontsize=13, color=_FAINT, x=0.01, ha="left")

    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=_DOTS_PER_INCH, facecolor="white")
    path = workdir / "curves.png"
    files.replace_file(path, image.getvalue())
    return path
