"""Draws of both backends: tokens follow the policy, whatever the vocabulary's size."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pr1_jax import policy
from pr1_jax.kernels import categorical
from pr1_jax.kernels.cpu import decoding
from pr1_jax.model.cpu import Cpu
from pr1_jax.model.xla import Xla
from pr1_jax.plan import hlo
from pr1_jax.system.mesh import make_mesh
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


def invert(backend, logits, numbers):
    """Tokens [L] of numbers [L] float64, multiples of 2^-47, for logits [V] of all."""
    numbers = np.asarray(numbers)
    coarse = np.floor(numbers * 2**23) / 2**23
    numbers = jnp.asarray(np.stack([coarse, numbers - coarse], -1), jnp.float32)
    rows = jnp.broadcast_to(logits, (len(numbers), len(logits)))
    if backend is Cpu:
        return np.asarray(decoding.draw(rows, numbers)[0])
    return np.asarray(categorical.inverse_cdf(rows, numbers)[0])


@both
@pytest.mark.parametrize("uniform", [0.0, 0.3, 1 - 2**-24, 1 - 2**-47, 1.0])
@pytest.mark.parametrize("allowed", [(0,), (7,), (0, 7), (3, 4), (6,)])
def test_a_token_of_probability_0_is_never_taken(uniform, allowed, backend):
    logits = np.full(8, policy.NEG_INF, np.float32)
    logits[list(allowed)] = [0.0, -30.0][: len(allowed)]
    assert invert(backend, logits, [uniform])[0] in allowed


@both
@pytest.mark.parametrize("start", [0, 69_960, 70_001, 151_896])
def test_every_token_of_a_large_vocabularys_tail_can_be_drawn(start, backend):
    """The tail has a probability of 0.001, that of a token is less than 2^-27."""
    vocab_size, tail, head, n = 151_936, 1e-3, 70_000, 40
    each = tail / (vocab_size - 1)
    logits = np.full(vocab_size, np.log(each), np.float32)
    logits[head] = np.log1p(-tail)
    first = start * each if start < head else 1 - (vocab_size - start) * each
    tokens = invert(backend, logits, first + each * np.arange(0.25, n, 0.5))
    # Rounding of the head's probability moves those behind it, by up to 10 tokens.
    drawn, counts = np.unique(tokens[tokens != head], return_counts=True)
    assert len(drawn) > n - 15
    np.testing.assert_array_equal(drawn, drawn[0] + np.arange(len(drawn)))
    assert counts[1:-1].max() <= 3


@both
def test_random_numbers_have_47_bits(backend):
    """Each bit is set in half of them, alone and beside each other bit."""
    keys = jax.random.split(jax.random.key(3), 50)
    counts = jnp.arange(400, dtype=jnp.int32) ** 3
    keys, counts = jnp.repeat(keys, 400), jnp.tile(counts, 50)
    uniform = decoding.uniform if backend is Cpu else categorical.uniform
    parts = np.asarray(uniform(keys, counts))
    folded = jax.vmap(jax.random.fold_in)(keys, counts)
    np.testing.assert_array_equal(parts[:, 0], jax.vmap(jax.random.uniform)(folded))
    whole = (np.float64(parts).sum(-1) * 2**47).astype(np.int64)
    assert (whole / 2**47 == np.float64(parts).sum(-1)).all()
    bits = 2 * (whole[:, None] >> np.arange(47) & 1) - 1
    spread = bits.T @ bits / len(bits) ** 0.5 - len(bits) ** 0.5 * np.eye(47)
    assert np.abs(spread).max() < 4.5
    assert np.abs(bits.sum(0)).max() < 4 * len(bits) ** 0.5


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
    assert (~same).sum() <= 1
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


def test_devices_that_split_the_vocabulary_draw_what_one_does():
    """They tell each other masses of groups and one group's logits, and no more."""
    rows, vocab_size = 64, 1036
    mesh = make_mesh(tensor=4, devices=jax.devices()[:4])
    logits = 3 * jax.random.normal(jax.random.key(1), (rows, vocab_size))
    logits = logits.at[:, 5].set(policy.NEG_INF).at[0, vocab_size // 4 :].set(-1e25)
    keys, counts = jax.random.split(jax.random.key(2), rows), jnp.arange(rows)
    split = jax.jit(
        jax.shard_map(
            functools.partial(Xla.draw, axis="tensor"),
            mesh=mesh,
            in_specs=(P(None, "tensor"), P(), P()),
            out_specs=P(),
            check_vma=False,
        )
    )
    tokens, logps = split(logits, keys, counts)
    expected, wanted = Xla.draw(logits, keys, counts)
    np.testing.assert_array_equal(tokens, expected)
    assert len(np.unique(np.asarray(tokens) * 4 // vocab_size)) == 4  # from all devices
    np.testing.assert_allclose(logps, wanted, atol=1e-5)
    program = hlo.parse(split.lower(logits, keys, counts).compile().as_text())
    every = [x for c in program.computations.values() for x in c.values()]
    moved = [a for x in every if x.opcode.startswith("all-") for a in x.results]
    largest = max(math.prod(a.dims) for a in moved)
    assert 0 < largest <= 2 * rows * 2 ** math.ceil(math.log2(vocab_size) / 2 + 1)
