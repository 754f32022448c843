"""Draws from categorical distributions, one random number a draw.

The number has 47 bits, in two parts of float32: with the 24 that one float32 holds, most
tokens of a large vocabulary's improbable tail could never be drawn.
"""

import math

import jax
import jax.numpy as jnp

# A coarse part is a multiple of this. Sums of such numbers up to 2 are exact in float32.
COARSE = 2.0**-23


def draw(logits, keys, counts, axis: str | None = None):
    """Draws a token a row, and gives its log-prob.

    A draw's randomness depends on its row's key and count alone, so what is drawn does
    not depend on which other rows share the batch.

    Args:
      logits: [L, V] float32. keys: [L] PRNG keys. counts: [L] int32, folded into them.
      axis: as of `inverse_cdf`.

    Returns:
      tokens [L] int32 and log-probs [L] float32.
    """
    return inverse_cdf(logits, uniform(keys, counts), axis)


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


def inverse_cdf(logits, numbers, axis: str | None = None):
    """Where the distribution function passes `numbers` [L, 2], and how probable that is.

    Gumbel noise would take one random number a token of the vocabulary. The sum runs
    over groups of about √V tokens, then inside the group that it ends in. It is kept in
    two parts, so that it does not lose what is far smaller than what it has reached.

    Args:
      logits: [L, V] float32. numbers: as of `uniform`.
      axis: of the mesh, inside `jax.shard_map`, that splits the vocabulary: `logits` are
        then this device's. Groups lie within devices, which tell each other the masses
        of all groups, and the logits of the chosen one.

    Returns:
      tokens [L] int32 and their log-probs [L] float32.
    """
    (L, V), shards = logits.shape, jax.lax.axis_size(axis) if axis else 1
    width = 2 ** math.ceil(math.log2(V * shards) / 2)
    normalisers = _normalisers(logits, axis)
    groups = jnp.pad(logits, [(0, 0), (0, -V % width)], constant_values=-jnp.inf)
    groups = groups.reshape(L, -1, width)
    count = groups.shape[1]
    probs = jnp.exp(groups - normalisers[:, None, None])
    masses = jnp.stack([part.sum(axis=-1) for part in _parts(probs)])
    if axis:
        masses = jax.lax.all_gather(masses, axis, axis=2, tiled=True)
    sums = jnp.cumsum(masses, axis=-1)
    missing = (sums[0, :, -1] - 1.0) + sums[1, :, -1]  # of the total, by rounding
    coarse, fine = numbers[:, 0], numbers[:, 1]
    target = jnp.stack([coarse, fine + coarse * missing])
    group = _first_above(masses, sums, target)
    before = _pick(sums, group - 1)  # 0 of the first one
    inside = _group(groups, group, axis)
    parts = jnp.stack(_parts(jnp.exp(inside - normalisers[:, None])))
    within = _first_above(parts, jnp.cumsum(parts, axis=-1), target - before)
    first = group // count * V + group % count * width
    logps = _pick(inside, within) - normalisers
    return (first + within).astype(jnp.int32), logps


def _normalisers(logits, axis: str | None):
    """Logarithms [L] of the sums of exponentials of logits [L, V], of all devices."""
    own = jax.nn.logsumexp(logits, axis=-1)
    if not axis:
        return own
    return jax.nn.logsumexp(jax.lax.all_gather(own, axis), axis=0)


def _group(groups, number, axis: str | None):
    """Entries [L, width] of groups [L, n, width] at numbers [L], counted over devices."""
    if not axis:
        return jnp.take_along_axis(groups, number[:, None, None], axis=1)[:, 0]
    number -= jax.lax.axis_index(axis) * groups.shape[1]
    is_mine = (number >= 0) & (number < groups.shape[1])
    number = jnp.clip(number, 0, groups.shape[1] - 1)
    mine = jnp.take_along_axis(groups, number[:, None, None], axis=1)[:, 0]
    return jax.lax.psum(jnp.where(is_mine[:, None], mine, 0.0), axis)


def _parts(x):
    """The coarse and the fine part of numbers from 0 to 1, exactly."""
    coarse = jnp.floor(x / COARSE) * COARSE
    return coarse, x - coarse


def _pick(x, index):
    """Entries [..., L] of x [..., L, n] at index [L]; 0 where that is none of x's."""
    return jnp.sum(jnp.where(jnp.arange(x.shape[-1]) == index[:, None], x, 0.0), -1)


def _first_above(masses, sums, target):
    """Index [L] of the first of running sums [2, L, n] above the target [2, L].

    Entries of mass 0 are never taken. Where rounding leaves none above the target, it is
    the last one that has a mass.
    """
    has_mass = masses[0] + masses[1] > 0
    coarse, fine = sums - target[..., None]
    index = jnp.arange(has_mass.shape[-1])
    is_above = has_mass & (coarse + fine > 0)
    first = jnp.where(is_above, index, len(index)).min(axis=-1)
    last = jnp.where(has_mass, index, 0).max(axis=-1)
    return jnp.where(first < len(index), first, last)
