"""Claims of blocks that the model plans, fixed before any of these cells was run.

How many searches a response makes at once is the number of its block's paths, or one
where it has no block. The optimum (`optimum.best_planned`) says how many see most of the
list at a deadline, of responses with as many tokens as those of all cells; a response is
counted to a number where it is nearer to it than to the next one.
"""

import dataclasses
from collections.abc import Iterator

from pr1_jax.study import cells, optimum, outcomes
from pr1_jax.study.cells import labelled_name, planned_name
from pr1_jax.study.parts import (
    OURS,
    Claim,
    Part,
    below,
    kept,
    lost,
    more,
    optimal,
    title,
    total,
)

TOKENS = cells.COMMON["rollout.max_response_tokens"]
_FEW = 0.02  # of blocks


def _searches(text: str, constant: float, *terms: tuple[float, str]) -> Part:
    """A sum of terms (weight, cell) of the searches at once."""
    named = [(weight, outcomes.SEARCHES, cell) for weight, cell in terms]
    return dataclasses.replace(total(text, constant, *named), unit="paths")


def _more_searches(cell: str, other: str) -> Part:
    """At least half a path more than another cell."""
    text = f"searches at once, {title(cell)} less {title(other)}, less 0.5"
    return _searches(text, -0.5, (1.0, cell), (-1.0, other))


def _near(cell: str, numbers: list[int]) -> list[Part]:
    """Within half a path of the numbers that are best, where there are others."""
    least, most = min(numbers) - 0.5, max(numbers) + 0.5
    name = f"searches at once of {title(cell)}"
    parts = []
    if least > 1:
        parts.append(_searches(f"{name}, less {least}", -least, (1.0, cell)))
    if most < 4:
        parts.append(_searches(f"{most} less {name}", most, (-1.0, cell)))
    return parts


def claims() -> Iterator[Claim]:
    """How many paths responses come to have, when, and what plans cost."""
    claim = lambda name, text, *parts: Claim(name, "planned", text, OURS, parts)
    cell = {d: planned_name("accuracy", d) for d in cells.PLANNED}
    best = {d: optimum.best_planned(d, tokens=TOKENS) for d in cells.PLANNED}
    alone, four, two, either = cells.PLANNED
    yield claim(
        "paths_rise_as_the_deadline_falls",
        f"Under accuracy alone responses make more searches at once at {four} steps than "
        f"at {two}, and at {two} more than at {alone}, which leave too little behind plans.",
        _more_searches(cell[four], cell[two]),
        _more_searches(cell[two], cell[alone]),
    )
    yield claim(
        "as_many_paths_as_the_optimum",
        "Under accuracy alone they make as many as the optimum of each deadline, to half a "
        "path.",
        *(part for d in cell for part in _near(cell[d], best[d][1])),
    )
    yield claim(
        "planned_optimum",
        "Under accuracy alone planned blocks come within 5 points of the best that is "
        "possible.",
        *(optimal(cell[d], best[d][0]) for d in cell),
    )
    yield claim(
        "planned_paths_differ",
        "Less than 2 in a hundred planned blocks have identical paths.",
        *(below("identical_paths", cell[d], _FEW) for d in (four, two)),
    )
    yield claim(
        "latency_does_not_keep_planned_blocks",
        f"At {either} steps a reward for short critical paths does not keep planned blocks, "
        "as it does not keep others.",
        lost(planned_name("latency", either)),
    )
    yield claim(
        "plans_cost",
        f"At {four} steps, where four labelled paths pay even from random rows, those without "
        "plans come to be more accurate, after three times the steps of RL: plans take "
        "tokens and steps from searches.",
        more("accuracy", labelled_name(four), cell[four]),
    )
    yield claim(
        "plans_divide_from_the_start",
        f"At {two} steps, where only divided work pays, accuracy alone keeps planned blocks "
        "and loses labelled ones: plans of traces name different rows, and paths without "
        "plans begin at random ones.",
        kept(cell[two]),
        lost(labelled_name(two)),
        more("accuracy", cell[two], labelled_name(two)),
    )
