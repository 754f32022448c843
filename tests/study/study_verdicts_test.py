"""Tests of pr1_jax.study: intervals, verdicts and predictions, on numbers made by hand."""

import numpy as np
import pytest

from pr1_jax import losses, rewards
from pr1_jax.study import border, cells, intervals, results
from pr1_jax.study.intervals import Interval
from pr1_jax.study.verdicts import CLAIMS, FAILS, HOLDS, OPEN, judge, verdict
from tests.study import made_up

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
    S, P, studies, covered = 6, 100, 1500, 0
    for _ in range(studies):
        values = rng.normal(0, seed_std, (S, 1)) + rng.normal(0, problem_std, (1, P))
        found = intervals.over_seeds_and_problems(values + rng.normal(0, 0.3, (S, P)))
        covered += found.low <= 0 <= found.high
    assert 0.94 < covered / studies <= 0.99


def test_luck_that_two_cells_share_cancels():
    rng = np.random.default_rng(0)
    shared = rng.normal(0, 1, (3, 200)) + rng.normal(0, 1, (3, 1))
    problems = {
        "a": {"accuracy": dict(enumerate(shared + 0.2))},
        "b": {"accuracy": dict(enumerate(shared))},
    }
    found = results.Findings(problems, {})
    less = {("accuracy", "a"): 1.0, ("accuracy", "b"): -1.0}
    paired = found.combined(less)
    assert paired.low == pytest.approx(0.2) == paired.high
    alone = found.combined({("accuracy", "a"): 1.0})
    assert alone.high - alone.low > 0.5
    del problems["b"]["accuracy"][1]
    assert found.combined(less).seeds == 2
    assert found.combined(less | {("accuracy", "c"): 1.0}) is None
    problems["a"]["distinct"] = {0: np.array([0.5]), 1: np.array([np.nan])}
    assert found.combined({("distinct", "a"): 1.0}) is None  # no seed is left out


# --- Predictions ----------------------------------------------------------------------


def sampled_difference(p_block, p_lone, share, ratio, groups=200_000, G=8):
    """How much higher the advantages of blocks are, by the project's own rewards."""
    rng = np.random.default_rng(0)
    has_block = rng.random((groups, G)) < ratio
    correct = rng.random((groups, G)) < np.where(has_block, p_block, p_lone)
    paid = np.zeros((2, 2))
    for block in (0, 1):
        for right in (0, 1):
            facts = {"correct": bool(right), "num_blocks": block, "format_ok": True}
            paid[block, right] = rewards.reward("tiered", **facts)
    bonus = rng.random((groups, 1)) < share
    values = np.where(
        bonus, paid[has_block.astype(int), correct.astype(int)], 2.0 * correct - 1
    )
    advantages = np.array(losses.advantages(values))
    means = [advantages[kind].mean() for kind in (has_block, ~has_block)]
    return means[0] - means[1]


@pytest.mark.parametrize(
    "given", [(0.75, 1.0, 0.5, 0.2), (0.75, 0.81, 0.0, 0.5), (0.6, 0.9, 1.0, 0.8)]
)
def test_normalised_advantages_are_those_of_the_project(given):
    assert border.normalised(*given) == pytest.approx(
        sampled_difference(*given), abs=0.01
    )


def test_predictions_by_hand():
    # Without a bonus, all that counts is who is right more often.
    for p_block, p_lone in ((0.75, 0.625), (0.75, 0.8125), (0.2, 0.3)):
        expected = float(p_block > p_lone)
        assert border.predicted(p_block, p_lone, 0.0) == (expected, expected)
    # 1 / 0.75 is above 1 + 0.1; but where a lone search is always right, one block in
    # a group gains as much when it is right as it loses when it is wrong.
    assert border.plain(0.75, 1.0, 1.0) < 0
    assert border.normalised(0.75, 1.0, 1.0, 1e-9) == pytest.approx(7**0.5 / 2, rel=0.2)
    assert border.predicted(0.75, 1.0, 1.0) == (0.0, 1.0)
    plain, half = border.predicted(0.75, 1.0, 0.5)
    assert plain == 0 and 0.1 < half < 0.3
    assert border.rest(lambda ratio: ratio - 0.6) == 0.0
    assert cells.RL["rl.group_size"] == 8  # what `border` counts with
    assert border.rest(lambda ratio: 0.7 - ratio) == pytest.approx(0.7)


# --- Verdicts -------------------------------------------------------------------------

HELD = judge(made_up.findings())


