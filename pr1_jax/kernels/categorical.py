"""Draws from categorical distributions, one random number a draw.

The number has 47 bits, in two parts of float32: with the 24 that one float32 holds, most
tokens of a large vocabulary's improbable tail could never be drawn.
"""

import math

import jax
import jax.numpy as jnp

# A coarse part is a multiple of this. Sums of such numbers up to 2 are exact in float32.
COARSE = 2.0**-23


def draw(logits, keys, counts):
    """Draws a token a row, and gives its log-prob.

    A draw's randomness depends on its row's key and count alone, so what is drawn does
    not depend on which other rows share the batch.

    Args:
      logits: [L, V] float32. keys: [L] PRNG keys. counts: [L] int32, folded into them.

    Returns:
      tokens [L] int32 and log-probs [L] float32.
    """
    tokens = inverse_cdf(logits, uniform(keys, counts))
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return tokens, chosen - jax.nn.logsumexp(logits, axis=-1)


def uniform(keys, counts):
    """Numbers from 0 to 1 of keys into which counts are folded, in two parts.

    The coarse part is what `jax.random.uniform` gives; the fine one is below 2^-23.

    Args:
      keys: [L] PRNG keys. counts: [L] int32.

    Returns:
      [L, 2] float32, coarse and fine; their sum, a multiple of 2^-47, is the number.
    """
    keys = jax.vmap(jax.random.fold_in)(keys, counts)
    first, second = jax.vmap(lambda key: jax.random.bits(key, (2,)))(keys).T
    fine = (first & 0x1FF) << 15 | second >> 17
    return jnp.stack([(first >> 9) * COARSE, fine * 2.0**-47], axis=-1)


def inverse_cdf(logits, numbers):
    """The tokens [L] int32 at which the distribution function passes `numbers` [L, 2].

    Gumbel noise would take one random number a token of the vocabulary. The sum runs
    over groups of about √V tokens, then inside the group that it ends in. It is kept in
    two parts, so that it does not lose what is far smaller than what it has reached.

    Args:
      logits: [L, V] float32. numbers: as of `uniform`.
    """
    L, V = logits.shape
    width = 2 ** math.ceil(math.log2(V) / 2)
    probs = jnp.exp(logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True))
    probs = jnp.pad(probs, [(0, 0), (0, -V % width)]).reshape(L, -1, width)
    masses = [part.sum(axis=-1) for part in _parts(probs)]
    sums = _running_sums(masses)
    missing = (sums[0][:, -1] - 1.0) + sums[1][:, -1]  # of the total, by rounding
    coarse, fine = numbers[:, 0], numbers[:, 1]
    target = coarse, fine + coarse * missing
    group = _first_above(masses, sums, target)
    before = [jnp.pad(x, [(0, 0), (1, 0)]) for x in sums]
    before = [jnp.take_along_axis(x, group[:, None], axis=1)[:, 0] for x in before]
    inside = jnp.take_along_axis(probs, group[:, None, None], axis=1)[:, 0]
    inside = _parts(inside)
    rest = [x - y for x, y in zip(target, before, strict=True)]
    within = _first_above(inside, _running_sums(inside), rest)
    return (group * width + within).astype(jnp.int32)


def _parts(x):
    """The coarse and the fine part of numbers from 0 to 1, exactly."""
    coarse = jnp.floor(x / COARSE) * COARSE
    return coarse, x - coarse


def _running_sums(parts):
    return [jnp.cumsum(part, axis=-1) for part in parts]


def _first_above(masses, sums, target):
    """Index [L] of the first of running sums [L, n] above the target [L], in two parts.

    Entries of mass 0 are never taken. Where rounding leaves none above the target, it is
    the last one that has a mass.
    """
    has_mass = masses[0] + masses[1] > 0
    coarse, fine = (x - y[:, None] for x, y in zip(sums, target, strict=True))
    is_above = has_mass & (coarse + fine > 0)
    last = (has_mass * jnp.arange(has_mass.shape[-1])).max(axis=-1)
    return jnp.where(is_above.any(axis=-1), is_above.argmax(axis=-1), last)
