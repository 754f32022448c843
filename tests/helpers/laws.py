"""What holds of every response, whatever the model: budgets, deadline, labels, bans, plans.

The rules of docs/method.md, section 3, anew from the recorded layout of a whole response;
the sampler keeps them step by step.
"""

import numpy as np

from pr1_jax import layout
from pr1_jax.policy import ORDINARY
from pr1_jax.sampler.settings import (
    CLOSING,
    END_PATH,
    END_SUMMARY,
    PARALLEL,
    PATH,
    SUMMARY_OPEN,
)


def assert_laws(t, settings, vocab):
    """All of them; any tokens may be drawn, banned ones apart."""
    # Steps up to a token of the main stream: its position in the structured layout.
    steps = layout.structured_positions(t.block, t.path, 1)
    assert_steps(t, steps, settings, vocab)
    ids = dict(zip(settings.grammar.tags, vocab.tag_ids, strict=True))
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
    if settings.planned:
        assert_plans(t, left, settings, vocab)
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
    tokens_left, steps_left = left
    after = CLOSING + settings.summary_reserve + settings.answer_reserve
    forced = np.isin(t.tokens, vocab.tag_ids) | (t.tokens == vocab.newline_id)
    forced &= t.forced  # but for labels, nothing else is
    for block in range(1, t.num_blocks + 1):
        first, P = np.flatnonzero(t.block == block)[0], t.path[t.block == block].max()
        assert P == settings.num_paths or settings.planned
        assert 2 <= P <= settings.num_paths
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


def plans_of(t, vocab):
    """First and last tokens of each block's plans."""
    (plan, end_plan), blocks = vocab.plan_ids, []
    opens, summary = vocab.special_ids[PARALLEL], in_summary(t, vocab)
    at, end = 0, len(t.tokens)
    while at < end:
        if t.path[at] or summary[at] or t.tokens[at] != opens:
            at += 1
            continue
        blocks.append([])
        at += 1
        while not t.path[at]:
            assert t.tokens[at] == plan
            last = at + 1 + t.tokens[at + 1 :].tolist().index(end_plan)
            blocks[-1].append((at, last))
            at = last + 1
    return blocks


def assert_plans(t, left, settings, vocab):
    """As many plans as paths; they end in time, and the model chose where it could."""
    num_ids, s = len(vocab.ban_ids), settings
    in_list = (1 << num_ids) - 1 | 1 << ORDINARY
    in_list &= ~(1 << num_ids - 2 | 1 << PATH)  # all but <Plan> and <Path>
    blocks = plans_of(t, vocab)
    assert len(blocks) == t.num_blocks

    def spare(at, number):  # tokens that plans may have once `at` is written
        after = max(2 - number, 0) * s.min_plan_tokens
        after += CLOSING + s.summary_reserve + s.answer_reserve
        paths = max(number, 2) * s.min_path_tokens, s.min_path_tokens
        return min(x[at] - after - inside for x, inside in zip(left, paths))

    for block, plans in enumerate(blocks, 1):
        first = plans[-1][1] + 1
        assert t.block[first] == block and len(plans) == t.path[t.block == block].max()
        for number, (begin, end) in enumerate(plans, 1):
            room = 1 + spare(begin, number)
            room = min(room, s.max_plan_tokens or room)
            assert room >= s.min_plan_tokens and end - begin + 1 <= room
            cut = end - begin + 1 == room or t.tokens[end - 1] in vocab.eos_ids
            assert t.forced[end] == cut
            assert not t.path[begin : end + 1].any()
            one_more = spare(end, number + 1) >= s.min_plan_tokens
            chosen = 2 <= number < s.num_paths and one_more
            assert t.forced[end + 1] == (not chosen)
            assert t.bans[end + 1] == in_list * chosen
        others = (t.tokens == vocab.special_ids[PATH]) & (t.block == block)
        others[first] = False
        begins = np.diff(t.path, prepend=0) > 0
        assert t.forced[others & begins].all()


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
    for plans in plans_of(t, vocab) if settings.planned else ():
        main[plans[0][0] : plans[-1][1] + 2] = False
    np.testing.assert_array_equal(~fits[main], (t.bans >> PARALLEL & 1 == 1)[main])
