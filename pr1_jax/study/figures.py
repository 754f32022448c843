"""One picture an experiment, drawn from `results.json` and the optimum of the task.

Thick lines are means over seeds, thin ones and pale dots the seeds; points have 95 %
intervals. Grey lines are the optimum, hollow marks what arithmetic predicts (`border`).
"""

import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from pr1_jax.study import cells, optimum, outcomes
from pr1_jax.study.cells import FAIL, FOUR_PATHS, PAY, named
from pr1_jax.system import pictures
from pr1_jax.system.pictures import BLUE, FAINT, GREEN, GREY, INK, ORANGE, VIOLET, style

Results = Mapping[str, Any]

_DOTS_PER_INCH = 90
_COLORS = {
    "accuracy": ORANGE,
    "alternating20": "#7dd3fc",
    "alternating50": BLUE,
    "parallel_only": VIOLET,
    "latency": GREEN,
}
_DODGE = (-1.0, -0.5, 0.0, 0.5, 1.0)  # so that lines do not cover each other
_OF_LABELS = {"labels": BLUE, "even": GREEN, "plain": ORANGE}
_WORDS = {
    "labels": "paths with labels",
    "even": "with labels, traces without a habit",
    "plain": "paths without labels",
}


# --- Pieces ---------------------------------------------------------------------------


def _percent(axes: Axes, along: str = "y") -> None:
    axis = axes.yaxis if along == "y" else axes.xaxis
    axis.set_major_formatter(lambda x, _: f"{round(100 * x, 2):g}%")


def _share(axes: Axes, title: str, below: str) -> None:
    """A panel of shares from 0 to 1."""
    style(axes, title)
    axes.set_ylim(-0.03, 1.03)
    _percent(axes)
    axes.set_xlabel(below, color=FAINT, fontsize=9)


def _theory(axes: Axes, lines: Mapping[str, float]) -> None:
    """Grey lines with their names at the right."""
    for text, height in lines.items():
        axes.axhline(height, color=GREY, lw=1, ls="--", zorder=0)
        place = {"va": "top" if height > 0.95 else "bottom", "ha": "right"}
        across = axes.get_yaxis_transform()
        axes.text(1, height, text, **place, transform=across, fontsize=8, color=FAINT)


def _legend(figure: Figure, names: Mapping[str, str | Line2D]) -> None:
    """Names of colours and lines above all panels."""
    line = lambda x: Line2D([], [], color=x, lw=2) if isinstance(x, str) else x
    place = {"loc": "outside upper left", "ncols": 6, "frameon": False}
    text = {"fontsize": 9.5, "labelcolor": INK}
    figure.legend([*map(line, names.values())], [*names], **place, **text)


def _seeds(results: Results, name: str, metric: str) -> list[float]:
    """A cell's figure by seed, without those that have none."""
    found = results["cells"].get(name, {}).get("metrics", {}).get(metric, {})
    return [x for x in found.get("by_seed", ()) if x is not None]


def _draw_course(
    axes: Axes, results: Results, names: Sequence[str], figure: str, color: str
) -> None:
    """A line over RL steps through cells that follow each other; those that are known."""
    begin = 0
    for name in names:
        cell = results["cells"].get(name, {})
        rows = cell.get("courses", {}).get(figure, [])
        if not rows:
            return
        rows = np.array([row[: min(map(len, rows))] for row in rows], float)
        steps = np.arange(rows.shape[1]) + 0.5
        steps = begin + steps * cell["steps"] / rows.shape[1]
        begin += cell["steps"]
        known = np.isfinite(rows)
        mean = np.where(known, rows, 0).sum(0) / np.maximum(known.sum(0), 1)
        mean = np.where(known.any(0), mean, np.nan)
        axes.plot(steps, rows.T, color=color, lw=0.6, alpha=0.3)
        axes.plot(steps, mean, color=color, lw=2)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))


