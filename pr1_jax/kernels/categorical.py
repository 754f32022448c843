"""Draws from categorical distributions, one random number a draw."""

import math

import jax
import jax.numpy as jnp


def draw(logits, keys, counts):
    """Draws a token a row, and gives its log-prob.

    A draw's randomness depends on its row's key and count alone, so what is drawn does
    not depend on which other rows share the batch.

    Args:
      logits: [L, V] float32. keys: [L] PRNG keys. counts: [L] int32, folded into them.

    Returns:
      tokens [L] int32 and log-probs [L] float32.
    """
    keys = jax.vmap(jax.random.fold_in)(keys, counts)
    tokens = inverse_cdf(logits, jax.vmap(jax.random.uniform)(keys))
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return tokens, chosen - jax.nn.logsumexp(logits, axis=-1)


def inverse_cdf(logits, uniform):
    """The tokens [L] int32 at which the distribution function passes `uniform` [L].

    Gumbel noise would take one random number a token of the vocabulary. The sum runs
    over groups of about √V tokens, then inside the group that it ends in.
    """
    L, V = logits.shape
    width = 2 ** math.ceil(math.log2(V) / 2)
    probs = jnp.exp(logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True))
    probs = jnp.pad(probs, [(0, 0), (0, -V % width)]).reshape(L, -1, width)
    groups = jnp.cumsum(probs.sum(axis=-1), axis=-1)
    target = uniform * groups[:, -1]
    group = _first_above(groups, target)
    before = jnp.take_along_axis(groups, jnp.maximum(group - 1, 0)[:, None], axis=1)
    before = jnp.where(group > 0, before[:, 0], 0.0)
    inside = jnp.take_along_axis(probs, group[:, None, None], axis=1)[:, 0]
    within = jnp.cumsum(inside, axis=-1)
    return (group * width + _first_above(within, target - before)).astype(jnp.int32)


def _first_above(sums, target):
    """Index of the first of the running sums [L, n] above the target [L].

    Where rounding leaves none above it: the last that grew. So an entry of
    probability 0 is never taken.
    """
    last = (sums < sums[:, -1:]).sum(axis=-1)
    return jnp.minimum((sums <= target[:, None]).sum(axis=-1), last)
