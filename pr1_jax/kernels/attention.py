"""Grouped-query attention in plain JAX: over whole sequences, and over parts of a cache.

`label_attention` follows the layout's visibility rule without a T×T mask: masks are made
from per-token labels where they are used, on TPU in a kernel (`pallas`), elsewhere here.
Queries are handled in chunks, each against the keys up to its own end, so that what lies
in the future costs nothing. Between the passes only outputs and normalisers are kept: the
backward pass makes the scores anew, chunk by chunk, and memory grows with a chunk × T.

`attend_part` is for decoding, where a row's keys lie in two caches: each is attended to
by itself, and `merge` joins the two by their normalisers.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pr1_jax import layout
from pr1_jax.kernels import fusion, pallas
from pr1_jax.kernels.pallas import KEPT
from pr1_jax.kernels.pallas_kernel import NEG_INF

IMPLEMENTATIONS = ("auto", "xla", "pallas")

_SMALLEST_CHUNK = 96  # queries; below it, matrix products are too small on CPU


def group_queries(q, num_kv_heads: int):
    """Queries [B, T, N, H] by the key/value head that they share: [B, K, T · R, H]."""
    B, T, N, H = q.shape
    q = q.reshape(B, T, num_kv_heads, N // num_kv_heads, H).swapaxes(1, 2)
    return q.reshape(B, num_kv_heads, -1, H)


def ungroup_queries(out, like):
    """Undoes `group_queries`: [B, K, T · R, H] to the shape and dtype of `like`."""
    B, T, N, H = like.shape
    K = out.shape[1]
    out = out.reshape(B, K, T, N // K, H).swapaxes(1, 2)
    return out.reshape(like.shape).astype(like.dtype)


def label_attention(
    q,
    k,
    v,
    block,
    path,
    start=None,
    *,
    query_chunk: int = 512,
    implementation: str = "auto",
):
    """Causal attention in which siblings do not see each other (docs/method.md, section 2).

    Args:
      q: [B, Q, N, H], of the last Q of T tokens.
      k, v: [B, T, K, H], N a multiple of K.
      block, path: [B, T] int32 labels; all zero for plain causal attention.
      start: [B, T] int32, index of the first key that a query may see: of the first token
        of its sequence, where a row holds several one after another. None: 0.
      query_chunk: most queries whose scores are held at once by `xla`.
      implementation: of `IMPLEMENTATIONS`. `pallas` compiles for TPU alone; `auto`
        takes it if that is JAX's default backend, else `xla`.

    Returns:
      [B, Q, N, H] in q's dtype; the softmax is float32.

    Raises:
      ValueError: an unknown implementation.
    """
    Q = q.shape[1]
    if chosen(implementation) == "pallas":
        before = k.shape[1] - Q
        q = jnp.pad(q, [(0, 0), (before, 0), (0, 0), (0, 0)])
        return pallas.flash_attention(q, k, v, block, path, start)[:, before:]
    chunk = min(query_chunk, max(_SMALLEST_CHUNK, -(-Q // 4)))
    return _attention(q, k, v, (block, path, start), chunk)


def chosen(implementation: str) -> str:
    """Which of `IMPLEMENTATIONS` is taken, "xla" or "pallas"; `ValueError` if it is none."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"{implementation=} is not one of {IMPLEMENTATIONS}")
    if implementation == "auto":
        return "pallas" if jax.default_backend() == "tpu" else "xla"
    return implementation


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q, k, v, labels, chunk):
    return _forward(q, k, v, labels, chunk)[0]


def _chunks(q, k, chunk: int) -> list[tuple[slice, slice]]:
    """Chunks of queries, as slices of the queries and of all tokens."""
    Q, before = q.shape[1], k.shape[1] - q.shape[1]
    chunks = [(first, min(first + chunk, Q)) for first in range(0, Q, chunk)]
    return [(slice(a, b), slice(before + a, before + b)) for a, b in chunks]


def _scores(q, keys, labels, some: slice):
    """Scores [B, K, C, R, e] float32 of the chunk `some` against the keys up to its end.

    Args:
      q: [B, K, C · R, H], the chunk's. keys: [B, K, T, H]. some: among all tokens.
      labels: blocks, paths and starts, each [B, T]; or None for the last.
    """
    B, K = q.shape[:2]
    end = some.stop

    def is_hidden(block, path, start=None):
        visible = layout.visible_labels(
            block[:, some, None],
            path[:, some, None],
            block[:, None, :end],
            path[:, None, :end],
        )
        hidden = ~visible | (jnp.arange(end) > jnp.arange(some.start, end)[:, None])
        if start is None:
            return hidden
        return hidden | (jnp.arange(end) < start[:, some, None])

    hidden = fusion.made_once(is_hidden, *[x for x in labels if x is not None])
    scores = jnp.einsum(
        "BKQH,BKSH->BKQS", q, keys[:, :, :end], preferred_element_type=jnp.float32
    ) * (q.shape[-1] ** -0.5)
    scores = scores.reshape(B, K, end - some.start, -1, end)
    return jnp.where(hidden[:, None, :, None], NEG_INF, scores)


def _by_head(x):
    """[B, T, K, H] to [B, K, T, H]."""
    return x.swapaxes(1, 2)