def _draw_points(
    axes: Axes,
    results: Results,
    names: Sequence[str],
    metric: str,
    title: str,
    *,
    titles: Sequence[str] | None = None,
) -> None:
    """A row a cell: its mean, 95 % interval, and pale the seeds."""
    style(axes, title, grid="x")
    for row, name in enumerate(names):
        if name not in results["cells"]:
            continue
        of_cell = results["cells"][name]["metrics"][metric]
        seeds = of_cell["by_seed"]
        axes.plot(seeds, [row] * len(seeds), "o", color=BLUE, alpha=0.3, ms=5, mew=0)
        axes.plot([of_cell["low"], of_cell["high"]], [row, row], color=BLUE, lw=2)
        axes.plot(of_cell["value"], row, "o", color=BLUE, ms=6)
        at = {"xytext": (0, 6), "textcoords": "offset points", "ha": "center"}
        text = f"{100 * of_cell['value']:.0f}"
        axes.annotate(text, (of_cell["value"], row), **at, fontsize=8.5, color=INK)
    axes.set_yticks(range(len(names)), titles or [""] * len(names))
    axes.set_ylim(len(names) - 0.4, -0.8)
    axes.tick_params(axis="y", labelcolor=INK)
    axes.set_xlim(-0.04, 1.04)
    _percent(axes, "x")


# --- Experiments ----------------------------------------------------------------------


def phase(results: Results) -> Figure:
    """Parallel ratio and accuracy after RL against the deadline, a line a reward."""
    figure = pictures.figure(2, 2, width=5.2, height=3.3)
    panels = figure.subplots(2, 2, squeeze=False)
    every = range(min(cells.DEADLINES) - 2, max(cells.DEADLINES) + 3)
    pays = [d for d in every if optimum.alike(d, 2) > optimum.lone(d)]
    best = {
        "optimum: lone search": (optimum.lone, ":"),
        "random rows": (lambda d: optimum.alike(d, 2), "--"),
        "divided rows": (lambda d: optimum.divided(d, 2), "-"),
    }
    for column, labels in zip(panels.T, cells.LABELS):
        below = "deadline (sequential steps)"
        _share(column[0], f"Responses with a block, {_WORDS[labels]}", below)
        _share(column[1], f"Held-out accuracy, {_WORDS[labels]}", below)
        column[0].axvspan(pays[0] - 0.5, pays[-1] + 0.5, color=GREY, alpha=0.15, lw=0)
        text = {"ha": "center", "fontsize": 8, "color": FAINT}
        middle = sum(cells.DEADLINES[1:3]) / 2
        column[0].text(middle, 0.2, "blocks of random\nrows see more", **text)
        for of, dashes in [*best.values()][: 3 if labels == "labels" else 2]:
            heights = [of(deadline) for deadline in every]
            column[1].plot(every, heights, dashes, color=GREY, lw=1.5, zorder=0)
        for axes, metric in zip(column, outcomes.SHARES[::-1]):
            _draw_deadlines(axes, results, labels, metric)
        for i, name in enumerate(_COLORS):
            ratios = [of["ratios"].get(name) for of in results["theory"].values()]
            if ratios[0] is not None:
                at = [deadline + _DODGE[i] for deadline in cells.DEADLINES]
                mark = {"color": _COLORS[name], "mfc": "white", "ms": 9, "zorder": 1}
                column[0].plot(at, [of_both[1] for of_both in ratios], "D", **mark)
    lines = {of.title: _COLORS[name] for name, of in cells.REWARDS.items()}
    grey = functools.partial(Line2D, [], [], color=GREY, mfc="white", ms=7)
    theory = {text: grey(ls=dashes) for text, (_, dashes) in best.items()}
    theory["predicted"] = grey(marker="D", ls="")
    _legend(figure, {"after SFT": INK} | lines | theory)
    return figure


def _draw_deadlines(axes: Axes, results: Results, labels: str, metric: str) -> None:
    """Lines over deadlines: after SFT, and after RL with each reward."""
    lines = [("accuracy", f"before_{metric}", INK, 0.0)]
    lines += [
        (reward, metric, color, _DODGE[i])
        for i, (reward, color) in enumerate(_COLORS.items())
    ]
    for reward, of, color, aside in lines:
        by_deadline = {
            deadline + aside: _seeds(results, named(reward, deadline, labels), of)
            for deadline in cells.DEADLINES
        }
        known = {at: seeds for at, seeds in by_deadline.items() if seeds}
        means, width = [*map(np.mean, known.values())], 1.2 if color == INK else 2
        axes.plot([*known], means, color=color, lw=width, marker="o", ms=4)
        for at, seeds in known.items():
            dots = {"color": color, "ms": 3, "alpha": 0.4, "mew": 0}
            axes.plot([at] * len(seeds), seeds, "o", **dots)
    axes.set_xticks(cells.DEADLINES)


