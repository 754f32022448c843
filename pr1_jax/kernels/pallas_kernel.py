"""The kernels of `pallas`: tiles of scores, their sums and their gradients.

Both get queries, and what is shaped like them, as [R, H, tq], of the heads that share a
key head; keys and values as [held, H]; scores are [tk, tq].
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.sharding import AbstractMesh

NEG_INF = -1e30  # finite: a row with no visible key gives no NaN
HIDDEN, PARTLY, VISIBLE = range(3)  # kinds of tiles
PATH_BITS = 16  # of a label in one integer: its path; those above are its block


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static about a call."""

    tokens: int  # T, a multiple of `held`
    tile_q: int
    tile_k: int
    held: int  # keys that are in VMEM at once, a multiple of both tiles
    interpret: bool
    mesh: AbstractMesh | None  # None: the kernels run where they are called
    batch: tuple[str, ...] | None = None  # mesh axes that sequences are split over
    heads: str | None = None  # mesh axis that heads are split over


def on_shards(plan, function: Callable, in_specs, out_specs) -> Callable:
    """`function` with its plan, on each device's part of the arrays.

    Both passes of a kernel are mapped by themselves: no device sums what it has whole.

    Args:
      plan: what is static about a call, with its `mesh`; None: there are no parts.
      in_specs, out_specs: how arrays are split, as of `jax.shard_map`.
    """
    function = functools.partial(function, plan)
    if plan.mesh is None:
        return function
    specs = {"in_specs": in_specs, "out_specs": out_specs}
    return jax.shard_map(function, mesh=plan.mesh, **specs, check_vma=False)


def _product(a, b, axis_a: int, axis_b: int):
    """Matrix product over one axis of each, float32."""
    axes = (((axis_a,), (axis_b,)), ((), ()))
    return jax.lax.dot_general(a, b, axes, preferred_element_type=jnp.float32)


