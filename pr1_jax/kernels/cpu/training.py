"""Layers of a decoder on CPU in C++, forward and backward.

XLA runs each product and each loop of a training step by itself: threads wait for each
other hundreds of times a layer, gradients of weights transpose their operands first, and
what is between products goes through memory. The operations here (`cpu_training.cc`)
give every thread rows of its own, norms and SwiGLU included. They are differentiable
and float32; `library` says where they run.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pr1_jax.kernels.cpu import library

_empty, _call = library.or_empty, library.call


def _gradient(like, value):
    """The gradient of what may be None."""
    return None if like is None else value


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def linear(x, kernel, scale=None, plus=None, eps: float = 0.0):
    """x [M, D] times kernel [D, N], plus `plus` [M, N] if there is one: [M, N].

    Args:
      scale: [D]; x is first divided by its rms and multiplied by this. None: it is not.
      eps: added to the mean square.
    """
    return _linear(x, kernel, scale, plus, eps)[0]


def _linear(x, kernel, scale, plus, eps):
    shapes = [(len(x), kernel.shape[1])]
    args = (x, kernel, _empty(scale), _empty(plus))
    (y,) = _call("linear", shapes, *args, eps=np.float32(eps))
    return y, (x, kernel, scale, plus)


def _linear_back(eps, residuals, dy):
    x, kernel, scale, plus = residuals
    scales = _empty(scale)
    args = (x, kernel, scales)
    shapes = [a.shape for a in args]
    dx, dkernel, dscale = _call("linear_back", shapes, *args, dy, eps=np.float32(eps))
    return dx, dkernel, _gradient(scale, dscale), _gradient(plus, dy)


linear.defvjp(_linear, _linear_back)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def mlp(x, scale, gate, up, down, eps: float):
    """x [M, D] + (silu(h · gate) · (h · up)) · down, with h = x / rms(x) · scale [D].

    Args:
      gate, up: [D, F]. down: [F, D].
    """
    return _mlp(x, scale, gate, up, down, eps)[0]


def _mlp(x, scale, gate, up, down, eps):
    hidden = (len(x), gate.shape[1])
    args = (x, scale, gate, up, down)
    y, *both = _call("mlp", [x.shape, hidden, hidden], *args, eps=np.float32(eps))
    return y, (*args, *both)


def _mlp_back(eps, residuals, dy):
    shapes = [x.shape for x in residuals[:5]]
    return tuple(_call("mlp_back", shapes, *residuals, dy, eps=np.float32(eps)))


mlp.defvjp(_mlp, _mlp_back)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def split_heads(qkv, angles, scales, eps: float):
    """Queries, keys and values of one product, normalised by head and rotated.

    Args:
      qkv: [..., K, R + 2, H] float32; by key head: its R queries, key and value.
      angles: sines and cosines [..., H/2] of rotary positions.
      scales: [H] of the norms of queries and of keys, or None without norms.
      eps: added to their mean squares.

    Returns:
      q [..., K · R, H], k and v [..., K, H].
    """
    return _split(qkv, angles, scales, eps)[0]


def _split(qkv, angles, scales, eps):
    *lead, K, both, H = qkv.shape
    rows = qkv.reshape(-1, K, both, H)
    given = rows, *map(_empty, scales), *(x.reshape(-1, H // 2) for x in angles)
    shapes = [(len(rows), n, H) for n in (K * (both - 2), K, K)]
    heads = _call("split", shapes, *given, eps=np.float32(eps))
    heads = tuple(x.reshape(*lead, *x.shape[1:]) for x in heads)
    return heads, (qkv, angles, scales)


def _split_back(eps, residuals, gradients):
    qkv, angles, scales = residuals
    rows = qkv.reshape(-1, *qkv.shape[-3:])
    M, *_, H = rows.shape
    given = (rows, *map(_empty, scales))
    dqkv, *dscales = _call(
        "split_back",
        [x.shape for x in given],
        *given,
        *(x.reshape(M, H // 2) for x in angles),
        *(x.reshape(M, -1, H) for x in gradients),
        eps=np.float32(eps),
    )
    angles = jax.tree.map(jnp.zeros_like, angles)
    return dqkv.reshape(qkv.shape), angles, tuple(map(_gradient, scales, dscales))


split_heads.defvjp(_split, _split_back)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def attention(q, k, v, block, path, shared: int = 0):
    """Causal attention in which siblings do not see each other (docs/method.md, section 2).

    Of B sequences of T tokens, G in a row have their first S tokens in common. Those
    stand there once, in front of what is left of each.

    Args:
      q: [B / G, S + G (T − S), N, H]. k, v: the same with K heads, N a multiple of K.
      block, path: [B, T] int32 labels; all zero in the first S.
      shared: S. 0 with G = 1 for sequences that stand alone.

    Returns:
      Like q.
    """
    return _attention(q, k, v, block, path, shared)[0]


def _attention(q, k, v, block, path, shared):
    args = (q, k, v, block.astype(jnp.int32), path.astype(jnp.int32))
    shapes = [q.shape, q.shape[:-1]]
    out, normaliser = _call("attention", shapes, *args, shared=np.int64(shared))
    return out, (*args, out, normaliser)


def _attention_back(shared, residuals, gradient):
    shapes = [x.shape for x in residuals[:3]]
    *_, K, H = shapes[1]
    parts = (2, len(residuals[3]), K, shared, H)
    args = *residuals, gradient
    shapes = [*shapes, parts]
    dq, dk, dv, _ = _call("attention_back", shapes, *args, shared=np.int64(shared))
    return dq, dk, dv, None, None


attention.defvjp(_attention, _attention_back)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def token_logps(
    hidden,
    head,
    tokens,
    bans,
    special_ids: tuple[int, ...],
    num_tokens: int | None = None,
    temperature: float = 1.0,
):
    """Log-probs and entropies of tokens, as `policy` defines them, without truncation.

    Args:
      hidden: [M, D]. head: [V, D].
      tokens, bans: [M] int32.
      special_ids, num_tokens, temperature: as of `policy.policy_logits`.

    Returns:
      Log-probs and entropies [M]; these have no gradient.
    """
    options = special_ids, num_tokens, temperature
    return _token_logps(hidden, head, tokens, bans, *options)[0]


def _token_logps(hidden, head, tokens, bans, special_ids, num_tokens, temperature):
    M, V = len(hidden), len(head)
    logps, entropies, probs, back = _call(
        "logps",
        [(M,), (M,), (M, V), hidden.shape],
        *(hidden, head, tokens.astype(jnp.int32), bans.astype(jnp.int32)),
        jnp.array(special_ids, jnp.int32),
        temperature=np.float32(temperature),
        num_tokens=np.int64(min(num_tokens or V, V)),
    )
    return (logps, entropies), (hidden, head, tokens, probs, back)


def _token_logps_back(special_ids, num_tokens, temperature, residuals, gradients):
    hidden, head, tokens, probs, back = residuals
    dlogps = gradients[0] / temperature
    args = hidden, tokens.astype(jnp.int32), probs, dlogps
    (dhead,) = _call("logps_back", [head.shape], *args)
    return dlogps[:, None] * back, dhead, None, None


token_logps.defvjp(_token_logps, _token_logps_back)