def division(results: Results) -> Figure:
    """Work of two and of four paths over training, with labels and without."""
    figure = pictures.figure(2, 3, width=3.8, height=2.8)
    panels = figure.subplots(2, 3, squeeze=False)
    rows = (("accuracy", "two", 2, PAY), ("accuracy4", "four", 4, FOUR_PATHS))
    for row, (name, words, paths, deadline) in zip(panels, rows):
        figures = {
            "accuracy": f"Accuracy, {words} paths, {deadline} steps",
            "work_division": "Distinct work of paths",
            "identical_paths": "Blocks with identical paths",
        }
        for axes, (metric, title) in zip(row, figures.items()):
            _share(axes, title, "RL step")
            for labels, color in _OF_LABELS.items():
                begun = f"{name}_{deadline}_{labels}"
                names = [begun, f"{begun}_then_accuracy"]
                _draw_course(axes, results, names, metric, color)
        best = {
            "lone search": optimum.lone(deadline, paths),
            "random rows": optimum.alike(deadline, paths),
            "divided rows": optimum.divided(deadline, paths),
        }
        _theory(row[0], best)
    _legend(figure, {_WORDS[labels]: color for labels, color in _OF_LABELS.items()})
    return figure


def tables(results: Results) -> Figure:
    """The paper's tables 3 and 4 and figure 3, at two deadlines."""
    figure = pictures.figure(2, 3, width=4.2, height=4.6)
    panels = figure.subplots(2, 3, squeeze=False)
    for row, deadline in zip(panels, (PAY, FAIL)):
        names = cells.table_members(deadline)
        after = f", {deadline} steps"
        titles = [cells.CELLS[name].title.removesuffix(after) for name in names]
        title = f"Accuracy, {deadline} steps"
        _draw_points(row[0], results, names, "accuracy", title, titles=titles)
        pays = "blocks pay" if deadline == PAY else "blocks do not pay"
        row[0].set_ylabel(pays, color=INK, fontsize=11)
        _draw_points(row[1], results, names, "parallel_ratio", "Responses with a block")
        style(row[2], "Where late blocks start")
        late = [f"late_{deadline}"]
        _draw_course(row[2], results, late, outcomes.POSITION, BLUE)
        row[2].set_ylim(bottom=0)
        row[2].set_xlabel("RL step", color=FAINT, fontsize=9)
        _percent(row[2])
    return figure


def scaffold(results: Results) -> Figure:
    """Accuracy and blocks over two stages, of which the second is accuracy alone."""
    shown = [key for key in cells.SCAFFOLDS if key[0] != PAY]
    figure = pictures.figure(2, len(shown), width=3.1, height=2.8)
    panels = figure.subplots(2, len(shown), squeeze=False)
    for column, (deadline, labels) in zip(panels.T, shown):
        where = f"{deadline} steps, {'labels' if labels == 'labels' else 'no labels'}"
        _share(column[0], where, "")
        _share(column[1], "", "RL step")
        for first in cells.SCAFFOLDS[deadline, labels]:
            names = [named(first, deadline, labels, then=x) for x in (False, True)]
            for axes, metric in zip(column, outcomes.SHARES):
                _draw_course(axes, results, names, metric, _COLORS[first])
        begun = named("accuracy", deadline, labels)
        for axes in column:
            if steps := results["cells"].get(begun, {}).get("steps"):
                axes.axvline(steps, color=FAINT, lw=1, ls=":")
        lines = {"lone search": optimum.lone(deadline)}
        if labels == "labels":
            lines["divided rows"] = optimum.divided(deadline, 2)
        else:
            lines["random rows"] = optimum.alike(deadline, 2)
        _theory(column[0], lines)
    for axes, text in zip(panels[:, 0], ("accuracy", "with a block")):
        axes.set_ylabel(text, color=INK, fontsize=10)
    firsts = dict.fromkeys(x for key in shown for x in cells.SCAFFOLDS[key])
    _legend(figure, {f"{cells.REWARDS[x].title} first": _COLORS[x] for x in firsts})
    return figure