def test_what_theory_says_holds_and_its_consequences_for_the_paper():
    found = {claim["name"]: claim["verdict"] for claim in HELD}
    ours = ("phase", "division", "scaffold", "planned")
    ours = {c.name for c in CLAIMS if c.experiment in ours}
    fails = {name for name, said in found.items() if said == FAILS}
    assert found.keys() == {c.name for c in CLAIMS} and OPEN not in found.values()
    assert fails & ours == {"latency_first", "scaffold_is_better"}
    assert {
        f"blocks_die_out_{cells.PAY}",
        f"better_than_sequential_{cells.FAIL}",
    } <= fails
    assert {
        f"blocks_die_out_{cells.FAIL}",
        f"better_than_sequential_{cells.PAY}",
    } & fails == set()


# Claims of courses and of masks, with what makes them hold and fail.
OTHERS = {
    "plateau": ({"divides": 15}, {"divides": 1}),
    f"blocks_move_back_{cells.PAY}": ({"rise": 0.3}, {"rise": -0.3}),
    "causal_sampling_is_another_policy": ({"gap": 0.05}, {"gap": 0.0}),
    "dense_masks_cost_memory": ({"dense_more": 2.0}, {"dense_more": 0.5}),
}


def with_figures(terms, constants):
    """A study in which each sum of terms comes to 0.1, or as near as can be.

    Args:
      terms: of parts: weights by (metric, cell). constants: of parts.
    """
    names = [*dict.fromkeys(name for of_part in terms for name in of_part)]
    weights = np.array([[of_part.get(name, 0) for name in names] for of_part in terms])
    wanted = 0.1 - np.array(constants) - weights.sum(1) / 2
    figures = 0.5 + np.linalg.lstsq(weights, wanted, rcond=None)[0]
    problems = {}
    for (metric, cell), figure in zip(names, figures):
        by_seed = {seed: np.array([figure]) for seed in range(cells.MANY)}
        problems.setdefault(cell, {})[metric] = by_seed
    return results.Findings(problems, {})


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.name)
def test_every_claim_can_hold_and_can_fail(claim):
    if claim.name in OTHERS:
        studies = [made_up.findings(**given) for given in OTHERS[claim.name]]
    else:
        rules = [part.measure.keywords for part in claim.parts]
        terms, constants = zip(*((x["terms"], x["constant"]) for x in rules))
        first = {name: -weight for name, weight in terms[0].items()}  # turned round
        studies = [
            with_figures(terms, constants),
            with_figures([first], [-constants[0]]),
        ]
    for study, expected in zip(studies, (HOLDS, FAILS)):
        assert verdict([part.measure(study) for part in claim.parts]) == expected


def test_less_seeds_and_cells_that_lack_cannot_be_told():
    few = judge(made_up.findings(seeds=cells.MANY - 1))
    others = {c["verdict"] for c in few if c["name"] != "dense_masks_cost_memory"}
    assert others == {OPEN}
    empty = judge(results.Findings({}, {}))
    assert {claim["verdict"] for claim in empty} == {OPEN}
    assert all(p["measured"] is None for claim in empty for p in claim["parts"])


def test_cells_of_claims_have_seeds_enough():
    """And with fewer than a verdict needs it would be told of none."""
    for claim in HELD:
        counts = {part["measured"]["number_of_seeds"] for part in claim["parts"]}
        assert counts in ({cells.MANY}, {0}), claim["name"]


def test_one_part_below_zero_is_enough_to_fail():
    above, below, across = (Interval(x, x - 1, x + 1, 6) for x in (2, -2, 0))
    assert verdict([above, above]) == HOLDS
    assert verdict([above, below]) == FAILS
    assert verdict([None, below]) == FAILS
    assert verdict([above, across]) == OPEN
    assert verdict([above, None]) == OPEN


def test_how_long_a_plateau_is():
    """Accuracy reaches that of random rows at step 10, and the work is divided at 40."""
    name = f"accuracy_{cells.PAY}_labels"
    step = lambda at, low, high: {0: np.where(np.arange(30) * 2 < at, low, high)}
    courses = {"accuracy": step(10, 0.5, 0.75), "work_division": step(40, 0.5, 1.0)}
    found = results.Findings({}, {name: courses}, {name: 60})
    assert found.plateau(name)[0] == pytest.approx(30, abs=4)
    courses["work_division"] = step(100, 0.5, 1.0)  # never
    assert found.divided_at(name)[0] == np.inf
    assert found.plateau(name)[0] == pytest.approx(50, abs=4)
