"""The order of rows in an update: complete, and the cheaper one."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pr1_jax import trajectory
from pr1_jax.system import processes
from pr1_jax.training import micro_batches
from pr1_jax.training.logps import PolicySettings


def response(prompt: int, tokens: int) -> trajectory.Trajectory:
    nothing = np.zeros(tokens, np.int32)
    fields = dict.fromkeys(("positions", "block", "path", "forced", "bans"), nothing)
    return trajectory.Trajectory(
        prompt=np.arange(prompt),
        tokens=nothing,
        logps=nothing.astype(np.float32),
        finished=True,
        sequential_steps=tokens,
        **fields,
    )


def arrange(groups, policy, micro_batch, max_tokens=100):
    """Groups: lengths of the prompt and of the responses to it."""
    rows = [response(prompt, n) for prompt, tokens in groups for n in tokens]
    return rows, micro_batches.arrange(
        rows,
        policy,
        group_size=len(groups[0][1]),
        micro_batch=micro_batch,
        max_tokens=max_tokens,
    )


def computed(rows, order, policy, micro_batch, max_tokens=100):
    """Tokens by the definition, micro-batch by micro-batch."""
    total = 0
    for first in range(0, len(rows), micro_batch):
        some = slice(first, first + micro_batch)
        picked = [rows[i] for i in order.rows[some]]
        lengths = [n for n in (*policy.lengths, max_tokens) if n <= max_tokens]
        n = min(n for n in lengths if n >= max(map(len, picked)))
        (shared,) = {*order.shared[some]}
        assert shared == 0 or shared in policy.shared_lengths
        assert shared <= min(len(t.prompt) for t in picked)
        total += len(picked) * (n - shared)
        total += len(picked) // policy.group_rows * shared
    return total


def policy(*shared, lengths=(), group_rows=2):
    return PolicySettings(
        (0,), lengths=lengths, group_rows=group_rows, shared_lengths=shared
    )


@given(
    st.lists(
        st.tuples(
            st.integers(1, 40),
            st.lists(st.integers(1, 60), min_size=4, max_size=4),
        ),
        min_size=2,
        max_size=6,
    ),
    st.sampled_from([(1, 1), (1, 4), (2, 2), (2, 4), (4, 4), (4, 8), (2, 8)]),
    st.sampled_from([(), (60,), (20, 50, 80, 200)]),
    st.sampled_from([(), (7,), (10, 30)]),
)
def test_rows_are_complete_and_what_they_cost_is_told(groups, sizes, lengths, shared):
    group_rows, micro_batch = sizes
    groups = groups[: len(groups) // 2 * 2]  # whole micro-batches
    chosen = policy(*shared, lengths=lengths, group_rows=group_rows)
    rows, order = arrange(groups, chosen, micro_batch)
    assert sorted(order.rows) == list(range(len(rows)))
    assert order.computed_tokens == computed(rows, order, chosen, micro_batch)
    if order.shared.any():  # rows of a set have one prompt
        sets = order.rows.reshape(-1, group_rows) // 4
        assert (sets == sets[:, :1]).all()
    _, alone = arrange(groups, policy(lengths=lengths), micro_batch)
    assert order.computed_tokens <= alone.computed_tokens


def test_responses_stand_together_where_that_is_cheaper():
    chosen = policy(30, lengths=(40, 50, 60, 90))
    # Of like length: three prompts of four are saved.
    _, order = arrange([(30, (9, 9, 9, 9)), (30, (8, 8, 8, 8))], chosen, 4)
    assert (order.shared == 30).all() and order.computed_tokens == 2 * (4 * 40 - 2 * 30)
    # One long response a group: apart from the short ones it costs less.
    chosen = policy(10, lengths=(20, 90), group_rows=4)
    groups = [(10, (5, 6, 7, 80))] * 4
    _, order = arrange(groups, chosen, 4)
    assert (order.shared == 0).all() and order.computed_tokens == 4 * 90 + 12 * 20
    assert sorted(order.rows[-4:]) == [3, 7, 11, 15]


def test_the_shortest_prompt_of_a_micro_batch_limits_what_is_shared():
    groups = [(30, (10, 10)), (12, (25, 25)), (35, (1, 1)), (40, (1, 1))]
    _, order = arrange(groups, policy(10, 20, lengths=(50,)), 4)
    assert order.rows.tolist() == [4, 5, 2, 3, 0, 1, 6, 7]
    assert order.shared.tolist() == [10, 10, 10, 10, 20, 20, 20, 20]


def test_processes_choose_the_same_order(monkeypatch):
    """By the sum of their costs, though one of them would rather choose the other."""
    groups = [(30, (9, 9, 9, 9)), (30, (8, 8, 8, 8))]
    chosen = policy(30, lengths=(40, 50, 60, 90))
    assert arrange(groups, chosen, 4)[1].shared.any()
    alone, together = 320, 200
    monkeypatch.setattr(
        processes, "gather", lambda mine: [*mine, [alone, alone + 1000]]
    )
    _, order = arrange(groups, chosen, 4)
    assert not order.shared.any()
    assert order.computed_tokens == 2 * alone and together < alone


# --- Rows that hold several ---------------------------------------------------------


def fill(lengths, policy, micro_batch, max_tokens=100):
    rows = [response(1, n - 1) for n in lengths]
    return micro_batches.fill(
        rows, policy, micro_batch=micro_batch, max_tokens=max_tokens
    )


@given(
    st.lists(st.integers(1, 100), min_size=1, max_size=40),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([(), (60,), (55, 70, 85)]),
)
def test_rows_hold_each_trajectory_once_and_are_not_too_long(lengths, size, cuts):
    filled = fill(lengths, policy(lengths=cuts), size)
    assert sorted(itertools.chain(*filled.rows)) == list(range(len(lengths)))
    used = [sum(lengths[i] for i in row) for row in filled.rows]
    assert 0 < min(used) and max(used) <= 100
    cost = 0
    for first in range(0, len(used), size):
        longest = max(used[first : first + size])
        cost += size * min(n for n in (*cuts, 100) if n >= longest)
    assert filled.computed_tokens == cost
    # Never more than one a row, each micro-batch cut to the same lengths.
    alone = sorted(lengths)[::-1][::size]
    assert cost <= sum(size * min(n for n in (*cuts, 100) if n >= x) for x in alone)
    assert fill(lengths, policy(lengths=cuts), size) == filled  # a resumed run's


def test_rows_by_hand():
    filled = fill([30, 100, 55, 45, 70, 10], policy(), 2)
    assert sorted(map(sorted, filled.rows)) == [[0, 4], [1], [2, 3], [5]]
    assert filled.computed_tokens == 400
    # Rows of 60 hold one of 55 each; of 100 they would, too.
    filled = fill([55] * 4, policy(lengths=(60,)), 2)
    assert len(filled.rows) == 4 and filled.computed_tokens == 240
    # The longer ones apart from rows of 60, of which none has an unused token.
    filled = fill([100, 30, 30, 30, 30, 90], policy(lengths=(60,)), 2)
    assert [len(row) for row in filled.rows] == [1, 1, 2, 2]
    assert filled.computed_tokens == 2 * 100 + 2 * 60


@pytest.mark.parametrize(
    "theirs, tokens", [([[60] * 9, [100]], 100), ([[60], [60]], 60)]
)
def test_processes_fill_rows_alike(monkeypatch, theirs, tokens):
    """A micro-batch is as long as that of the process that needs most."""
    monkeypatch.setattr(processes, "gather", lambda mine: [*mine, theirs])
    filled = fill([40, 20], policy(lengths=(60,)), 1)
    assert filled.computed_tokens == 2 * tokens
