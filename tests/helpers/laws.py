"""What holds of every response, whatever the model: critical path, deadline, labels."""

import numpy as np

from pr1_jax import layout
from pr1_jax.sampler.settings import EOS, SUMMARY_OPEN


def assert_steps(t, settings, vocab):
    """Its sequential steps are its critical path, and within the deadline.

    Steps up to a token of the main stream are its position in the structured layout.
    """
    steps = layout.structured_positions(t.block, t.path, 1)
    longest = sum(
        np.bincount(t.path[t.block == b])[1:].max() for b in range(1, t.num_blocks + 1)
    )
    assert t.sequential_steps == (t.path == 0).sum() + longest == steps[-1]
    if settings.variant == "structured":
        assert t.positions[-1] - len(t.prompt) + 1 == t.sequential_steps
    assert len(t.tokens) <= settings.max_response_tokens
    deadline = settings.max_sequential_steps or 10**6
    assert t.sequential_steps <= deadline
    full = len(t.tokens) == settings.max_response_tokens
    assert t.finished or full or t.sequential_steps == deadline
    assert not t.finished or t.tokens[-1] in vocab.special_ids[EOS:]
    _assert_reserves(t, steps, deadline, settings, vocab)


def _assert_reserves(t, steps, deadline, settings, vocab):
    """Summaries begin and end with room for what is to follow."""
    forced = np.flatnonzero(t.forced & (t.path == 0))
    opened = forced[t.tokens[forced] == vocab.special_ids[SUMMARY_OPEN]]
    assert len(opened) == t.num_blocks
    answer = settings.answer_reserve
    for index in opened:
        left = min(settings.max_response_tokens - index - 1, deadline - steps[index])
        assert left >= settings.summary_reserve + answer
        closing = t.tokens[index:] == vocab.special_ids[SUMMARY_OPEN + 1]
        end = index + np.flatnonzero(closing)[0]
        assert settings.max_response_tokens - end - 1 >= answer
        assert deadline - steps[end] >= answer


def assert_labels(t, settings, vocab):
    """Every path begins with its label, which the runtime wrote; nothing else does."""
    for block in range(1, t.num_blocks + 1):
        lengths = np.bincount(t.path[t.block == block])[1:]
        assert len(lengths) == settings.num_paths
        assert 2 <= lengths.min()
        assert lengths.max() <= (settings.max_path_tokens or 10**6)
    labels = vocab.label_ids or ((),) * settings.num_paths
    forced = np.isin(t.tokens, vocab.tag_ids) | (t.tokens == vocab.newline_id)
    starts = np.flatnonzero(np.diff(t.path, prepend=0) * (t.path > 0))
    assert len(starts) == t.num_blocks * settings.num_paths
    for start in starts:
        label = labels[t.path[start] - 1]
        mine = np.arange(start + 1, start + 1 + len(label))
        assert tuple(t.tokens[mine]) == label
        assert t.forced[mine].all() and (t.path[mine] == t.path[start]).all()
        forced[mine] = True
    assert not (t.forced & ~forced).any()
    assert (t.logps[t.forced] == 0).all() and (t.bans[t.forced] == 0).all()