def _forward(q, k, v, labels, chunk):
    B, K = len(q), k.shape[2]
    keys, values = _by_head(k), _by_head(v)
    outs, normalisers = [], []
    for own, some in _chunks(q, k, chunk):
        scores = _scores(group_queries(q[:, own], K), keys, labels, some)
        top = scores.max(axis=-1, keepdims=True)
        probs = jnp.exp(scores - top)
        total = probs.sum(axis=-1, keepdims=True)
        out = jnp.einsum(
            "BKQS,BKSH->BKQH",
            probs.astype(v.dtype).reshape(B, K, -1, some.stop),
            values[:, :, : some.stop],
            preferred_element_type=jnp.float32,
        )
        out = out / total.reshape(B, K, -1, 1)
        outs.append(ungroup_queries(out, q[:, own]))
        normalisers.append(top + jnp.log(total))
    out = checkpoint_name(jnp.concatenate(outs, axis=1), KEPT)
    normalisers = [checkpoint_name(x, KEPT) for x in normalisers]
    return out, (q, k, v, labels, out, normalisers)


def _backward(chunk, residuals, gradient):
    q, k, v, labels, out, normalisers = residuals
    B, (K, H) = len(q), k.shape[2:]
    keys, values = _by_head(k), _by_head(v)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    # What a score's own output takes back from its gradient.
    shared = (gradient.astype(jnp.float32) * out).sum(axis=-1, keepdims=True)
    d_keys = jnp.zeros(keys.shape, jnp.float32)
    d_values = jnp.zeros(values.shape, jnp.float32)
    d_queries = []
    for (own, some), normaliser in zip(_chunks(q, k, chunk), normalisers):
        end = some.stop
        queries = group_queries(q[:, own], K)
        back = group_queries(gradient[:, own], K)
        probs = jnp.exp(_scores(queries, keys, labels, some) - normaliser)
        probs = probs.reshape(B, K, -1, end)
        d_probs = product("BKQH,BKSH->BKQS", back, values[:, :, :end])
        d_scores = probs * (d_probs - group_queries(shared[:, own], K)) * H**-0.5
        probs, d_scores = probs.astype(v.dtype), d_scores.astype(q.dtype)
        d_values = d_values.at[:, :, :end].add(product("BKQS,BKQH->BKSH", probs, back))
        d_keys = d_keys.at[:, :, :end].add(
            product("BKQS,BKQH->BKSH", d_scores, queries)
        )
        d_queries.append(
            ungroup_queries(
                product("BKQS,BKSH->BKQH", d_scores, keys[:, :, :end]), q[:, own]
            )
        )
    d_queries = jnp.concatenate(d_queries, axis=1)
    d_keys, d_values = (_by_head(x).astype(k.dtype) for x in (d_keys, d_values))
    return d_queries, d_keys, d_values, None


_attention.defvjp(_forward, _backward)


# --- Parts of a cache ---------------------------------------------------------------


class Part(NamedTuple):
    """Attention over a part of the keys, to be merged with others."""

    out: jax.Array  # [B, K, Q, H] float32, not normalised
    top: jax.Array  # [B, K, Q, 1] float32, greatest score
    total: jax.Array  # [B, K, Q, 1] float32, sum of exp(score − top)


def slot_mask(block, path, slot_block, slot_path, filled) -> jax.Array:
    """Which slots of their row queries may see, bool [B, T, S].

    Args:
      block, path: labels of the queries, [B, T] int32.
      slot_block, slot_path: of the slots, [B, S] int32.
      filled: [B] int32, slots in use, the first ones.
    """
    labels = layout.visible_labels(
        block[..., None], path[..., None], slot_block[:, None], slot_path[:, None]
    )
    is_filled = jnp.arange(slot_path.shape[1]) < filled[:, None]
    return labels & is_filled[:, None]


def mask_bias(mask, queries_per_key: int = 1) -> jax.Array:
    """What to add to scores under a mask.

    It is the same for all layers and is made once: XLA would make it anew in each.

    Args:
      mask: bool [B, T, S].
      queries_per_key: R, query heads that share a key head.

    Returns:
      [B, 1, T · R, S] float32, to be added to scores [B, K, T · R, S].
    """
    bias = jnp.where(mask, 0.0, NEG_INF)[:, None]
    if queries_per_key > 1:
        bias = jnp.repeat(bias, queries_per_key, axis=2)
    return jax.lax.optimization_barrier(bias)


def attend_part(q, keys, values, bias) -> Part:
    """Attends to some of the keys.

    Args:
      q: [B, K, Q, H]. keys: [B, K, H, S]. values: [B, K, S, H].
      bias: float32, of `mask_bias`; broadcasts to [B, K, Q, S]. Where it hides all
        keys, the part has no weight beside one that shows some.
    """
    scores = jnp.einsum("BKQH,BKHS->BKQS", q, keys, preferred_element_type=jnp.float32)
    scores = scores * q.shape[-1] ** -0.5 + bias
    top = scores.max(axis=-1, keepdims=True)
    probs = jnp.exp(scores - top)
    out = jnp.einsum(
        "BKQS,BKSH->BKQH",
        probs.astype(values.dtype),
        values,
        preferred_element_type=jnp.float32,
    )
    return Part(out, top, probs.sum(axis=-1, keepdims=True))


def merge(a: Part, b: Part) -> jax.Array:
    """Attention [B, K, Q, H] over the keys of both parts."""
    top = jnp.maximum(a.top, b.top)
    weight_a, weight_b = jnp.exp(a.top - top), jnp.exp(b.top - top)
    total = a.total * weight_a + b.total * weight_b
    return (a.out * weight_a + b.out * weight_b) / total
