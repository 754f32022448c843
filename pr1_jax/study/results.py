"""What runs came to: responses to held-out problems, courses of training, about.

`Found` holds all that claims are made of: of each cell the figures of every held-out
problem by seed, and of every RL step by seed. `summarize` makes of it what is published:
means with intervals (`intervals`), courses of training, rounded to four digits.
"""

import dataclasses
import importlib.metadata
import os
import pathlib
import platform
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pr1_jax import analysis, metrics
from pr1_jax.study import cells, intervals, runner
from pr1_jax.study.cells import Cell
from pr1_jax.study.intervals import Interval
from pr1_jax.study.runner import Study

# Figures of a response, by the field of its record.
_OF_RESPONSES = {
    "accuracy": lambda r: r["verdict"] == "correct",
    "parallel_ratio": lambda r: r["num_blocks"] > 0,
    "total_tokens": lambda r: r["total_tokens"],
    "sequential_steps": lambda r: r["sequential_steps"],
}
METRICS = tuple(_OF_RESPONSES)

# Figures of an RL step.
_OF_STEPS = {
    "accuracy": "rollout/accuracy",
    "parallel_ratio": "rollout/parallel_ratio",
    "gap_max": "rollout/logp_gap_max",
    "gap_mean": "rollout/logp_gap_mean",
}
POSITION = "position"  # and this one, of its responses
# Courses that are published, of the cells of which experiments.
_PUBLISHED = {
    "accuracy": ("scaffold",),
    "parallel_ratio": ("rewards", "position", "scaffold"),
    "gap_max": ("shortcuts",),
    "gap_mean": ("shortcuts",),
    POSITION: ("position",),
}


@dataclasses.dataclass(frozen=True)
class Found:
    """What was found at the seeds that are finished.

    Attributes:
      problems: cell -> metric -> seed -> float [P], means over a problem's responses.
      courses: cell -> figure -> seed -> float [steps]; NaN where a step has none.
      dense: what `dense.compare` found, by length.
      switch: the step after which the scaffold's reward is accuracy.
    """

    problems: Mapping[str, Mapping[str, Mapping[int, np.ndarray]]]
    courses: Mapping[str, Mapping[str, Mapping[int, np.ndarray]]]
    dense: Sequence[Mapping[str, float]] = ()
    switch: int = 0

    def mean(self, cell: str, metric: str, weight: float = 1.0) -> Interval | None:
        """A cell's metric; None if it has not been run."""
        return self.combined(metric, {cell: weight})

    def difference(self, metric: str, cell: str, other: str) -> Interval | None:
        """A cell's metric less another's, by seed and problem."""
        return self.combined(metric, {cell: 1.0, other: -1.0})

    def combined(
        self, metric: str, weights: Mapping[str, float], constant: float = 0.0
    ) -> Interval | None:
        """A weighted sum of cells' metrics, by seed and problem, plus a constant.

        Of the seeds that all cells have; None if there are none.
        """
        by_cell = [self.problems.get(cell, {}).get(metric, {}) for cell in weights]
        seeds = sorted(set.intersection(*({*found} for found in by_cell)))
        if not seeds:
            return None
        total = sum(
            weight * np.array([found[seed] for seed in seeds])
            for weight, found in zip(weights.values(), by_cell)
        )
        return intervals.over_seeds_and_problems(total + constant)

    def change(
        self, cell: str, figure: str, early: slice, late: slice
    ) -> Interval | None:
        """How a course of training changes from some of its steps to others.

        None for less than two seeds, or where a seed has no such figure there.
        """
        found = self.courses.get(cell, {}).get(figure, {})
        means = [
            [_mean(course[some]) for some in (early, late)] for course in found.values()
        ]
        if not means or not np.isfinite(means).all():
            return None
        early_means, late_means = np.array(means).T
        return intervals.over_seeds(late_means - early_means)

    def course_mean(self, cell: str, figure: str) -> Interval | None:
        """The mean over all steps; None for less than two seeds."""
        found = self.courses.get(cell, {}).get(figure, {})
        return intervals.over_seeds([_mean(course) for course in found.values()])


def _mean(course: np.ndarray) -> float:
    known = course[np.isfinite(course)]
    return float(known.mean()) if len(known) else float("nan")


# --- Reading ------------------------------------------------------------------------


def read(study: Study) -> Found:
    """All runs of a study that are finished.

    Raises:
      ValueError: two runs were evaluated on different problems.
    """
    problems: dict[str, dict[str, dict[int, np.ndarray]]] = {}
    courses: dict[str, dict[str, dict[int, np.ndarray]]] = {}
    asked: tuple[str, list[str]] | None = None
    for cell in cells.CELLS.values():
        for seed in study.seeds:
            workdir = study.workdir(cell, seed)
            if not runner.is_finished(workdir):
                continue
            questions, found = _responses(workdir, cell)
            asked = asked or (str(workdir), questions)
            if questions != asked[1]:
                raise ValueError(
                    f"{workdir} was evaluated on other problems than {asked[0]}"
                )
            _put(problems, cell.name, seed, found)
            if cell.kind == "rl":
                positions = cell.name in cells.MEMBERS["position"]
                _put(courses, cell.name, seed, _course(workdir, positions))
    scaffold = study.workdir(cells.CELLS["scaffold"], study.seeds[0]) / "config.json"
    config = metrics.read_json(scaffold, {"reward": {"scaffold_steps": 0}})
    return Found(
        problems,
        courses,
        dense=metrics.read_json(study.dense, []),
        switch=config["reward"]["scaffold_steps"],
    )