def shortcuts(results: Results) -> Figure:
    """What the published code's shortcuts cost: gap, accuracy, memory."""
    figure = pictures.figure(1, 3, width=4.3, height=3.4)
    axes = figure.subplots(1, 3, squeeze=False)[0]
    style(axes[0], "Mean log-prob gap, sampler to trainer")
    axes[0].set_yscale("log")
    exact, *_ = cells.MEMBERS["shortcuts"]
    colors = {exact: BLUE, "forced": ORANGE, "causal_sampling": VIOLET}
    for name, color in colors.items():
        _draw_course(axes[0], results, [name], outcomes.GAP, color)
    axes[0].set_xlabel("RL step", color=FAINT, fontsize=9)
    names = cells.MEMBERS["shortcuts"]
    short = lambda name: cells.CELLS[name].title.removesuffix(f", {PAY} steps")
    titles = [*map(short, names)]
    _draw_points(axes[1], results, names, "accuracy", "Accuracy", titles=titles)
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
    _legend(figure, {short(name): color for name, color in colors.items()})
    return figure


def planned(results: Results) -> Figure:
    """Planned blocks against the deadline: paths, accuracy, tokens, steps."""
    figure = pictures.figure(2, 2, width=5.2, height=3.0)
    axes = figure.subplots(2, 2).ravel()
    theory = {int(d): of for d, of in results["planned_theory"].items()}
    titles = {
        outcomes.SEARCHES: "Searches at once: paths of a block, or one",
        "accuracy": "Held-out accuracy",
        "total_tokens": "Tokens of a response, all paths",
        "sequential_steps": "Sequential steps",
    }
    cells_of = {
        "planned": (lambda d: cells.planned_name("accuracy", d), BLUE),
        "planned, latency rewarded": (
            lambda d: cells.planned_name("latency", d),
            GREEN,
        ),
        "four labelled paths, no plans": (cells.labelled_name, ORANGE),
    }
    for panel, (metric, title) in zip(axes, titles.items()):
        style(panel, title)
        panel.set_xticks(cells.PLANNED)
        panel.set_xlabel("deadline (sequential steps)", color=FAINT, fontsize=9)
        for name_of, color in cells_of.values():
            known = {d: _seeds(results, name_of(d), metric) for d in cells.PLANNED}
            known = {d: seeds for d, seeds in known.items() if seeds}
            means = [*map(np.mean, known.values())]
            panel.plot([*known], means, color=color, lw=2, marker="o", ms=4)
            for d, seeds in known.items():
                dots = {"color": color, "ms": 3, "alpha": 0.4, "mew": 0}
                panel.plot([d] * len(seeds), seeds, "o", **dots)
    mark = {"color": GREY, "mfc": "white", "ms": 9, "zorder": 0}
    for deadline, of in theory.items():
        axes[0].plot([deadline] * len(of["paths"]), of["paths"], "D", **mark)
        axes[1].plot(deadline, of["best"], "D", **mark)
    axes[0].set_ylim(0.8, 4.2)
    axes[1].set_ylim(-0.03, 1.03)
    _percent(axes[1])
    best = Line2D([], [], color=GREY, mfc="white", ms=7, marker="D", ls="")
    lines = {words: color for words, (_, color) in cells_of.items()}
    _legend(figure, lines | {"optimum of planned blocks": best})
    return figure


FIGURES: dict[str, Callable[[Results], Figure]] = {
    "phase": phase,
    "division": division,
    "tables": tables,
    "scaffold": scaffold,
    "shortcuts": shortcuts,
    "planned": planned,
}


def save(results: Results, experiments: Sequence[str], folder: pathlib.Path) -> None:
    """Writes `<experiment>.png` of each."""
    for name in experiments:
        path = folder / f"{name}.png"
        pictures.save(FIGURES[name](results), path, dots_per_inch=_DOTS_PER_INCH)