def _each_tile(plan, kinds, i, j, labels, add):
    """Calls add(at, bias) for tiles of the keys of part j that queries of tile i may see.

    Args:
      labels: of the queries, [1, tq], or [2, tq] with their starts; of the part's keys,
        [1, held].
      add: `at` are the tile's keys in the part; `bias` is what their mask adds to scores,
        [tk, tq] float32, or None where all pairs are visible.
    """
    query_labels, key_labels = labels
    tile_q, tile_k, in_part = plan.tile_q, plan.tile_k, plan.held // plan.tile_k
    row = pl.program_id(0) * (plan.tokens // tile_q) + i
    first = row * (plan.tokens // tile_k) + j * in_part
    end = (i + 1) * tile_q  # of what the queries may see; from here on, in the part
    end = jnp.clip(end - j * plan.held, 0, plan.held)

    def bias(c, at):
        apart = query_labels[:1] ^ key_labels[:, at].reshape(tile_k, 1)
        visible = (apart == 0) | (apart >= 1 << PATH_BITS)  # one path, or two blocks
        index_q = i * tile_q + jax.lax.broadcasted_iota(jnp.int32, (1, tile_q), 1)
        index_k = jax.lax.broadcasted_iota(jnp.int32, (tile_k, 1), 0)
        index_k += j * plan.held + c * tile_k
        if len(query_labels) > 1:
            visible &= query_labels[1:] <= index_k
        return jnp.where(visible & (index_k <= index_q), 0.0, NEG_INF)

    def one(c, _):
        kind = kinds[first + c]
        at = pl.ds(pl.multiple_of(c * tile_k, tile_k), tile_k)
        pl.when(kind == PARTLY)(lambda: add(at, bias(c, at)))
        pl.when(kind == VISIBLE)(lambda: add(at, None))
        return 0

    jax.lax.fori_loop(0, jax.lax.div(end + tile_k - 1, tile_k), one, 0)


def _scores(keys, q, bias):
    """Scores [tk, tq] of queries [R, H, tq], a head each: without the scale."""
    scores = [_product(keys, head, 1, 0) for head in q[...]]
    return scores if bias is None else [x + bias for x in scores]


def _exponent(H: int) -> float:
    """What scores are multiplied with for a softmax in powers of 2."""
    return H**-0.5 * math.log2(math.e)


def forward_kernel(plan, kinds, *refs):
    """q, out, sums: [R, H, tq]. k, v: [held, H]. normaliser, top, total: [R, tq].

    Labels are of `_each_tile`; `kinds` is of `pallas.tile_kinds`, flat.
    """
    q, k, v, query_labels, key_labels, out, normaliser, sums, top, total = refs
    scale = _exponent(q.shape[1])
    i, j = pl.program_id(2), pl.program_id(3)

    @pl.when(j == 0)
    def _start():
        sums[...] = jnp.zeros_like(sums)
        total[...] = jnp.zeros_like(total)
        top[...] = jnp.full_like(top, NEG_INF)

    def add(at, bias):
        values = v[at].T
        for r, scores in enumerate(_scores(k[at], q, bias)):
            head = slice(r, r + 1)
            new_top = jnp.maximum(top[head], scores.max(axis=0, keepdims=True))
            # All 1 for a query that has seen no key yet; `kept` is 0 at its first.
            probs = jnp.exp2((scores - new_top) * scale)
            kept = jnp.exp2((top[head] - new_top) * scale)
            total[head] = total[head] * kept + probs.sum(axis=0, keepdims=True)
            added = _product(values, probs.astype(values.dtype), 1, 0)
            sums[r] = sums[r] * kept + added
            top[head] = new_top

    _each_tile(plan, kinds, i, j, (query_labels, key_labels), add)

    @pl.when(j == pl.num_programs(3) - 1)
    def _finish():
        for r in range(len(q)):
            out[r] = (sums[r] / total[r : r + 1]).astype(out.dtype)
        normaliser[...] = top[...] * scale + jnp.log2(total[...])


def backward_kernel(plan, kinds, *refs):
    """As `forward_kernel`; gradients and their sums have the shapes of q, k and v.

    `shared` [R, tq] is what a score's own output takes back from its gradient.
    """
    q, k, v, out, normaliser, gradient, query_labels, key_labels = refs[:8]
    d_queries, d_keys, d_values, query_sums, shared, key_sums, value_sums = refs[8:]
    H = q.shape[1]
    j, i = pl.program_id(2), pl.program_id(3)

    @pl.when(i == 0)
    def _start():
        key_sums[...] = jnp.zeros_like(key_sums)
        value_sums[...] = jnp.zeros_like(value_sums)

    query_sums[...] = jnp.zeros_like(query_sums)
    for r in range(len(q)):
        products = out[r].astype(jnp.float32) * gradient[r]
        shared[r : r + 1] = products.sum(axis=0, keepdims=True)

    def add(at, bias):
        keys, values = k[at], v[at]
        keys_across = keys.T
        all_d_probs = [_product(values, head, 1, 0) for head in gradient[...]]
        for r, scores in enumerate(_scores(keys, q, bias)):
            head = slice(r, r + 1)
            probs = jnp.exp2(scores * _exponent(H) - normaliser[head])
            d_scores = (probs * (all_d_probs[r] - shared[head])).astype(keys.dtype)
            probs = probs.astype(keys.dtype)
            value_sums[at] += _product(probs, gradient[r], 1, 1)
            key_sums[at] += _product(d_scores, q[r], 1, 1)
            query_sums[r] += _product(keys_across, d_scores, 1, 0)

    _each_tile(plan, kinds, i, j, (query_labels, key_labels), add)
    d_queries[...] = (query_sums[...] * H**-0.5).astype(d_queries.dtype)

    @pl.when(i == pl.num_programs(3) - 1)
    def _finish():
        d_keys[...] = (key_sums[...] * H**-0.5).astype(d_keys.dtype)
        d_values[...] = value_sums[...].astype(d_values.dtype)
