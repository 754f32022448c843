"""What a study came to: responses to held-out problems, courses of training, about.

`Findings` holds all that claims are made of: of each cell the metrics of every held-out
problem by seed, and courses of RL by seed. `summarize` makes of it what is published:
means with intervals (`intervals`), the figures of every seed, courses of those cells that
pictures show them of, and the optimum beside them.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pr1_jax.study import border, cells, intervals, optimum, outcomes, runner
from pr1_jax.study.folder import Study
from pr1_jax.study.intervals import Interval

_DIGITS, _POINTS = 3, 15  # that are published, of figures and of courses
_DIVIDED = 0.8  # of the work; at random rows two paths come to 0.5, four to 0.6
_PUBLISHED = {  # courses, by experiment
    "division": ("accuracy", *outcomes.OF_BLOCKS),
    "scaffold": ("accuracy", "parallel_ratio"),
    "shortcuts": (outcomes.GAP,),
    "tables": (outcomes.POSITION,),
    "planned": ("accuracy", "parallel_ratio", outcomes.PATHS),
}


@dataclasses.dataclass(frozen=True)
class Findings:
    """What the runs that are finished came to.

    Attributes:
      problems: cell -> metric -> seed -> float [P], means over a problem's responses, or
        [1] where it is known of all together.
      courses: cell -> figure -> seed -> float [points]; NaN where a point has none.
      steps: cell -> steps of RL.
      dense: figures of `dense.compare`, by length.
    """

    problems: Mapping[str, Mapping[str, Mapping[int, np.ndarray]]]
    courses: Mapping[str, Mapping[str, Mapping[int, np.ndarray]]]
    steps: Mapping[str, int] = dataclasses.field(default_factory=dict)
    dense: Sequence[Mapping[str, float]] = ()

    def combined(
        self, terms: Mapping[tuple[str, str], float], constant: float = 0.0
    ) -> Interval | None:
        """A weighted sum of metrics, by seed and problem, plus a constant.

        Of the seeds that all of its cells have; None if there are none, or where a
        metric is not defined at one of them.

        Args:
          terms: weights by (metric, cell).
        """
        values = [self.problems.get(cell, {}).get(of, {}) for of, cell in terms]
        seeds = sorted(set.intersection(*map(set, values)))
        if not seeds:
            return None
        total = constant + sum(
            weight * np.array([of_seed[seed] for seed in seeds])
            for weight, of_seed in zip(terms.values(), values)
        )
        known = np.isfinite(total).all()
        return intervals.over_seeds_and_problems(total) if known else None

    def by_seed(
        self, figure: str, cell: str, measure: Callable[[np.ndarray], float]
    ) -> Interval | None:
        """What a function makes of each seed's course.

        None for less than two seeds, or where a seed has no such figure.
        """
        found = [*map(measure, self.courses.get(cell, {}).get(figure, {}).values())]
        return intervals.over_seeds(found) if np.isfinite(found).all() else None

    def first_step(self, figure: str, cell: str, least: float) -> dict[int, float]:
        """By seed the step at which a course comes to a level; infinity if it does not.

        Means of three points are looked at.
        """
        steps = {}
        for seed, course in self.courses.get(cell, {}).get(figure, {}).items():
            known = np.nan_to_num(course, nan=-1.0)
            reached = np.convolve(known, np.ones(3) / 3, "valid") >= least
            point = np.argmax(reached) + 1 if reached.any() else np.inf
            steps[seed] = point * outcomes.steps_a_point(self.steps[cell])
        return steps

    def plateau(self, cell: str) -> dict[int, float]:
        """By seed the steps from the best that paths alike can do to work that is divided.

        The one is reached within 5 points of its accuracy; where the other never is, it
        is put at the last step.
        """
        of = cells.CELLS[cell]
        alike = optimum.alike(of.deadline, of.paths, label_tokens=int(of.labels))
        begins = self.first_step("accuracy", cell, alike - 0.05)
        ends, last = self.divided_at(cell), float(self.steps.get(cell, 0))
        return {s: max(min(end, last) - begins[s], 0.0) for s, end in ends.items()}

    def divided_at(self, cell: str) -> dict[int, float]:
        """By seed the step at which paths have come to divide the work; or infinity."""
        return self.first_step("work_division", cell, _DIVIDED)


# --- Reading ------------------------------------------------------------------------


def read(study: Study) -> Findings:
    """All runs of a study that are finished, in their folders or as they are kept.

    Raises:
      ValueError: two runs were evaluated on different problems, or what is kept was
        made with other settings.
    """
    problems, courses, steps = {}, {}, {}
    asked: dict[int, tuple[str, str]] = {}  # by paths: lists have as many rows
    for name, cell in cells.CELLS.items():
        for seed in study.seeds_of(cell):
            outcome, key = outcomes.read(study, cell, seed), f"{name} seed {seed}"
            if outcome is None:
                continue
            questions = outcome.digests["questions"]
            first, its_questions = asked.setdefault(cell.paths, (key, questions))
            if questions != its_questions:
                raise ValueError(f"{key} was evaluated on other problems than {first}")
            for figures, of_run in (
                (problems, outcome.problems),
                (courses, outcome.courses),
            ):
                for figure, values in of_run.items():
                    values = np.asarray(values, np.float64)
                    figures.setdefault(name, {}).setdefault(figure, {})[seed] = values
            steps[name] = outcome.steps
    return Findings(problems, courses, steps, outcomes.of_dense(study))


def begun(findings: Findings) -> list[str]:
    """Experiments of which a cell is finished; claims of the others are not told of."""
    return [e for e, of in cells.MEMBERS.items() if {*of} & findings.problems.keys()]


# --- Writing ------------------------------------------------------------------------


def summarize(findings: Findings, study: Study) -> dict[str, Any]:
    """All cells with the figures of every seed, and what theory says, as JSON."""
    took = runner.seconds(study)
    out = {}
    for name, by_metric in findings.problems.items():
        seeds = sorted(by_metric["accuracy"])
        published = {
            figure
            for experiment, figures in _PUBLISHED.items()
            if name in cells.MEMBERS[experiment]
            for figure in figures
        }
        out[name] = {
            "title": cells.CELLS[name].title,
            "seeds": seeds,
            "seconds": [_round(took.get((name, seed))) for seed in seeds],
            "steps": findings.steps.get(name, 0),
            "metrics": {
                metric: _metric(findings, metric, name)
                for metric, values in by_metric.items()
                if np.isfinite(np.concatenate([*values.values()])).any()
            },
            "courses": {
                figure: [
                    [_round(x) for x in outcomes.thinned(values[seed], _POINTS)]
                    for seed in sorted(values)
                ]
                for figure, values in findings.courses.get(name, {}).items()
                if figure in published
            },
        }
        if name in (*cells.MEMBERS["division"], *cells.MEMBERS["scaffold"]):
            steps = findings.divided_at(name).values()
            out[name]["divided_at"] = [_round(step) for step in steps]
            steps = findings.plateau(name).values()
            out[name]["plateau"] = [_round(step) for step in steps]
    theories = {"theory": theory(), "planned_theory": planned_theory()}
    return {"cells": out, **theories, "dense": list(findings.dense)}


def _metric(findings: Findings, metric: str, name: str) -> dict[str, Any]:
    """The mean with its interval, where all seeds have it, and every seed's figure."""
    by_seed = findings.problems[name][metric]
    means = {"by_seed": [_round(by_seed[seed].mean()) for seed in sorted(by_seed)]}
    if metric not in outcomes.SHARES:
        return means
    interval = findings.combined({(metric, name): 1.0})
    low, high = max(interval.low, 0.0), min(interval.high, 1.0)
    return as_json(interval._replace(low=low, high=high)) | means


