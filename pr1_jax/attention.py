"""Grouped-query attention under the layout's visibility rule, without a T×T mask.

Masks are made from per-token labels where they are used. Long sequences are handled
in chunks of queries, each recomputed in the backward pass, so memory grows with
`query_chunk` × T instead of T × T.
"""

import jax
import jax.numpy as jnp

from pr1_jax import layout

NEG_INF = -1e30  # finite: a row with no visible key gives zeros, not NaN


def masked_attention(q, k, v, mask):
    """Softmax attention with an explicit mask.

    Args:
      q: [B, T, N, H].
      k, v: [B, S, K, H], N a multiple of K.
      mask: bool [B, T, S], True = visible.

    Returns:
      [B, T, N, H] in q's dtype; the softmax is float32.
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    q = q.reshape(B, T, K, N // K, H) * (H**-0.5)
    scores = jnp.einsum("BTKRH,BSKH->BKRTS", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores, NEG_INF)
    probs = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("BKRTS,BSKH->BTKRH", probs, v).reshape(B, T, N, H)


def label_attention(q, k, v, block, path, *, query_chunk: int = 512):
    """Causal attention in which siblings do not see each other (spec section 2).

    Args:
      q: [B, T, N, H].
      k, v: [B, T, K, H].
      block, path: [B, T] int32 labels; all zero for plain causal attention.
      query_chunk: most queries whose scores are held at once.

    Returns:
      [B, T, N, H].
    """
    T = q.shape[1]
    index = jnp.arange(T)

    def attend(q, block_q, path_q, index_q):
        mask = layout.visible_labels(
            block_q[:, :, None], path_q[:, :, None], block[:, None], path[:, None]
        ) & (index_q[:, None] >= index)
        return masked_attention(q, k, v, mask)

    if T <= query_chunk:
        return attend(q, block, path, index)
    pad = -T % query_chunk

    def chunks(x):  # [B, T, …] -> [T / query_chunk, B, query_chunk, …]
        x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(x.shape[0], -1, query_chunk, *x.shape[2:]).swapaxes(0, 1)

    index_q = jnp.arange(T + pad).reshape(-1, query_chunk)
    out = jax.lax.map(
        lambda args: jax.checkpoint(attend)(*args),
        (chunks(q), chunks(block), chunks(path), index_q),
    )
    return out.swapaxes(0, 1).reshape(q.shape[0], T + pad, *q.shape[2:])[:, :T]
