"""Draws tokens from logits, on device (spec sections 3 and 4)."""

import math

import jax
import jax.numpy as jnp

from pr1_jax import policy
from pr1_jax.kernels.cpu import decoding


def draw(
    logits, keys, counts, *, greedy: bool = False, live=None, kernels: bool = False
):
    """Draws a token a lane and its log-prob.

    The randomness of a draw is a function of its lane's key and count alone, so what
    is drawn does not depend on which others share the batch.

    Args:
      logits: [L, V] float32 policy logits, as `losses.policy_logits` makes them.
      keys: [L] PRNG keys.
      counts: [L] int32, folded into the keys.
      greedy: take the most likely token instead.
      live: scalar int32, lanes that are wanted, the first ones; None = all.
      kernels: whether those of `cpu_kernels` run here.

    Returns:
      tokens [L] int32 and log-probs [L] float32.
    """
    if greedy:
        tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    else:
        if kernels and jax.random.key_impl(keys) == "threefry2x32":
            uniform = decoding.uniform(keys, counts)
        else:
            keys = jax.vmap(jax.random.fold_in)(keys, counts)
            uniform = jax.vmap(jax.random.uniform)(keys)
        if kernels:
            return decoding.draw(logits, uniform, live)
        tokens = _inverse_cdf(logits, uniform)
    return tokens, policy.token_logps(logits, tokens)


def _inverse_cdf(logits, uniform):
    """The tokens [L] int32 at which the distribution function passes `uniform` [L].

    One random number a draw, where Gumbel noise takes one a token of the vocabulary.
    The sum runs over groups of about √V tokens, then inside the group that it hits.
    """
    L, V = logits.shape
    width = 2 ** math.ceil(math.log2(V) / 2)
    probs = jnp.exp(logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True))
    probs = jnp.pad(probs, [(0, 0), (0, -V % width)]).reshape(L, -1, width)
    groups = jnp.cumsum(probs.sum(axis=-1), axis=-1)
    target = uniform * groups[:, -1]
    group = _first_above(groups, target)
    at = lambda x, i: jnp.take_along_axis(x, i[:, None], axis=1)[:, 0]
    before = jnp.where(group > 0, at(groups, jnp.maximum(group - 1, 0)), 0.0)
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
