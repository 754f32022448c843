"""The claims, each as a rule that was fixed before the study was run.

A claim has parts; a part is a quantity that the claim says is positive. By their 95 %
intervals (`intervals`) a claim

* holds, if all of its quantities are above zero;
* does not hold at this scale, if one of them is below zero;
* cannot be told, else: also with less than three seeds, or where a cell is lacking.

Four claims have a margin, since a rule needs a number: blocks "die out" below half of
what they were after SFT and are "kept" above it, two accuracies are "as good" within 2
points, the sampler "is not" the trainer's policy from a mean gap of 0.001 nats a token.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from pr1_jax.study import cells, intervals, outcomes, results
from pr1_jax.study.intervals import Interval
from pr1_jax.study.results import Findings

HOLDS, FAILS, OPEN = "holds", "does not hold at this scale", "cannot be told"
SEEDS = 3  # less are not enough for a verdict; 0: no luck is involved
_AS_GOOD = 0.02  # of 1
_GAP = 1e-3  # nats a token


@dataclasses.dataclass(frozen=True)
class Part:
    """A quantity that a claim says is positive.

    Attributes:
      text: what it is. unit: `points` (of a share), `nats`, `times` or ``.
    """

    text: str
    measure: Callable[[Findings], Interval | None]
    unit: str = "points"


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim of the paper, or about a published shortcut, and how it is tested.

    Attributes:
      paper: its own figures; in words, where there are none.
    """

    name: str
    experiment: str
    text: str
    paper: str
    parts: tuple[Part, ...]


def _less(cell: str, other: str, margin: float = 0.0, text: str = "") -> Part:
    """A cell's accuracy less another's, and a margin."""
    weights = {cell: 1.0, other: -1.0}
    names = (f"“{cells.CELLS[name].title}”" for name in weights)
    text = f"accuracy, {' less '.join(names)}{text}"
    return Part(text, lambda findings: findings.combined("accuracy", weights, margin))


def _ratio(text: str, **weights: float) -> Part:
    """A weighted sum of cells' parallel ratios."""
    return Part(text, lambda findings: findings.combined("parallel_ratio", weights))


