"""What claims of the study are made of: quantities that a claim says are positive.

A difference has a margin: without one a claim would hold by differences too small to
matter (`verdicts`).
"""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from pr1_jax.study import cells, intervals
from pr1_jax.study.intervals import Interval
from pr1_jax.study.results import Findings

OURS = "not in the paper"
MARGIN = 0.05  # of 1
_PLATEAU = 5  # steps
_WORDS = {
    "accuracy": "accuracy",
    "parallel_ratio": "parallel ratio",
    "before_parallel_ratio": "parallel ratio before RL",
    "work_division": "distinct work",
    "identical_paths": "blocks with identical paths",
}


@dataclasses.dataclass(frozen=True)
class Part:
    """A quantity that a claim says is positive.

    Attributes:
      text: what it is.
      unit: `points` (of a share), `nats`, `steps`, `paths`, `times` or ``.
    """

    text: str
    measure: Callable[[Findings], Interval | None]
    unit: str = "points"


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim of the paper, of theory, or about a shortcut, and how it is tested.

    Attributes:
      paper: the paper's own figures; in words, where there are none.
    """

    name: str
    experiment: str
    text: str
    paper: str
    parts: tuple[Part, ...]


def title(cell: str) -> str:
    """A cell's title in quotes."""
    return f"“{cells.CELLS[cell].title}”"


def points(share: float) -> str:
    """A share as text: `5 points`."""
    return f"{100 * share:.3g} points"


def total(text: str, constant: float, *terms: tuple[float, str, str]) -> Part:
    """A sum of terms (weight, metric, cell)."""
    weights = {(metric, cell): weight for weight, metric, cell in terms}
    given = {"terms": weights, "constant": constant}
    return Part(text, functools.partial(Findings.combined, **given))


def above(metric: str, cell: str, least: float) -> Part:
    """A cell's figure, less a least value."""
    text = f"{_WORDS[metric]} of {title(cell)}, less {points(least)}"
    return total(text, -least, (1.0, metric, cell))


def below(metric: str, cell: str, most: float) -> Part:
    """A greatest value, less a cell's figure."""
    text = f"{points(most)} less {_WORDS[metric]} of {title(cell)}"
    return total(text, most, (-1.0, metric, cell))


def more(metric: str, cell: str, other: str, margin: float = MARGIN) -> Part:
    """More than another cell's, by a margin; a negative one allows so much less."""
    text = f"{_WORDS[metric]}, {title(cell)} less {title(other)}"
    text += f", {'less' if margin > 0 else 'and'} {points(abs(margin))}"
    return total(text, -margin, (1.0, metric, cell), (-1.0, metric, other))


def kept(cell: str) -> Part:
    """Blocks in more than half of the responses."""
    return above("parallel_ratio", cell, 0.5)


def lost(cell: str) -> Part:
    """Fewer than half of the blocks that SFT left."""
    text = f"half of the parallel ratio before RL, less that after, of {title(cell)}"
    before, after = (0.5, "before_parallel_ratio", cell), (-1.0, "parallel_ratio", cell)
    return total(text, 0.0, before, after)


def not_lost(cell: str) -> Part:
    """More than half of the blocks that SFT left."""
    text = f"parallel ratio after RL, less half of that before, of {title(cell)}"
    before, after = (-0.5, "before_parallel_ratio", cell), (1.0, "parallel_ratio", cell)
    return total(text, 0.0, before, after)


def optimal(cell: str, share: float) -> Part:
    """Within the margin of the optimum."""
    least = share - MARGIN
    text = f"accuracy of {title(cell)}, less {100 * least:.3g} %, 5 below the optimum"
    return total(text, -least, (1.0, "accuracy", cell))


def plateau(cell: str) -> Part:
    """More than so many steps from undivided to divided work."""

    def measure(findings: Findings) -> Interval | None:
        steps = np.array([*findings.plateau(cell).values()])
        known = len(steps) and np.isfinite(steps).all()
        return intervals.over_seeds(steps - _PLATEAU) if known else None

    text = f"steps from undivided to divided work in {title(cell)}, less {_PLATEAU}"
    return Part(text, measure, "steps")
