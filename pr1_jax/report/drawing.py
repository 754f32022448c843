"""Pictures of single responses, for notebooks: fork and join, mask, cache.

All take a `trace`, as `rollouts/*.jsonl` holds it, and draw on the axes or the figure
that they are given. Positions are time, as in the structured variant.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from pr1_jax import layout
from pr1_jax.system.pictures import BLUE as ACCENT
from pr1_jax.system.pictures import FAINT, INK

Trace = Mapping[str, Any]

PALE, LINE = "#e8effe", "#d1d5db"
_SURPRISE = 2.5  # nats below which a token has the full accent
_LANE, _BOX = 1.0, 0.9  # widths, in lanes
_ROW_INCHES, _LANE_INCHES = 0.205, 0.98


def shown(piece: str) -> str:
    """How a token is printed: a newline as an arrow, other white space left out.

    A dollar sign does not begin a formula, and half a surrogate pair is no character.
    """
    plain = piece.encode("utf-8", "replace").decode()
    return plain.replace("\n", "⏎").strip().replace("$", r"\$")


def order_of_writing(trace: Trace) -> np.ndarray:
    """Indices [T] of a structured response's tokens in the order they were written.

    Positions are time there: paths write side by side, the first path first. It is also
    the order of cache slots.

        >>> order_of_writing({"positions": [0, 1, 2, 1, 3], "path": [0, 1, 1, 2, 0]})
        array([0, 1, 3, 2, 4])
    """
    return np.lexsort((trace["path"], trace["positions"]))


def visibility(trace: Trace) -> np.ndarray:
    """Which tokens of a response see which, bool [T, T] (query, key)."""
    labels = (np.array(trace[n], np.int32) for n in ("positions", "block", "path"))
    return layout.visible(layout.Layout(*labels))


def shade(logp: float | None) -> tuple[float, float, float]:
    """Pale for a token that was certain, the accent for one that surprises."""
    share = 1.0 if logp is None else min(-logp / _SURPRISE, 1.0)
    pale, accent = np.array(to_rgb(PALE)), np.array(to_rgb(ACCENT))
    return tuple(pale + (accent - pale) * max(share, 0.0))


def _cells(trace: Trace) -> list[tuple[float, int]]:
    """Lane, 0 in the middle, and row of each token."""
    block, path = np.array(trace["block"], int), np.array(trace["path"], int)
    paths = np.ones(block.max(initial=0) + 1, int)
    np.maximum.at(paths, block, path)
    lanes = np.where(path > 0, path - (paths[block] + 1) / 2, 0.0)
    rows = np.array(trace["positions"], int) - trace["prompt_tokens"]
    return list(zip(lanes.tolist(), rows.tolist()))


def draw_response(axes: Axes, trace: Trace, *, title: str = "") -> None:
    """Draws a structured response: time runs down, paths stand side by side.

    A filled box is a token that the model drew, the darker the less likely it was; an
    empty one was written by the runtime and is not trained on.
    """
    cells = _cells(trace)
    _draw_threads(axes, trace, cells)
    fields = zip(cells, trace["pieces"], trace["logps"], trace["forced"])
    for (lane, row), piece, logp, forced in fields:
        color = "white" if forced else shade(logp)
        dark = not forced and np.dot(color, (0.3, 0.6, 0.1)) < 0.62
        axes.add_patch(
            FancyBboxPatch(
                (lane * _LANE - _BOX / 2 + 0.05, row + 0.14),
                _BOX - 0.1,
                0.72,
                boxstyle="round,pad=0,rounding_size=0.07",
                mutation_aspect=_LANE_INCHES / _ROW_INCHES / 2,
                facecolor=color,
                edgecolor=LINE if forced else color,
                linewidth=1,
            )
        )
        axes.text(
            lane * _LANE,
            row + 0.52,
            shown(piece),
            ha="center",
            va="center",
            fontsize=8.5 if len(shown(piece)) < 9 else 7.4,
            color=FAINT if forced else "white" if dark else INK,
            clip_on=True,
        )
    widest = max((abs(lane) for lane, _ in cells), default=0.0) + 0.55
    axes.set(xlim=(-widest, widest), ylim=(_rows(trace), 0))
    axes.axis("off")
    axes.set_title(title, fontsize=10.5, fontweight="bold", color=INK, pad=7)


def _rows(trace: Trace) -> int:
    return max((row for _, row in _cells(trace)), default=0) + 1


def _draw_threads(axes: Axes, trace: Trace, cells: Sequence[tuple[float, int]]) -> None:
    """Lines along each stream, from a fork to its paths and from them to the join."""
    line = {"color": LINE, "linewidth": 1.2, "zorder": 0, "solid_capstyle": "round"}
    block, path = trace["block"], trace["path"]
    before: dict[tuple[int, int], tuple[float, int]] = {}
    main = None
    for (lane, row), b, p in zip(cells, block, path):
        if b and (b, p) in before:
            starts = [before[b, p]]
        elif b or not before:
            starts = [main] if main else []
        else:
            starts, before = list(before.values()), {}
        for x, y in starts:
            axes.plot(
                [x, x, lane], [y + 0.5, max(row - 0.15, y + 0.5), row + 0.5], **line
            )
        if b:
            before[b, p] = lane, row
        else:
            main = lane, row


def draw_responses(
    figure: Figure, traces: Sequence[Trace], titles: Sequence[str]
) -> None:
    """Draws several responses side by side, on a figure that is made to fit them."""
    widths = [2 * max(abs(lane) for lane, _ in _cells(t)) + 1.3 for t in traces]
    rows = max(map(_rows, traces))
    lines = 1 + max(title.count("\n") for title in titles)
    figure.set_size_inches(
        _LANE_INCHES * sum(widths), _ROW_INCHES * (rows + lines) + 0.3
    )
    figure.set_facecolor("white")
    figure.set_layout_engine("constrained")
    panels = figure.subplots(1, len(traces), width_ratios=widths, squeeze=False)[0]
    for axes, trace, title in zip(panels, traces, titles, strict=True):
        draw_response(axes, trace, title=title)
        axes.set_ylim(rows, 0)


def draw_mask(axes: Axes, trace: Trace) -> None:
    """Draws who sees whom in a response: a row a query, a column a key.

    The prompt is left out: all tokens see it.
    """
    seen = visibility(trace)
    N = len(seen)
    hidden = np.tril(np.ones((N, N), bool)) & ~seen
    image = np.ones((N, N, 3))
    image[seen], image[hidden] = to_rgb("#dbe6fd"), to_rgb(ACCENT)
    axes.imshow(image, interpolation="none")
    for n in range(N + 1):  # a fine grid, so that a token can be followed
        axes.plot([n - 0.5] * 2, [-0.5, N - 0.5], color="white", lw=0.7)
        axes.plot([-0.5, N - 0.5], [n - 0.5] * 2, color="white", lw=0.7)
    for n, piece in enumerate(trace["pieces"]):
        axes.text(n + 0.8, n, shown(piece), va="center", fontsize=8, color=INK)
    if hidden.any():
        y, x = np.argwhere(hidden).mean(axis=0)
        middle = {"ha": "center", "va": "center", "color": "white"}
        middle["bbox"] = {"facecolor": ACCENT, "linewidth": 0, "pad": 1}
        axes.text(x, y, "hidden", **middle)
    axes.set(xlim=(-0.5, N + 4), ylim=(N - 0.5, -0.5))
    axes.axis("off")


def draw_positions(axes: Axes, trace: Trace) -> None:
    """Draws rotary positions over canonical order, beside those of a plain response."""
    positions, path = np.array(trace["positions"]), np.array(trace["path"])
    index = np.arange(len(positions))
    first = trace["prompt_tokens"]
    axes.plot(index, first + index, color=LINE, linewidth=1.5, zorder=0)
    middle = 2 * len(index) // 3
    above = (middle - 0.5, first + middle + 1)
    axes.annotate("as in the causal variant", above, ha="right", color=FAINT)
    axes.scatter(index[path == 0], positions[path == 0], s=22, color=INK)
    axes.scatter(index[path > 0], positions[path > 0], s=22, color=ACCENT)
    for p in range(1, path.max(initial=0) + 1):
        last = index[path == p][-1]
        where = (last, positions[last] - 2.5)
        axes.annotate(f"path {p}", where, ha="center", va="top", color=ACCENT)
    axes.set_xlabel("token, canonical order", color=FAINT)
    axes.set_ylabel("position", color=FAINT)
    axes.tick_params(length=0, colors=FAINT)
    axes.grid(axis="y", color=LINE, linewidth=0.6, alpha=0.6)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(LINE)


def draw_cache(axes: Axes, trace: Trace) -> None:
    """Draws the slots of the cache below the tokens in canonical order."""
    order = order_of_writing(trace)
    slot = np.argsort(order)
    path = np.array(trace["path"])
    colors = {0: "#9ca3af", 1: ACCENT, 2: "#93b4f4"}
    color = lambda n: colors.get(int(path[n]), "#c7d7fa")
    for n, index in enumerate(slot):
        for x, y in ((n, 1.6), (index, 0)):
            axes.add_patch(Rectangle((x + 0.06, y), 0.88, 0.36, color=color(n), lw=0))
        middles = [n + 0.5, index + 0.5]
        axes.plot(middles, [1.56, 0.4], color=color(n), linewidth=0.9, alpha=0.8)
    for n, piece in enumerate(trace["pieces"]):
        at = {"rotation": 90, "ha": "center", "fontsize": 7.5, "color": INK}
        axes.text(n + 0.5, 2.05, shown(piece), va="bottom", **at)
        axes.text(slot[n] + 0.5, -0.1, shown(piece), va="top", **at)
    for y, name in ((1.78, "canonical order "), (0.18, "slots, as written ")):
        axes.text(-0.2, y, name, ha="right", va="center", color=FAINT, fontsize=9)
    axes.set(xlim=(-6, len(slot) + 0.3), ylim=(-1.6, 3.6))
    axes.axis("off")
