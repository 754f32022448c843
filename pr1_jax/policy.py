"""From logits to the policy: bans, temperature, truncation, log-probs of tokens.

The one definition of the policy (docs/method.md, section 3). Sampler and trainer both
use it with the same settings, so that a sampled log-prob equals the teacher-forced one.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

NEG_INF = -1e30
ORDINARY = 30  # bit of bans: all tokens that have no bit of their own
_NORMALISER = "normaliser"  # logarithm of the sum of a position's exponentials


def policy_logits(
    logits,
    bans,
    *,
    special_ids: tuple[int, ...],
    num_tokens: int | None = None,
    temperature: float = 1.0,
):
    """Logits of the policy: divided by the temperature, banned tokens at -1e30.

    Args:
      logits: [..., V] float32.
      bans: [...] int32, bit i set = token `special_ids[i]` is banned here; bit `ORDINARY`
        = every other token is, where no special token has that bit.
      special_ids: ids of the six tags, then those of EOS, then of plans' tags, if any.
      num_tokens: ids from here on are padding of the model's vocabulary, and banned.
      temperature: greater than 0; one number, or one for each distribution [..., 1].
    """
    V, always = logits.shape[-1], jnp.int32(-(2**31))  # a bit that is no tag's
    # Bit i of a token: it is token `special_ids[i]`. One comparison in the loop that
    # reads the logits then bans, on any shard, where a scatter is a pass of its own.
    bits = (
        jnp.zeros(V, jnp.int32)
        .at[jnp.array(special_ids)]
        .add(1 << jnp.arange(len(special_ids)))
    )
    if len(special_ids) <= ORDINARY:
        bits = jnp.where(bits == 0, 1 << ORDINARY, bits)
    if num_tokens is not None and num_tokens < V:
        bits = jnp.where(jnp.arange(V) < num_tokens, bits, always)
    is_banned = bits & (bans[..., None] | always) != 0
    # However improbable a legal token is, a banned one is less probable.
    logits = jnp.maximum(logits.astype(jnp.float32) / temperature, NEG_INF / 1e5)
    return jnp.where(is_banned, NEG_INF, logits)


def truncated(logits, *, top_k: int = 0, top_p: float = 1.0, keep=None):
    """Logits with everything outside the top k, and outside the nucleus, at -1e30.

    Args:
      logits: [..., V] float32.
      top_k: 0 = no limit. top_p: 1 = no limit.
      keep: [...] int32, a token that stays in any case, or None. The trainer names
        the sampled token here: a changed policy may have moved it outside.
    """
    if top_k == 0 and top_p >= 1.0:
        return logits
    ordered = -jnp.sort(-logits, axis=-1)
    threshold = jnp.full(logits.shape[:-1], NEG_INF)
    if top_k:
        threshold = ordered[..., min(top_k, logits.shape[-1]) - 1]
        ordered = jnp.where(ordered >= threshold[..., None], ordered, NEG_INF)
    if top_p < 1.0:
        threshold = jnp.maximum(threshold, _nucleus(ordered, top_p))
    inside = logits >= jax.lax.stop_gradient(threshold)[..., None]
    if keep is not None:
        inside |= jnp.arange(logits.shape[-1]) == keep[..., None]
    return jnp.where(inside, logits, NEG_INF)


def truncated_each(logits, top_p):
    """As `truncated`, with a nucleus [...] of its own for each distribution [..., V].

    Nothing is sorted where all of them are 1.
    """

    def cut(logits):
        nucleus = _nucleus(-jnp.sort(-logits, axis=-1), top_p[..., None])
        threshold = jnp.where(top_p < 1.0, nucleus, NEG_INF)
        return jnp.where(logits >= threshold[..., None], logits, NEG_INF)

    return jax.lax.cond((top_p < 1.0).any(), cut, lambda logits: logits, logits)


def _nucleus(ordered, top_p):
    """The least logit of a nucleus; logits are in descending order."""
    probs = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs  # mass of the likelier tokens
    return jnp.where(before < top_p, ordered, jnp.inf).min(axis=-1)


def token_logps(logits, tokens):
    """Log-probs [...] float32 of tokens [...] under policy logits [..., V]."""
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def logps_and_entropies(
    logits,
    tokens,
    bans,
    *,
    special_ids: tuple[int, ...],
    num_tokens: int | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
):
    """Log-probs [...] float32 of tokens [...], and entropies [...] without gradient.

    Banned tokens add nothing to an entropy. The gradient of a log-prob is
    (one-hot − probabilities) / temperature: said here, since going back through the steps
    of the definition takes many passes over the logits.

    Args:
      logits, bans, special_ids, num_tokens, temperature: as of `policy_logits`.
      top_k, top_p: as of `truncated`.
    """
    policy = _Policy(special_ids, num_tokens, temperature, top_k, top_p)
    return _logps_and_entropies(policy, logits, tokens, bans)


class _Policy(NamedTuple):
    """What is static about a policy."""

    special_ids: tuple[int, ...]
    num_tokens: int | None
    temperature: float
    top_k: int
    top_p: float


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logps_and_entropies(policy: _Policy, logits, tokens, bans):
    return _forward(policy, logits, tokens, bans)[0]


def _forward(policy: _Policy, logits, tokens, bans):
    logits = policy_logits(
        logits,
        bans,
        special_ids=policy.special_ids,
        num_tokens=policy.num_tokens,
        temperature=policy.temperature,
    )
    logits = truncated(logits, top_k=policy.top_k, top_p=policy.top_p, keep=tokens)
    most = jnp.max(logits, axis=-1)
    most = jnp.where(jnp.isfinite(most), most, 0.0)  # as `jax.nn.logsumexp` does
    less = logits - most[..., None]
    shares = jnp.exp(less)
    total = jnp.sum(shares, axis=-1)
    entropies = jnp.log(total) - jnp.sum(shares * less, axis=-1) / total
    normaliser = checkpoint_name(most + jnp.log(total), _NORMALISER)
    chosen = jnp.sum(jnp.where(_one_hot(tokens, logits), logits, 0.0), axis=-1)
    return (chosen - normaliser, entropies), (logits, tokens, normaliser)


def _backward(policy: _Policy, residuals, gradients):
    logits, tokens, normaliser = residuals
    probs = jnp.exp(logits - normaliser[..., None])
    is_chosen = _one_hot(tokens, logits) & (logits > NEG_INF / 2)  # and not banned
    scale = gradients[0] / policy.temperature
    return (is_chosen - probs) * scale[..., None], None, None


_logps_and_entropies.defvjp(_forward, _backward)


def _one_hot(tokens, logits):
    return jnp.arange(logits.shape[-1]) == tokens[..., None]


def sequence_logps(hidden, logps_of, tokens, bans, *, chunk: int = 0):
    """Log-probs and entropies of a batch without holding [B, T, V] at once.

    Args:
      hidden: [B, T, D]; position t predicts tokens[:, t].
      logps_of: maps hidden [n, D], tokens [n] and bans [n] to log-probs and entropies,
        both [n] float32.
      tokens, bans: [B, T] int32.
      chunk: tokens of all rows whose logits are held at once, at most, but at least one
        a row; 0 = all. A chunk has as many of each row, so that devices that split the
        rows split every chunk.

    Returns:
      logps [B, T] float32 and entropies [B, T] float32.
    """
    B, T, _ = hidden.shape

    def of_columns(*columns):  # [B, n, …]
        flat = (x.reshape(-1, *x.shape[2:]) for x in columns)
        return tuple(x.reshape(B, -1) for x in logps_of(*flat))

    size = max(chunk // B, 1) if chunk else T
    if size >= T:
        return of_columns(hidden, tokens, bans)
    size = math.ceil(T / math.ceil(T / size))  # as many chunks, alike: little is padded

    def cut(x):  # to [chunks, B, size, …]
        x = jnp.pad(x, [(0, 0), (0, -T % size)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(B, -1, size, *x.shape[2:]).swapaxes(0, 1)

    # Of a chunk, the backward pass makes logits anew, but not their normalisers.
    kept = jax.checkpoint_policies.save_only_these_names(_NORMALISER)
    one = jax.checkpoint(of_columns, policy=kept)
    chunks = tuple(map(cut, (hidden, tokens, bans)))
    out = jax.lax.map(lambda columns: one(*columns), chunks)
    return tuple(x.swapaxes(0, 1).reshape(B, -1)[:, :T] for x in out)
