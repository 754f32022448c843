"""Laws of updates whose rows hold several trajectories one after another."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from pr1_jax.training.logps import trained_logps as logps_trained_logps
from pr1_jax.trajectory import pack, pack_rows, places
from tests.training.update_test import (
    GRPO,
    LENGTH,
    POLICY,
    XLA,
    assert_same,
    fresh_state,
    largest_difference,
    policy_logps,
    random_params,
    random_trajectory,
    run,
)

# Numbers of the trajectories in each row. Half of the micro-batches of two have none.
IN_ROWS = [[2, 0, 4], [5, 3], [], [1], [], [], [], []]


@functools.cache
def packed_case():
    """Six trajectories: a batch of a row each, one of `IN_ROWS`, and those rows.

    Rows of the second are as long as the longest; two of each batch's eight or so are
    empty. Weights of the gain follow from tokens.
    """
    rng = np.random.default_rng(3)
    ts, advantages = [random_trajectory(rng) for _ in range(6)], rng.normal(size=8)
    rows = [[ts[i] for i in row] for row in IN_ROWS]
    length = max(sum(map(len, row)) for row in rows)
    packed = pack_rows(
        rows,
        length,
        num_rows=8,
        variant="structured",
        advantages=[advantages[row] for row in IN_ROWS],
    )
    alone = pack([*ts, None, None], LENGTH, variant="structured", advantages=advantages)

    def whole(batch):
        batch = batch.replace(importance=np.float32(1 + batch.tokens % 3 / 4))
        return jax.tree.map(lambda x: x.reshape(4, 2, *x.shape[1:]), batch)

    return whole(alone), whole(packed), rows


PACKED = dataclasses.replace(POLICY, lengths=(25,))


# With a ratio of each response; those of tokens are compared in tests/objectives_test.py.
GSPO = {"grpo": dataclasses.replace(GRPO, objective="gspo", clip_low=0.9)}


@pytest.mark.parametrize("kind", ["grpo", "sft"])
def test_rows_that_hold_several_change_nothing(kind):
    alone, packed, _ = packed_case()
    settings = GSPO if kind == "grpo" else {}
    whole, whole_metrics = run(kind, fresh_state(), alone, **settings)
    found, metrics = run(kind, fresh_state(), packed, policy=PACKED, **settings)
    assert largest_difference(whole.params, fresh_state().params) > 1e-3
    assert largest_difference(whole.params, found.params) < 1e-6
    assert metrics.keys() == whole_metrics.keys()
    for name, value in whole_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-7)


def test_trajectories_of_a_row_do_not_see_each_other():
    alone, packed, rows = packed_case()
    logps = jax.jit(functools.partial(logps_trained_logps, XLA, policy=PACKED))
    before = np.asarray(logps(random_params(), packed))
    expected = np.asarray(policy_logps(random_params(), alone)).reshape(8, -1)
    mask, second = np.zeros(before.shape, bool), {}
    for index, (row, numbers) in enumerate(zip(rows, IN_ROWS, strict=True)):
        for number, (first, t) in zip(numbers, places(row), strict=True):
            here = (*divmod(index, 2), slice(first + 1, first + len(t)))
            second[number], mask[here] = here, True
            np.testing.assert_allclose(
                before[here], expected[number, 1 : len(t)], atol=1e-5
            )
    tokens = packed.tokens.copy()
    tokens[second[0]] = 20  # of the one in the middle
    after = np.asarray(logps(random_params(), packed.replace(tokens=tokens)))
    changed = mask & (after != before)
    assert changed[second[0]].all()
    changed[second[0]] = False
    assert not changed.any() and mask.sum() > 60


def test_micro_batches_without_trajectories_are_not_computed():
    """What is not a number in them does not come through."""
    _, packed, _ = packed_case()
    poison = packed.advantages.copy()
    poison[2:] = np.nan
    update = functools.partial(run, "grpo", fresh_state(), policy=PACKED, **GSPO)
    expected, _ = update(packed)
    found, metrics = update(packed.replace(advantages=poison))
    assert metrics["skipped"] == 0
    assert_same(found.params, expected.params)