def theory() -> dict[str, Any]:
    """The optimum and the predicted parallel ratios of two paths, by deadline."""
    rows = {}
    for deadline in cells.DEADLINES:
        lone, alike = optimum.lone(deadline), optimum.alike(deadline, 2)
        rows[str(deadline)] = {
            "lone": _round(lone),
            "alike": _round(alike),
            "divided": _round(optimum.divided(deadline, 2)),
            "ratios": {
                name: border.predicted(alike, lone, reward.share)
                for name, reward in cells.REWARDS.items()
                if name != "latency"
            },
        }
    return rows


def planned_theory() -> dict[str, Any]:
    """The optimum of planned blocks by deadline, with as many tokens as all cells have."""
    rows, limit = {}, {"tokens": cells.COMMON["rollout.max_response_tokens"]}
    for deadline in cells.PLANNED:
        best, numbers = optimum.best_planned(deadline, **limit)
        shares = optimum.shares_planned(deadline, **limit)
        rows[str(deadline)] = {
            "best": _round(best),
            "paths": numbers,
            "by_paths": {str(n): _round(share) for n, share in shares.items()},
            "labelled": _round(optimum.divided(deadline, 4)),
        }
    return rows


def as_json(interval: Interval) -> dict[str, float]:
    """An interval with its figures rounded."""
    value, low, high, seeds = interval
    return {"value": _round(value), "low": _round(low), "high": _round(high)} | {
        "number_of_seeds": seeds
    }


def _round(value: float | None) -> float | None:
    """Three digits that count; what is no number is None."""
    known = value is not None and np.isfinite(value)
    return float(f"{value:.{_DIGITS}g}") if known else None


def about(study: Study, command: str) -> dict[str, Any]:
    """What figures depend on: of what is kept, else of this machine and commit."""
    kept = [made for seed in study.seeds for made in outcomes.makers(study, seed)]
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
