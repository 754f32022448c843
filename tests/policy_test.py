"""Tests of pr1_jax.policy: bans, truncation, log-probs, against plain definitions."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pr1_jax.plan import hlo
from pr1_jax.policy import (
    ORDINARY,
    logps_and_entropies,
    policy_logits,
    sequence_logps,
    token_logps,
    truncated,
)

SPECIAL_IDS = (3, 7, 1)  # in an order of their own: bit 0 is token 3
V = 9


def random_logits(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32) * 2


def policy_of(logits, bans, **kwargs):
    return policy_logits(
        jnp.asarray(logits), jnp.asarray(bans), special_ids=SPECIAL_IDS, **kwargs
    )


def log_softmax(logits):
    logits = logits - logits.max(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


OTHERS = 1 << ORDINARY, [0, 2, 4, 5, 6, 8]  # all but the special ids


@pytest.mark.parametrize(
    "bans, banned",
    [
        (0, []),
        (0b010, [7]),
        (0b101, [3, 1]),
        OTHERS,
        (OTHERS[0] | 0b100, [*OTHERS[1], 1]),
    ],
)
def test_banned_tokens_have_no_probability_and_the_rest_share_it(bans, banned):
    logits, unbanned = random_logits(5, V), policy_of(random_logits(5, V), [0] * 5)
    policy = policy_of(logits, [bans] * 4 + [0], temperature=0.5)
    np.testing.assert_array_equal(policy[4], unbanned[4] / 0.5)  # bans are per position
    logits, policy = logits[:4], policy[:4]
    probs = np.asarray(jax.nn.softmax(policy, axis=-1))
    assert (probs[:, banned] == 0).all()  # exactly
    logits[:, banned] = -np.inf
    np.testing.assert_allclose(probs, np.exp(log_softmax(logits / 0.5)), rtol=2e-5)
    for token in banned:
        logp = token_logps(policy, jnp.full(4, token))
        assert (np.exp(logp) == 0).all()


def test_the_bit_of_ordinary_tokens_is_a_special_one_where_there_are_so_many():
    ids, logits = tuple(range(31)), jnp.zeros((1, 33))
    banned = policy_logits(logits, jnp.array([OTHERS[0]]), special_ids=ids)[0] < -1
    assert np.flatnonzero(banned).tolist() == [30]


def test_padding_of_the_vocabulary_is_banned():
    logits = random_logits(2, V)
    got = policy_of(logits, [0b000, 0b010], num_tokens=6)
    np.testing.assert_array_equal(np.asarray(got)[:, :6], logits[:, :6])
    assert (np.asarray(jax.nn.softmax(got))[:, 6:] == 0).all()
    plain = policy_of(jnp.asarray(logits, jnp.bfloat16), [0b000, 0b010])
    assert plain.dtype == jnp.float32
    for num_tokens in (V, V + 1):
        same = policy_of(logits, [0b000, 0b010], num_tokens=num_tokens)
        np.testing.assert_array_equal(same, policy_of(logits, [0b000, 0b010]))


def truncated_reference(logits, top_k, top_p):
    """Tokens kept: the likeliest `top_k`; of these, until their mass reaches top_p."""
    order = np.argsort(-logits)[: top_k or None]
    probs = np.exp(log_softmax(logits[order].astype(np.float64)))
    kept, mass = set(), 0.0
    for token, prob in zip(order, probs):
        if mass >= top_p:
            break
        kept.add(int(token))
        mass += prob
    return kept


@pytest.mark.parametrize(
    "top_k, top_p",
    [(0, 1.0), (3, 1.0), (1, 1.0), (0, 0.6), (0, 1e-6), (4, 0.7), (99, 1.0)],
)
def test_truncation_keeps_what_the_plain_definition_keeps(top_k, top_p):
    logits = random_logits(30, V)
    got = np.asarray(truncated(jnp.asarray(logits), top_k=top_k, top_p=top_p))
    for before, after in zip(logits, got):
        kept = truncated_reference(before, top_k, top_p)
        assert set(np.flatnonzero(after > -1e29).tolist()) == kept
        np.testing.assert_array_equal(after[list(kept)], before[list(kept)])


def test_truncation_spares_the_named_token_only():
    logits = jnp.asarray([[0.0, 1.0, 2.0, 3.0]] * 2)
    keep = jnp.array([0, 3])
    for limits in ({"top_k": 2}, {"top_p": 0.7}):  # probabilities .03 .09 .24 .64
        got = np.asarray(truncated(logits, **limits, keep=keep)) > -1e29
        np.testing.assert_array_equal(got, [[1, 0, 1, 1], [0, 0, 1, 1]])


def test_truncation_of_banned_logits_never_brings_them_back():
    policy = policy_of(random_logits(1, V), [0b111])
    for limits in ({"top_k": 8}, {"top_p": 0.9999}, {"top_k": 8, "top_p": 0.9999}):
        probs = jax.nn.softmax(truncated(policy, **limits))
        assert (np.asarray(probs)[0, list(SPECIAL_IDS)] == 0).all()


def test_entropy_is_the_log_of_the_number_of_equal_choices():
    def entropies(logits, bans):
        tokens = jnp.zeros(len(logits), int)
        return logps_and_entropies(logits, tokens, bans, special_ids=SPECIAL_IDS)[1]

    found = entropies(jnp.full((3, V), 4.2), jnp.array([0, 0b001, 0b111]))
    np.testing.assert_allclose(found, np.log([V, V - 1, V - 3]), rtol=1e-6)
    certain = jnp.zeros((1, V)).at[0, 2].set(60.0)
    np.testing.assert_allclose(entropies(certain, jnp.zeros(1, int)), 0, atol=1e-6)


@pytest.mark.parametrize(
    "limits", [{}, {"top_k": 4}, {"top_p": 0.7}, {"top_k": 4, "top_p": 0.7}], ids=str
)
def test_logps_entropies_and_gradient_are_those_of_the_plain_definition(limits):
    """Step by step: logits of the policy, truncation, softmax, and what JAX derives."""
    rng = np.random.default_rng(0)
    logits, bans = random_logits(60, V), rng.integers(0, 8, 60)
    settings = {"num_tokens": V - 1, "temperature": 0.7}
    tokens = rng.integers(0, V, 60)  # banned ones too, and padding
    weights = jnp.asarray(rng.normal(size=60), jnp.float32)

    def plain(logits):
        policy = policy_of(logits, bans, **settings)
        every = jax.nn.log_softmax(truncated(policy, **limits, keep=tokens))
        entropies = -jnp.sum(jnp.exp(every) * jnp.maximum(every, -1e9), axis=-1)
        return every[jnp.arange(60), tokens], jax.lax.stop_gradient(entropies)

    def found(logits):
        return logps_and_entropies(
            logits,
            tokens,
            jnp.asarray(bans),
            special_ids=SPECIAL_IDS,
            **settings,
            **limits,
        )

    def gradient(function):
        total = lambda x: sum((weights * y).sum() for y in function(x))
        return jax.grad(total)(jnp.asarray(logits))

    for a, b in zip(found(logits), plain(logits), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    np.testing.assert_allclose(gradient(found), gradient(plain), atol=1e-6)


def test_devices_that_split_the_rows_split_every_chunk():
    """None computes a chunk's logits, or adds them up, for the others."""
    B, T, D, words, chunk = 8, 32, 16, 512, 64
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    rows, everywhere = (NamedSharding(mesh, x) for x in (P("fsdp"), P()))
    hidden = jax.device_put(np.ones((B, T, D), np.float32), rows)
    tokens = jax.device_put(np.zeros((B, T), np.int32), rows)
    head = jax.device_put(np.ones((words, D), np.float32), everywhere)

    def loss(head, hidden):
        def logps_of(hidden, tokens, bans):
            del bans
            return logps_and_entropies(
                hidden @ head.T, tokens, jnp.zeros_like(tokens), special_ids=(0,)
            )

        logps, entropies = sequence_logps(hidden, logps_of, tokens, tokens, chunk=chunk)
        return logps.sum() + entropies.sum()

    compiled = jax.jit(jax.grad(loss)).lower(head, hidden).compile()
    program = hlo.parse(compiled.as_text())
    every = [x for c in program.computations.values() for x in c.values()]
    names = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all")
    moved = [a for x in every if x.opcode.startswith(names) for a in x.results]
    assert moved and max(math.prod(a.dims) for a in moved) <= words * D
    made = [a for x in every for a in x.results if words in a.dims]
    assert max(math.prod(a.dims) for a in made) <= max(chunk // 8, D) * words


@pytest.mark.parametrize("T, chunk, computed", [(9, 8, 10), (9, 9, 9), (12, 5, 12)])
def test_chunks_are_alike_so_that_few_positions_are_padded(T, chunk, computed):
    sizes = []

    def logps_of(hidden, tokens, bans):
        sizes.append(len(hidden))
        return (hidden.sum(axis=-1),) * 2

    tokens = jnp.zeros((1, T), jnp.int32)
    hidden = jnp.arange(T, dtype=jnp.float32)[None, :, None]
    out, _ = sequence_logps(hidden, logps_of, tokens, tokens, chunk=chunk)
    np.testing.assert_array_equal(out, hidden[..., 0])
    assert {-(-T // n) * n for n in sizes} == {computed}
    assert max(sizes) <= chunk


@pytest.mark.parametrize("limits", [{}, {"top_k": 4, "top_p": 0.8}])
def test_sequence_logps_in_chunks_equal_all_at_once(limits):
    rng = np.random.default_rng(0)
    hidden, head = random_logits(2, 7, 8), random_logits(V, 8, seed=1) / 2
    tokens, bans = rng.integers(0, V, (2, 7)), rng.integers(0, 8, (2, 7))
    bits = (bans[..., None] >> np.arange(3)) & 1
    banned = np.zeros((2, 7, V), bool)
    for bit, token in enumerate(SPECIAL_IDS):
        banned[..., token] = bits[..., bit] == 1
    of_tokens = lambda x: np.take_along_axis(x, tokens[..., None], -1)[..., 0]
    tokens = np.where(of_tokens(banned), 0, tokens)
    settings = {"special_ids": SPECIAL_IDS, "temperature": 1.5, **limits}

    @functools.partial(jax.jit, static_argnums=1)
    def value_and_gradient(hidden, chunk):
        def total(hidden):
            logps_of = lambda h, tokens, bans: logps_and_entropies(
                h @ head.T, tokens, bans, **settings
            )
            out = sequence_logps(hidden, logps_of, tokens, bans, chunk=chunk)
            return (out[0] * np.arange(14).reshape(2, 7)).sum() + out[1].sum(), out

        return jax.value_and_grad(total, has_aux=True)(hidden)

    (_, (logps, entropies)), gradient = value_and_gradient(hidden, 0)
    for chunk in (1, 4, 5):  # 1 or 2 of each row; 2 does not divide 7
        (_, out), other = value_and_gradient(hidden, chunk)
        np.testing.assert_allclose(out[0], logps, atol=1e-5)
        np.testing.assert_allclose(out[1], entropies, atol=1e-5)
        np.testing.assert_allclose(other, gradient, atol=1e-4)
    if not limits:
        scores = np.where(banned, -np.inf, hidden @ head.T / 1.5)
        every = log_softmax(scores)
        np.testing.assert_allclose(logps, of_tokens(every), atol=1e-4)
        finite = np.where(banned, 0.0, every)
        expected = -(np.exp(every) * finite).sum(-1)
        np.testing.assert_allclose(entropies, expected, atol=1e-4)