def _position(findings: Findings) -> Interval | None:
    courses = findings.courses.get("late", {}).get(outcomes.POSITION, {})
    steps = min(map(len, courses.values()), default=0)
    quarter = max(1, steps // 4)
    early, late = slice(0, quarter), slice(steps - quarter, steps)
    return findings.change("late", outcomes.POSITION, early, late)


def _fall_after_switch(findings: Findings) -> Interval | None:
    tenth = max(1, findings.switch // 5)
    before, last = slice(findings.switch - tenth, findings.switch), slice(-tenth, None)
    change = findings.change("scaffold", "parallel_ratio", before, last)
    return change and change.negated()


def _gap(findings: Findings) -> Interval | None:
    gap = findings.course_mean("causal_sampling", "gap_mean")
    return gap and Interval(*(x - _GAP for x in gap[:3]), gap.seeds)


def _dense(measure: Callable[[dict], float]) -> Callable:
    longest = lambda findings: max(findings.dense, key=lambda f: f["tokens"])
    return lambda findings: (
        intervals.exact(measure(longest(findings))) if findings.dense else None
    )


def _claim(name: str, experiment: str, text: str, paper: str, *parts: Part) -> Claim:
    return Claim(name, experiment, text, paper, parts)


CLAIMS = (
    _claim(
        "blocks_die_out",
        "rewards",
        "With the accuracy reward alone blocks die out.",
        "95.6 % of responses with a block after SFT, 13.6 % after RL (S1)",
        _ratio(
            "half of the parallel ratio after SFT, less that of accuracy only",
            sft=0.5,
            accuracy=-1.0,
        ),
    ),
    _claim(
        "parallel_only_forces_blocks",
        "rewards",
        "The parallel-only reward forces blocks, at a cost in accuracy.",
        "80.3 % with a block against 13.6 %; MATH 81.7 against 84.5 for alternating",
        _ratio(
            "parallel ratio, parallel only less accuracy only",
            parallel_only=1.0,
            accuracy=-1.0,
        ),
        _less("alternating", "parallel_only"),
    ),
    _claim(
        "alternating_keeps_both",
        "rewards",
        "The alternating reward keeps blocks, and is as accurate as accuracy alone.",
        "63.0 % with a block; average 46.8 against 47.1",
        _ratio(
            "parallel ratio of alternating, less half of that after SFT",
            alternating=1.0,
            sft=-0.5,
        ),
        _less("alternating", "accuracy", _AS_GOOD, ", and 2 points"),
    ),
    _claim(
        "better_than_sequential",
        "rewards",
        "Parallel thinking is more accurate than sequential GRPO.",
        "average 46.8 (S2) against 45.1",
        _less("alternating", "sequential"),
    ),
    _claim(
        "cold_start_is_needed",
        "curriculum",
        "Without a cold start RL does not find blocks.",
        "said of the base model; no figure that could be compared",
        _ratio(
            "half of the parallel ratio with a cold start, less that without",
            alternating=0.5,
            no_cold_start=-1.0,
        ),
    ),
    _claim(
        "easy_rl_helps_causal",
        "curriculum",
        "RL on easy problems first helps the causal variant.",
        "average 48.9 against 46.6",
        _less("causal_with_easy", "causal_without_easy"),
    ),
    _claim(
        "easy_rl_hurts_structured",
        "curriculum",
        "RL on easy problems first hurts the structured variant.",
        "average 38.5 against 47.1",
        _less("accuracy", "structured_with_easy"),
    ),
    _claim(
        "blocks_move_back",
        "position",
        "Over training blocks move towards the end of responses.",
        "rises steadily (figure 3)",
        Part("relative position, last quarter of the steps less the first", _position),
    ),
    _claim(
        "scaffold_is_better",
        "scaffold",
        "Alternating first, then accuracy, ends more accurate than accuracy alone and "
        "than sequential GRPO.",
        "AIME25 25.6 against 17.7 and 14.8",
        _less("scaffold", "accuracy"),
        _less("scaffold", "sequential"),
    ),
    _claim(
        "scaffold_is_taken_down",
        "scaffold",
        "Once the reward is accuracy alone, blocks become fewer.",
        "the parallel ratio falls after step 200 (figure 4)",
        Part("parallel ratio, before the switch less at the end", _fall_after_switch),
    ),
    _claim(
        "forced_tokens_cost",
        "shortcuts",
        "Training on tokens that the runtime wrote costs accuracy.",
        "not its claim, but what its published code does",
        _less("alternating", "forced"),
    ),
    _claim(
        "causal_sampling_is_another_policy",
        "shortcuts",
        "Sampling plain-causally after a block is not the policy that is trained.",
        "not its claim, but what its published code does",
        Part("mean log-prob gap, less 0.001 nats a token", _gap, "nats"),
    ),
    _claim(
        "causal_sampling_costs",
        "shortcuts",
        "Training on what was sampled so costs accuracy, sampled so at the end as well.",
        "not its claim, but what its published code does",
        _less("alternating", "causal_sampling_published"),
    ),
    _claim(
        "dense_masks_cost_memory",
        "shortcuts",
        "A dense mask computes the same as the exact rule, at more memory and time.",
        "not its claim, but what its published code does",
        Part(
            "0.0001 less the largest difference of outputs and gradients",
            _dense(lambda f: 1e-4 - f["max_difference"]),
            "",
        ),
        Part(
            "memory, dense by exact, less 1",
            _dense(lambda f: f["dense_bytes"] / f["exact_bytes"] - 1),
            "times",
        ),
        Part(
            "time, dense by exact, less 1",
            _dense(lambda f: f["dense_sec"] / f["exact_sec"] - 1),
            "times",
        ),
    ),
)


def verdict(measured: Sequence[Interval | None]) -> str:
    """What the intervals of a claim's quantities say of it."""
    enough = lambda x: x is not None and (x.seeds == 0 or x.seeds >= SEEDS)
    if any(enough(x) and x.high < 0 for x in measured):
        return FAILS
    if all(enough(x) and x.low > 0 for x in measured):
        return HOLDS
    return OPEN


def judge(findings: Findings) -> list[dict[str, Any]]:
    """All claims with what was measured and their verdicts, as JSON."""
    out = []
    for claim in CLAIMS:
        measured = [part.measure(findings) for part in claim.parts]
        out.append(
            {
                "name": claim.name,
                "experiment": claim.experiment,
                "claim": claim.text,
                "paper": claim.paper,
                "parts": [
                    {
                        "text": part.text,
                        "unit": part.unit,
                        "measured": x and results.as_json(x),
                    }
                    for part, x in zip(claim.parts, measured)
                ],
                "verdict": verdict(measured),
            }
        )
    return out
