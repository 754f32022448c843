"""Tests of pr1_jax.study: intervals and verdicts on numbers made by hand."""

import numpy as np
import pytest

from pr1_jax.study import cells, intervals, outcomes, results
from pr1_jax.study.intervals import Interval
from pr1_jax.study.verdicts import CLAIMS, FAILS, HOLDS, OPEN, judge, verdict

# --- Intervals ------------------------------------------------------------------------


def test_an_interval_worked_by_hand():
    found = intervals.over_seeds([1.0, 2.0, 3.0])  # se = sqrt(1/3), t(2) = 4.3027
    assert found.value == 2.0 and found.seeds == 3
    assert found.high - 2.0 == pytest.approx(4.3027 * (1 / 3) ** 0.5, rel=1e-4)
    assert found.high - 2.0 == pytest.approx(2.0 - found.low)
    assert intervals.over_seeds([1.0]) is None
    assert intervals.over_seeds_and_problems(np.ones((3, 5)))[:3] == (1.0, 1.0, 1.0)
    one = intervals.over_seeds_and_problems([[0.0, 1.0] * 200])  # problems alone
    assert one.high - 0.5 == pytest.approx(1.966 * 0.5 / 399**0.5, rel=1e-3)


@pytest.mark.parametrize("seed_std, problem_std", [(0.1, 0.0), (0.0, 1.0), (0.05, 0.8)])
def test_intervals_cover_what_they_say(seed_std, problem_std):
    rng = np.random.default_rng(0)
    S, P, studies, covered = 3, 100, 1500, 0
    for _ in range(studies):
        values = rng.normal(0, seed_std, (S, 1)) + rng.normal(0, problem_std, (1, P))
        found = intervals.over_seeds_and_problems(values + rng.normal(0, 0.3, (S, P)))
        covered += found.low <= 0 <= found.high
    assert 0.94 < covered / studies <= 0.99


def test_luck_that_two_cells_share_cancels():
    rng = np.random.default_rng(0)
    shared = rng.normal(0, 1, (3, 200)) + rng.normal(0, 1, (3, 1))
    problems = {
        "accuracy": {"accuracy": dict(enumerate(shared + 0.2))},
        "alternating": {"accuracy": dict(enumerate(shared))},
    }
    found = results.Findings(problems, {})
    less = {"accuracy": 1.0, "alternating": -1.0}
    paired = found.combined("accuracy", less)
    assert paired.low == pytest.approx(0.2) == paired.high
    alone = found.combined("accuracy", {"accuracy": 1.0})
    assert alone.high - alone.low > 0.5
    del problems["alternating"]["accuracy"][1]
    assert found.combined("accuracy", less).seeds == 2
    assert found.combined("accuracy", {"accuracy": 1.0, "forced": -1.0}) is None


# --- Verdicts -------------------------------------------------------------------------


def world(ratios, accuracies, *, seeds=3, rise=0.0, fall=0.0, gap=0.0, dense_more=2.0):
    """A study as it may come out; cells that are not named have accuracy 0.8."""
    rng = np.random.default_rng(0)
    problems, courses = {}, {}
    for name, cell in cells.CELLS.items():
        for metric in outcomes.METRICS:
            mean = {
                "accuracy": accuracies.get(name, 0.8),
                "parallel_ratio": ratios.get(name, 0.5),
                "total_tokens": 44.0,
                "sequential_steps": 29.0,
            }[metric]
            problems.setdefault(name, {})[metric] = {
                seed: mean + rng.normal(0, 0.01, 50) for seed in range(seeds)
            }
        if cell.kind == "rl":
            steps = np.linspace(0, 1, 80)
            means = {
                "accuracy": 0.5 + 0.3 * steps,
                "parallel_ratio": 0.5 - fall * (steps > 0.5),
                "gap_mean": gap + 1e-6 * steps,
                outcomes.POSITION: 0.3 + rise * steps,
            }
            courses[name] = {
                figure: {seed: mean * rng.normal(1, 1e-3, 80) for seed in range(seeds)}
                for figure, mean in means.items()
            }
    compared = {"tokens": 256, "exact_bytes": 1e6, "dense_bytes": dense_more * 1e6}
    compared |= {"exact_sec": 1.0, "dense_sec": dense_more, "max_difference": 1e-6}
    return results.Findings(problems, courses, dense=[compared], switch=40)


WORSE = ("parallel_only", "sequential", "causal_without_easy", "structured_with_easy")
WORSE += ("accuracy", "forced", "causal_sampling_published")
AGREES = {
    "ratios": {"sft": 0.9, "accuracy": 0.1, "alternating": 0.6, "no_cold_start": 0.0},
    "accuracies": dict.fromkeys(WORSE, 0.7) | {"structured_with_easy": 0.6},
    "rise": 0.3,
    "fall": 0.3,
    "gap": 0.05,
}
CONTRADICTS = {
    "ratios": {"sft": 0.9, "accuracy": 0.7, "parallel_only": 0.6, "alternating": 0.3}
    | {"no_cold_start": 0.4},
    "accuracies": dict.fromkeys(WORSE, 0.9) | {"structured_with_easy": 0.95},
    "rise": -0.3,
    "fall": -0.3,
    "gap": 0.0,
    "dense_more": 0.5,
}
UNDECIDED = {  # nothing differs
    "ratios": {"sft": 1.0},
    "accuracies": {"accuracy": 0.82},
}


@pytest.mark.parametrize("kind, expected", [(AGREES, HOLDS), (CONTRADICTS, FAILS)])
def test_every_claim_can_hold_and_can_fail(kind, expected):
    found = {claim["name"]: claim for claim in judge(world(**kind))}
    assert len(found) == len(CLAIMS)
    assert {name: claim["verdict"] for name, claim in found.items()} == dict.fromkeys(
        found, expected
    )


def test_what_luck_could_be_cannot_be_told():
    by_name = {c["name"]: c["verdict"] for c in judge(world(**UNDECIDED))}
    certain = {
        "causal_sampling_is_another_policy": FAILS,
        "dense_masks_cost_memory": HOLDS,
    }
    certain |= {"easy_rl_hurts_structured": HOLDS, "scaffold_is_better": FAILS}
    certain |= {"cold_start_is_needed": FAILS}
    assert by_name == dict.fromkeys(by_name, OPEN) | certain


def test_less_than_three_seeds_and_cells_that_lack_cannot_be_told():
    few = judge(world(**AGREES, seeds=2))
    others = {c["verdict"] for c in few if c["name"] != "dense_masks_cost_memory"}
    assert others == {OPEN}
    empty = judge(results.Findings({}, {}))
    assert {claim["verdict"] for claim in empty} == {OPEN}
    assert all(p["measured"] is None for claim in empty for p in claim["parts"])


def test_one_part_below_zero_is_enough_to_fail():
    above, below, across = (Interval(x, x - 1, x + 1, 3) for x in (2, -2, 0))
    assert verdict([above, above]) == HOLDS
    assert verdict([above, below]) == FAILS
    assert verdict([None, below]) == FAILS
    assert verdict([above, across]) == OPEN
    assert verdict([above, None]) == OPEN
