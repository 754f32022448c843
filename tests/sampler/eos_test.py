"""Responses that several EOS ids may end."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pr1_jax.sampler.sampler import Sampler
from pr1_jax.sampler.schedule import Batching
from pr1_jax.sampler.settings import PARALLEL, Settings
from tests.helpers.laws import in_summary
from tests.helpers.tiny import VOCAB

VOCAB_SIZE = 24
SETTINGS = Settings(
    max_prompt_tokens=2,
    max_response_tokens=60,
    max_path_tokens=9,
    max_summary_tokens=7,
    summary_reserve=3,
    answer_reserve=3,
)


@pytest.mark.parametrize("ban_illegal", [True, False])
def test_any_of_several_eos_ids_ends_a_response(ban_illegal):
    """It ends the main stream alone, is banned elsewhere, and is trained as drawn."""
    vocab = dataclasses.replace(VOCAB, special_ids=(*VOCAB.special_ids, 17, 5))
    settings = dataclasses.replace(SETTINGS, ban_illegal=ban_illegal)
    liking = np.zeros(VOCAB_SIZE, np.float32)
    liking[[*vocab.eos_ids, VOCAB.special_ids[PARALLEL]]] = 1.0, 1.5, 2.0, 2.5

    def decode_fn(params, lanes, state, num_lanes):
        return jnp.broadcast_to(params, (num_lanes, VOCAB_SIZE)), state.cache

    batching = Batching(rows=32, one_size=True)
    sampler = Sampler(None, vocab, settings, batching, decode_fn=decode_fn)
    prompts, key = [[3, 4]] * 64, jax.random.key(0)
    found, _ = sampler.sample(jnp.asarray(liking), prompts, 1, key)
    assert {*vocab.eos_ids} == {int(t.tokens[-1]) for t in found if t.finished}
    inside = 0
    for t in found:
        is_eos = np.isin(t.tokens, vocab.eos_ids)
        main = (t.path == 0) & (~in_summary(t, vocab))
        assert (
            np.flatnonzero(is_eos & main).tolist() == [len(t.tokens) - 1] * t.finished
        )
        inside += int((is_eos & ~main).sum())
        after = np.flatnonzero(is_eos & ~main) + 1  # what a block's EOS is followed by
        closing = np.where(t.path > 0, *VOCAB.special_ids[3:6:2])
        assert (t.tokens[after] == closing[after]).all() and t.forced[after].all()
        weights = np.tile(np.exp(liking), (len(t.tokens), 1))
        bits = t.bans[:, None] >> np.arange(len(vocab.special_ids)) & 1
        weights[:, vocab.special_ids] *= 1 - bits
        chosen = weights[np.arange(len(t.tokens)), t.tokens] / weights.sum(axis=1)
        drawn = ~t.forced
        np.testing.assert_allclose(t.logps[drawn], np.log(chosen[drawn]), atol=1e-5)
    assert (inside == 0) == ban_illegal
