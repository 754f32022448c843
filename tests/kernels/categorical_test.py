"""Draws of both backends: tokens follow the policy, whatever the vocabulary's size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pr1_jax import policy
from pr1_jax.kernels import categorical
from pr1_jax.kernels.cpu import decoding
from pr1_jax.model.cpu import Cpu
from pr1_jax.model.xla import Xla
from tests.helpers.tiny import needs_kernels

DRAWS = 20_000
both = pytest.mark.parametrize("backend", [Xla, pytest.param(Cpu, marks=needs_kernels)])


@both
@pytest.mark.parametrize("vocab_size", [1, 2, 5, 16, 24, 63, 65, 300])
def test_draws_follow_the_softmax(vocab_size, backend):
    rng = np.random.default_rng(vocab_size)
    logits = rng.normal(size=vocab_size).astype(np.float32) * 1.5
    banned = rng.random(vocab_size) < 0.3
    banned[rng.integers(vocab_size)] = False
    logits[banned] = policy.NEG_INF
    keys = jnp.broadcast_to(jax.random.key(0), (DRAWS,))
    rows = jnp.broadcast_to(logits, (DRAWS, vocab_size))
    tokens, logps = jax.jit(backend.draw)(rows, keys, jnp.arange(DRAWS))
    probs = np.asarray(jax.nn.softmax(logits), np.float64)
    counts = np.bincount(tokens, minlength=vocab_size)
    assert counts[banned].sum() == 0
    spread = np.sqrt(DRAWS * probs * (1 - probs)) + 1
    assert (np.abs(counts - DRAWS * probs) / spread).max() < 4.5
    np.testing.assert_allclose(logps, np.log(probs[tokens]), atol=1e-5)


@both
@pytest.mark.parametrize("uniform", [0.0, 0.3, 1 - 2**-24, 1.0])
@pytest.mark.parametrize("allowed", [(0,), (7,), (0, 7), (3, 4), (6,)])
def test_a_token_of_probability_0_is_never_taken(uniform, allowed, backend):
    logits = np.full((1, 8), policy.NEG_INF, np.float32)
    logits[0, list(allowed)] = [0.0, -30.0][: len(allowed)]
    args = jnp.asarray(logits), jnp.asarray([uniform], jnp.float32)
    token = (
        decoding.draw(*args)[0] if backend is Cpu else categorical.inverse_cdf(*args)
    )
    assert int(token[0]) in allowed


@needs_kernels
@pytest.mark.parametrize("vocab_size", [7, 100, 1000])
@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_kernels_draw_what_xla_does(vocab_size, impl):
    """But for numbers that fall on the bounds between two tokens, by rounding."""
    key, n = jax.random.key(vocab_size, impl=impl), 2000
    logits = 2 * jax.random.normal(key, (n, vocab_size))
    keys = jax.random.split(key, n)
    tokens, logps = Cpu.draw(logits, keys, jnp.arange(n))
    expected, wanted = Xla.draw(logits, keys, jnp.arange(n))
    np.testing.assert_array_equal(wanted, policy.token_logps(logits, expected))
    same = tokens == expected
    assert same.mean() > 0.995
    np.testing.assert_allclose(logps[same], wanted[same], atol=1e-5)


def test_a_draw_depends_on_its_own_key_and_count_alone():
    logits = jax.random.normal(jax.random.key(1), (6, 40))
    keys = jax.random.split(jax.random.key(2), 6)
    counts = jnp.arange(6) * 3
    tokens, _ = Xla.draw(logits, keys, counts)
    order = jnp.array([4, 0, 2])
    some, _ = Xla.draw(logits[order], keys[order], counts[order])
    np.testing.assert_array_equal(some, tokens[order])
    again, _ = Xla.draw(logits, keys, counts + 1)
    assert (again != tokens).any()
