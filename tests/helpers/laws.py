"""What holds of every response, whatever the model: budgets, deadline, labels, bans.

The rules of docs/method.md, section 3, anew from the recorded layout of a whole response;
the sampler keeps them step by step.
"""

import numpy as np

from pr1_jax import layout, tags
from pr1_jax.sampler.settings import (
    CLOSING,
    END_PATH,
    END_SUMMARY,
    PARALLEL,
    SUMMARY_OPEN,
)


def assert_laws(t, settings, vocab):
    """All of them; any tokens may be drawn, banned ones apart."""
    # Steps up to a token of the main stream: its position in the structured layout.
    steps = layout.structured_positions(t.block, t.path, 1)
    assert_steps(t, steps, settings, vocab)
    ids = dict(zip(tags.TAGS, vocab.tag_ids))
    if settings.ban_illegal:  # else tags may stand anywhere
        parsed = layout.structured(t.tokens, ids, len(t.prompt))
        np.testing.assert_array_equal(t.block, parsed.block[len(t.prompt) :])
        np.testing.assert_array_equal(t.path, parsed.path[len(t.prompt) :])
    left = (
        settings.max_response_tokens - np.arange(len(t.tokens)) - 1,
        _left(steps, settings),
    )
    assert t.num_blocks <= settings.max_blocks
    assert_paths(t, left, settings, vocab)
    assert_summaries(t, left, settings, vocab)
    assert_bans(t, left, settings, vocab)


def _left(steps, settings):
    """Sequential steps that are left after each token of the main stream."""
    return (settings.max_sequential_steps or 10**6) - steps


def assert_steps(t, steps, settings, vocab):
    """The count of steps is the critical path, and ends in time."""
    longest = sum(
        np.bincount(t.path[t.block == b])[1:].max() for b in range(1, t.num_blocks + 1)
    )
    assert t.sequential_steps == (t.path == 0).sum() + longest == steps[-1]
    if settings.variant == "structured":
        assert t.positions[-1] - len(t.prompt) + 1 == t.sequential_steps
    assert t.path[-1] == 0
    assert t.finished == (t.tokens[-1] in vocab.eos_ids)
    last = (settings.max_response_tokens - len(t.tokens), _left(steps, settings)[-1])
    assert min(last) >= 0
    assert t.finished or min(last) == 0


def assert_paths(t, left, settings, vocab):
    """Paths have their labels, end by themselves or at the budget, and nothing before."""
    P, (tokens_left, steps_left) = settings.num_paths, left
    after = CLOSING + settings.summary_reserve + settings.answer_reserve
    forced = np.isin(t.tokens, vocab.tag_ids) | (t.tokens == vocab.newline_id)
    forced &= t.forced  # but for labels, nothing else is
    for block in range(1, t.num_blocks + 1):
        first = np.flatnonzero(t.block == block)[0]
        budget = min(
            (tokens_left[first - 1] - after) // P, steps_left[first - 1] - after
        )
        budget = min(budget, settings.max_path_tokens or budget)
        assert budget >= settings.min_path_tokens
        for path in range(1, P + 1):
            mine = np.flatnonzero((t.block == block) & (t.path == path))
            label = (vocab.label_ids or ((),) * P)[path - 1]
            assert tuple(t.tokens[mine[1 : 1 + len(label)]]) == label
            forced[mine[1 : 1 + len(label)]] = True
            assert 2 + len(label) <= len(mine) <= budget
            assert t.tokens[mine[-1]] == vocab.special_ids[END_PATH]
            before_last = t.tokens[mine[-2]] in vocab.eos_ids
            cut = len(mine) == budget or before_last
            assert t.forced[mine[-1]] == cut
    np.testing.assert_array_equal(t.forced, forced)
    assert (t.logps[t.forced] == 0).all() and (t.bans[t.forced] == 0).all()


def in_summary(t, vocab):
    """Which tokens stand between a `<Summary>` and the `</Summary>` that closes it."""
    ids, inside, out = vocab.special_ids, False, []
    for token, path, forced in zip(t.tokens, t.path, t.forced, strict=True):
        inside |= token == ids[SUMMARY_OPEN] and forced
        out.append(inside and not path)
        inside &= token != ids[END_SUMMARY] or path > 0
    return np.array(out)


def assert_summaries(t, left, settings, vocab):
    """Summaries close by themselves or where the answer's reserve begins."""
    inside = np.diff(in_summary(t, vocab).astype(int), prepend=0, append=0)
    opened, closed = np.flatnonzero(inside > 0), np.flatnonzero(inside < 0) - 1
    assert len(opened) == t.num_blocks
    for first, last in zip(opened, closed, strict=True):
        room = min(x[first] for x in left) - settings.answer_reserve
        assert room >= settings.summary_reserve
        room = min(room, settings.max_summary_tokens or room)
        assert 1 <= last - first <= room
        assert t.tokens[last] == vocab.special_ids[END_SUMMARY]
        cut = last - first == room or t.tokens[last - 1] in vocab.eos_ids
        assert t.forced[last] == cut


def assert_bans(t, left, settings, vocab):
    """In the main stream `<Parallel>` is banned exactly where no block fits."""
    tokens_left, steps_left = (np.concatenate([[x[0] + 1], x[:-1]]) for x in left)
    before = np.concatenate([[0], np.maximum.accumulate(t.block)[:-1]])
    fits = tokens_left - 1 >= settings.smallest_block
    fits &= steps_left - 1 >= settings.smallest_block_steps
    fits &= before < settings.max_blocks
    main = (t.path == 0) & ~t.forced & ~in_summary(t, vocab)
    np.testing.assert_array_equal(~fits[main], (t.bans >> PARALLEL & 1 == 1)[main])
