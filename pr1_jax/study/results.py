"""What a study came to: responses to held-out problems, courses of training, about.

`Findings` holds all that claims are made of: of each cell the figures of every held-out
problem by seed, and of every RL step by seed. `summarize` makes of it what is published:
means with intervals (`intervals`), courses of training, rounded to three digits.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pr1_jax.study import cells, intervals, outcomes, runner
from pr1_jax.study.folder import Study
from pr1_jax.study.intervals import Interval
from pr1_jax.study.outcomes import POSITION

# Courses that are published, of the cells of which experiments.
_PUBLISHED = {
    "accuracy": ("scaffold",),
    "parallel_ratio": ("rewards", "position", "scaffold"),
    "gap_mean": ("shortcuts",),
    POSITION: ("position",),
}


@dataclasses.dataclass(frozen=True)
class Findings:
    """What the seeds that are finished came to.

    Attributes:
      problems: cell -> metric -> seed -> float [P], means over a problem's responses.
      courses: cell -> figure -> seed -> float [steps]; NaN where a step has none.
      dense: figures of `dense.compare`, by length.
      switch: the step after which the scaffold's reward is accuracy.
    """

    problems: Mapping[str, Mapping[str, Mapping[int, np.ndarray]]]
    courses: Mapping[str, Mapping[str, Mapping[int, np.ndarray]]]
    dense: Sequence[Mapping[str, float]] = ()
    switch: int = 0

    def combined(
        self, metric: str, weights: Mapping[str, float], constant: float = 0.0
    ) -> Interval | None:
        """A weighted sum of cells' metrics, by seed and problem, plus a constant.

        Of the seeds that all cells have; None if there are none.
        """
        by_cell = [self.problems.get(cell, {}).get(metric, {}) for cell in weights]
        seeds = sorted(set.intersection(*({*values} for values in by_cell)))
        if not seeds:
            return None
        total = sum(
            weight * np.array([values[seed] for seed in seeds])
            for weight, values in zip(weights.values(), by_cell)
        )
        return intervals.over_seeds_and_problems(total + constant)

    def change(
        self, cell: str, figure: str, early: slice, late: slice
    ) -> Interval | None:
        """How a course of training changes from some of its steps to others.

        None for less than two seeds, or where a seed has no such figure there.
        """
        by_seed = self.courses.get(cell, {}).get(figure, {})
        means = [
            [_mean(course[some]) for some in (early, late)]
            for course in by_seed.values()
        ]
        if not means or not np.isfinite(means).all():
            return None
        early_means, late_means = np.array(means).T
        return intervals.over_seeds(late_means - early_means)

    def course_mean(self, cell: str, figure: str) -> Interval | None:
        """The mean over all steps; None for less than two seeds."""
        by_seed = self.courses.get(cell, {}).get(figure, {})
        return intervals.over_seeds([_mean(course) for course in by_seed.values()])


def _mean(course: np.ndarray) -> float:
    known = course[np.isfinite(course)]
    return float(known.mean()) if len(known) else float("nan")


# --- Reading ------------------------------------------------------------------------


def read(study: Study) -> Findings:
    """All runs of a study that are finished, in their folders or as they are kept.

    Raises:
      ValueError: two runs were evaluated on different problems, or what is kept was
        made with other settings.
    """
    problems, courses, switch = {}, {}, 0
    asked: tuple[str, str] | None = None
    for name, cell in cells.CELLS.items():
        for seed in study.seeds:
            outcome, key = outcomes.read(study, cell, seed), f"{name} seed {seed}"
            if outcome is None:
                continue
            asked = asked or (key, outcome.questions)
            if outcome.questions != asked[1]:
                raise ValueError(
                    f"{key} was evaluated on other problems than {asked[0]}"
                )
            for figures, read_ in (
                (problems, outcome.problems),
                (courses, outcome.courses),
            ):
                for figure, values in read_.items():
                    figures.setdefault(name, {}).setdefault(figure, {})[seed] = values
            if name == "scaffold":
                switch = switch or outcome.switch
    return Findings(problems, courses, dense=outcomes.of_dense(study), switch=switch)


# --- Writing ------------------------------------------------------------------------


def summarize(findings: Findings, study: Study) -> dict[str, Any]:
    """Means with intervals, courses of training, and what each run took, as JSON."""
    took = runner.seconds(study)
    out = {}
    for name, by_metric in findings.problems.items():
        cell = cells.CELLS[name]
        seeds = sorted(by_metric["accuracy"])
        out[name] = {
            "title": cell.title,
            "kind": cell.kind,
            "seeds": seeds,
            "problems": len(by_metric["accuracy"][seeds[0]]),
            "seconds": [took.get(f"{name}/seed{seed}") for seed in seeds],
            "metrics": {
                metric: as_json(_cut(findings.combined(metric, {name: 1.0}), metric))
                | {"by_seed": [_round(x.mean()) for x in _values(values)]}
                for metric, values in by_metric.items()
            },
            "courses": {
                figure: [[_round(x, 3) for x in course] for course in _values(values)]
                for figure, values in findings.courses.get(name, {}).items()
                if _is_published(figure, name)
            },
        }
    return {"cells": out, "dense": list(findings.dense), "switch": findings.switch}


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


def _round(value: float, digits: int = 5) -> float | None:
    """So many digits that count; what is no number is None."""
    return float(f"{value:.{digits}g}") if np.isfinite(value) else None


def about(study: Study, command: str) -> dict[str, Any]:
    """What figures depend on: of what is kept, else of this machine and commit."""
    kept = [
        record["made"]
        for seed in study.seeds
        for record in outcomes.records(study, seed).values()
    ]
    made = {}
    for name, here in outcomes.made().items():
        of_runs = {each[name] for each in kept if name in each}
        made[name] = ", ".join(sorted(of_runs)) or here
    return {
        "command": command,
        "size": study.size,
        "seeds": list(study.seeds),
        "overrides": list(study.overrides),
        "cores": os.cpu_count(),
        **made,
    }