def _put(all_: dict, cell: str, seed: int, found: Mapping[str, np.ndarray]) -> None:
    for name, values in found.items():
        all_.setdefault(cell, {}).setdefault(name, {})[seed] = values


def _responses(
    workdir: pathlib.Path, cell: Cell
) -> tuple[list[str], dict[str, np.ndarray]]:
    """The held-out questions, and figures of the responses to them, [P] each."""
    if cell.kind == "evaluate":
        (mode,) = cell.changes["eval.modes"]
        path = workdir / "samples" / f"hard_{mode}.jsonl"
    else:
        path = workdir / "rollouts" / f"eval_1_{cell.kind}.jsonl"
    records = metrics.read_metrics(path)
    samples = metrics.read_json(workdir / "config.json", {})["eval"]["samples"]
    mean = lambda f: (
        np.array([f(r) for r in records], float).reshape(-1, samples).mean(1)
    )
    figures = {name: mean(figure) for name, figure in _OF_RESPONSES.items()}
    return [r["question"] for r in records[::samples]], figures


def _course(workdir: pathlib.Path, positions: bool) -> dict[str, np.ndarray]:
    """Figures of all RL steps, [steps] each."""
    lines = metrics.read_metrics(workdir / "metrics.jsonl")
    lines = [line for line in lines if line["stage"] == "rl"]
    number = lambda x: float("nan") if x is None else float(x)
    found = {
        name: np.array([number(line.get(key)) for line in lines])
        for name, key in _OF_STEPS.items()
    }
    if positions:
        steps = [
            analysis.relative_positions(
                metrics.read_metrics(
                    workdir / "rollouts" / f"rl_{line['step']:06d}.jsonl"
                )
            )
            for line in lines
        ]
        found[POSITION] = np.array([np.mean(x) if x else np.nan for x in steps])
    return found


# --- Writing ------------------------------------------------------------------------


def summarize(found: Found, study: Study) -> dict[str, Any]:
    """Means with intervals, courses of training, and what each run took, as JSON."""
    took = runner.seconds(study)
    out = {}
    for name, by_metric in found.problems.items():
        cell = cells.CELLS[name]
        seeds = sorted(by_metric["accuracy"])
        out[name] = {
            "title": cell.title,
            "kind": cell.kind,
            "seeds": seeds,
            "problems": len(by_metric["accuracy"][seeds[0]]),
            "seconds": [took.get(f"{name}/seed{seed}") for seed in seeds],
            "metrics": {
                metric: as_json(_cut(found.mean(name, metric), metric))
                | {"by_seed": [_round(x.mean()) for x in _values(values)]}
                for metric, values in by_metric.items()
            },
            "courses": {
                figure: [[_round(x, 4) for x in course] for course in _values(values)]
                for figure, values in found.courses.get(name, {}).items()
                if _is_published(figure, name)
            },
        }
    return {"cells": out, "dense": list(found.dense), "switch": found.switch}


def _cut(interval: Interval, metric: str) -> Interval:
    """A share's interval ends at 0 and 1."""
    if metric not in ("accuracy", "parallel_ratio"):
        return interval
    low, high = max(interval.low, 0.0), min(interval.high, 1.0)
    return interval._replace(low=low, high=high)


def _is_published(figure: str, name: str) -> bool:
    return any(name in cells.MEMBERS[experiment] for experiment in _PUBLISHED[figure])


def _values(by_seed: Mapping[int, np.ndarray]) -> list[np.ndarray]:
    return [by_seed[seed] for seed in sorted(by_seed)]


def as_json(interval: Interval) -> dict[str, float]:
    """An interval with its figures rounded."""
    value, low, high, seeds = interval
    return {"value": _round(value), "low": _round(low), "high": _round(high)} | {
        "number_of_seeds": seeds
    }


def _round(value: float, digits: int = 6) -> float | None:
    """So many digits that count; what is no number is None."""
    return float(f"{value:.{digits}g}") if np.isfinite(value) else None


def about(study: Study, command: str) -> dict[str, Any]:
    """What figures depend on, but for where they were made."""
    versions = {
        name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")
    }
    return {
        "command": command,
        "commit": _commit(),
        "size": study.size,
        "seeds": list(study.seeds),
        "overrides": list(study.overrides),
        "cores": os.cpu_count(),
        "processor": platform.machine(),
        "python": platform.python_version(),
        **versions,
    }


def _commit() -> str:
    """The commit that the working tree is at; `+ changes` where it differs from it."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        done = subprocess.run(
            command, cwd=runner.ROOT, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + (
            " + changes" if changed else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
