"""Attention under the path mask as Pallas kernels for TPU, forward and backward.

The scores of a tile of queries against a tile of keys exist in VMEM alone, and their
mask is made there from two integers a token (docs/method.md, section 2). Between the passes only
outputs and normalisers are kept. A tile of keys that no query of a tile may see,
because it lies in the future or belongs to siblings, is neither computed nor fetched.

Scores are held transposed, [keys, queries]. Maxima, sums, normalisers and the labels of
queries are then rows, which a TPU stores densely; as columns each would be widened to
128 lanes. Queries, and what is shaped like them, therefore come as [B, N, H, T].
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from pr1_jax import layout
from pr1_jax.system.mesh import RULES

NEG_INF = -1e30  # finite: a row with no visible key gives no NaN

_TILES = (512, 256, 128)  # tokens; the last is the width of a vector register


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is static about a call. T is a multiple of both tiles."""

    tile_q: int
    tile_k: int
    interpret: bool
    mesh: AbstractMesh | None  # None: the kernels run where they are called
    batch: tuple[str, ...] | None = None  # mesh axes that sequences are split over
    heads: str | None = None  # mesh axis that heads are split over


def flash_attention(
    q,
    k,
    v,
    block,
    path,
    *,
    tile_q: int = 0,
    tile_k: int = 0,
    interpret: bool = False,
):
    """Causal attention in which siblings do not see each other (docs/method.md, section 2).

    Under a mesh (`jax.set_mesh`) every device runs the kernels on its own sequences
    and heads; axes that do not divide them are left out.

    Args:
      q: [B, T, N, H], bfloat16 or float32.
      k, v: [B, T, K, H], N a multiple of K.
      block, path: [B, T] int32 labels; all zero for plain causal attention.
      tile_q, tile_k: tokens of a tile, on TPU multiples of 128; 0 = `default_tile`.
      interpret: run without a TPU, slowly.

    Returns:
      [B, T, N, H] in q's dtype; the softmax is float32.

    Raises:
      ValueError: N is not a multiple of K.
    """
    (B, T, N, _), K = q.shape, k.shape[2]
    if N % K:
        raise ValueError(f"{N} query heads are not a multiple of {K} key heads")
    tile_q, tile_k = tile_q or default_tile(T), tile_k or default_tile(T)
    padding = -T % math.lcm(tile_q, tile_k)
    pad = lambda x: jnp.pad(x, [(0, 0), (0, padding), (0, 0), (0, 0)])
    # Padded keys lie behind all queries, padded queries have no gradient.
    labels = _pad_labels(jnp.stack([block, path], axis=1), padding)
    plan = _plan(B, K, tile_q=tile_q, tile_k=tile_k, interpret=interpret)
    return _attention(plan, pad(q), pad(k), pad(v), labels)[:, :T]


def default_tile(T: int) -> int:
    """The largest tile, in tokens, that lengthens T by a quarter at most, or 128."""
    return next((t for t in _TILES if -T % t <= T // 4), _TILES[-1])


def visible_tiles(block, path, tile_q: int, tile_k: int):
    """Which tiles of keys some query of a tile may see, bool [B, T / tq, T / tk].

    Never False for a tile with a visible pair. True for one without only where labels
    of a path lie apart, as they never do in canonical order.

    Args:
      block, path: [B, T] int32; T need not be a multiple of the tiles.
    """
    padding = -block.shape[1] % math.lcm(tile_q, tile_k)
    labels = _pad_labels(jnp.stack([block, path], axis=1), padding)

    def extremes(tile):  # [2, B, T / tile] each: of blocks, of paths
        tiles = labels.reshape(*labels.shape[:2], -1, tile).swapaxes(0, 1)
        return tiles.min(axis=-1), tiles.max(axis=-1)

    least_q, most_q = (x[..., :, None] for x in extremes(tile_q))
    least_k, most_k = (x[..., None, :] for x in extremes(tile_k))
    # Either tile lies in one block, the same; no path is in both.
    same = (jnp.minimum(least_q, least_k) == jnp.maximum(most_q, most_k))[0]
    apart = ((most_q < least_k) | (most_k < least_q))[1]
    last_q = tile_q * (1 + jnp.arange(labels.shape[2] // tile_q)) - 1
    first_k = tile_k * jnp.arange(labels.shape[2] // tile_k)
    return (first_k <= last_q[:, None]) & ~(same & apart)


def fetched_tiles(visible):
    """The tile to hold in memory at each step over tiles, int32 like `visible`.

    At a visible tile it is that tile. Before the first it is the first, else the last
    that was visible, so that hidden ones cause no transfer: of visible tiles
    [no, yes, no, yes, no] the fetched ones are [1, 1, 1, 3, 3].
    """
    steps = jnp.arange(visible.shape[-1], dtype=jnp.int32)
    last = jax.lax.cummax(jnp.where(visible, steps, -1), axis=visible.ndim - 1)
    first = jnp.argmax(visible, axis=-1, keepdims=True).astype(jnp.int32)
    return jnp.where(last < 0, first, last)


def _pad_labels(labels, padding: int):
    """Repeats the last token's labels [B, 2, T], so that tiles keep to their path."""
    return jnp.pad(labels, [(0, 0), (0, 0), (0, padding)], mode="edge")


def _plan(B: int, K: int, **settings) -> _Plan:
    """How a call is split over the mesh that it is traced under, if any."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return _Plan(**settings, mesh=None)
    batch, heads = RULES["batch"], RULES["kv_heads"]
    divides = lambda axes, n: n % math.prod(mesh.shape[axis] for axis in axes) == 0
    return _Plan(
        **settings,
        mesh=mesh,
        batch=batch if divides(batch, B) else None,
        heads=heads if divides((heads,), K) else None,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(plan, q, k, v, labels):
    return _attention_forward(plan, q, k, v, labels)[0]


def _attention_forward(plan, q, k, v, labels):
    """Output [B, T, N, H] and residuals. labels: [B, 2, T]."""
    tokens, rows, ints = _partitions(plan)
    run = _on_shards(plan, _forward, (tokens,) * 3 + (ints,), (tokens, rows))
    out, normaliser = run(q, k, v, labels)
    return out, (q, k, v, labels, out, normaliser)


def _attention_backward(plan, residuals, gradient):
    tokens, rows, ints = _partitions(plan)
    parts = (tokens,) * 3 + (ints, tokens, rows, tokens)
    run = _on_shards(plan, _backward, parts, (tokens,) * 3)
    return *run(*residuals, gradient), None


_attention.defvjp(_attention_forward, _attention_backward)


def _partitions(plan):
    """Specs of arrays [B, T, heads, H], [B, N, 1, T] and [B, 2, T]."""
    return P(plan.batch, None, plan.heads), P(plan.batch, plan.heads), P(plan.batch)


def _on_shards(plan, function, in_specs, out_specs):
    function = functools.partial(function, plan)
    if plan.mesh is None:
        return function
    # Both passes are mapped by themselves: no device sums what it has whole.
    return jax.shard_map(
        function,
        mesh=plan.mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        check_vma=False,
    )


def _across(x):
    """[B, T, heads, H] to [B, heads, H, T]."""
    return x.transpose(0, 2, 3, 1)


def _down(x):
    """[B, T, heads, H] to [B, heads, T, H]."""
    return x.swapaxes(1, 2)


def _forward(plan, q, k, v, labels):
    """Output [B, T, N, H] and normalisers [B, N, 1, T] float32."""
    B, T, N, H = q.shape
    out, normaliser = _call(
        _forward_kernel,
        plan,
        _over_keys(plan, q.shape, k.shape[2], labels),
        [
            ("queries", _across(q)),
            ("keys", _down(k)),
            ("keys_across", _across(v)),
            ("query_labels", labels),
            ("key_labels", labels),
        ],
        [("queries", (B, N, H, T), q.dtype), ("row", (B, N, 1, T), jnp.float32)],
        scratch=[(H, plan.tile_q), (1, plan.tile_q), (1, plan.tile_q)],
    )
    return out.transpose(0, 3, 1, 2), normaliser


def _backward(plan, q, k, v, labels, out, normaliser, gradient):
    """Gradients of q, k and v."""
    (B, T, N, H), K = q.shape, k.shape[2]
    # What a score's own output takes back from its gradient, [B, N, 1, T].
    shared = (out.astype(jnp.float32) * gradient).sum(axis=-1)
    shared = shared.swapaxes(1, 2)[:, :, None]
    inputs = [
        ("queries", _across(q)),
        ("keys", _down(k)),
        ("keys", _down(v)),
        ("query_labels", labels),
        ("key_labels", labels),
        ("queries", _across(gradient)),
        ("row", normaliser),
        ("row", shared),
    ]
    (d_queries,) = _call(
        _query_gradient_kernel,
        plan,
        _over_keys(plan, q.shape, K, labels),
        inputs,
        [("queries", (B, N, H, T), q.dtype)],
        scratch=[(H, plan.tile_q)],
    )
    d_keys, d_values = _call(
        _key_gradient_kernel,
        plan,
        _over_queries(plan, q.shape, K, labels),
        inputs,
        [("keys", (B, K, T, H), k.dtype), ("keys", (B, K, T, H), v.dtype)],
        scratch=[(plan.tile_k, H), (plan.tile_k, H)],
    )
    return d_queries.transpose(0, 3, 1, 2), _down(d_keys), _down(d_values)


class _Walk(NamedTuple):
    """The steps of a kernel: for each result, over the tiles that add to it.

    The tile of the result is on axis 2 of the grid, the tiles that add to it are on
    the last axis.
    """

    grid: tuple[int, ...]
    sums: int  # so many of the last axes add to one result
    fetched: jax.Array  # [B · tiles · tiles] int32 of `fetched_tiles`
    # Step and `fetched` -> sequence, query head, key head, tiles of queries and keys.
    where: Callable[..., tuple[jax.Array, ...]]


def _over_keys(plan, shape, K: int, labels) -> _Walk:
    """Over all keys, for each tile of queries of each head."""
    B, T, N, _ = shape
    num_q, num_k = T // plan.tile_q, T // plan.tile_k
    visible = visible_tiles(labels[:, 0], labels[:, 1], plan.tile_q, plan.tile_k)

    def where(b, n, i, j, fetched):
        return b, n, n // (N // K), i, fetched[(b * num_q + i) * num_k + j]

    fetched = fetched_tiles(visible).reshape(-1)
    return _Walk((B, N, num_q, num_k), 1, fetched, where)


def _over_queries(plan, shape, K: int, labels) -> _Walk:
    """Over all queries of all heads that share them, for each tile of keys."""
    B, T, N, _ = shape
    num_q, num_k = T // plan.tile_q, T // plan.tile_k
    visible = visible_tiles(labels[:, 0], labels[:, 1], plan.tile_q, plan.tile_k)

    def where(b, h, j, r, i, fetched):
        return b, h * (N // K) + r, h, fetched[(b * num_k + j) * num_q + i], j

    fetched = fetched_tiles(visible.swapaxes(1, 2)).reshape(-1)
    return _Walk((B, K, num_k, N // K, num_q), 2, fetched, where)


def _call(kernel, plan, walk: _Walk, inputs, outputs, *, scratch):
    """Runs a kernel; inputs and outputs are listed with how they are cut into tiles.

    Args:
      inputs: pairs (cut, array). outputs: triples (cut, shape, dtype).
      scratch: shapes of float32 sums.
    """
    H, tile_q, tile_k = inputs[0][1].shape[2], plan.tile_q, plan.tile_k
    at = lambda index: lambda *step: index(*walk.where(*step))
    across, down = (
        lambda b, n, h, i, j: (b, n, 0, i),
        lambda b, n, h, i, j: (b, h, j, 0),
    )
    cuts = {
        "queries": ((None, None, H, tile_q), across),
        "row": ((None, None, 1, tile_q), across),
        "keys": ((None, None, tile_k, H), down),
        "keys_across": ((None, None, H, tile_k), lambda b, n, h, i, j: (b, h, 0, j)),
        "query_labels": ((None, 2, tile_q), lambda b, n, h, i, j: (b, 0, i)),
        "key_labels": ((None, 2, tile_k), lambda b, n, h, i, j: (b, 0, j)),
    }
    specs = {
        cut: pl.BlockSpec(shape, at(index)) for cut, (shape, index) in cuts.items()
    }
    order = ["parallel"] * (len(walk.grid) - walk.sums) + ["arbitrary"] * walk.sums
    return pl.pallas_call(
        functools.partial(kernel, walk.sums),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=walk.grid,
            in_specs=[specs[cut] for cut, _ in inputs],
            out_specs=[specs[cut] for cut, _, _ in outputs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for _, shape, dtype in outputs],
        compiler_params=pltpu.CompilerParams(dimension_semantics=order),
        interpret=plan.interpret,
        name=kernel.__name__.strip("_"),
    )(walk.fetched, *[array for _, array in inputs])


def _step(sums: int, fetched):
    """Where a kernel is, and whether that tile is visible, the first, the last.

    Returns:
      The tiles on axis 2 and on the last axis, int32, and three bools.
    """
    axes = range(3, 3 + sums)
    outer, inner = pl.program_id(2), pl.program_id(2 + sums)
    row = pl.program_id(0) * pl.num_programs(2) + outer
    visible = fetched[row * pl.num_programs(2 + sums) + inner] == inner
    first = functools.reduce(
        jnp.logical_and, [pl.program_id(axis) == 0 for axis in axes]
    )
    last = functools.reduce(
        jnp.logical_and,
        [pl.program_id(axis) == pl.num_programs(axis) - 1 for axis in axes],
    )
    return outer, inner, visible, first, last


def _product(a, b, axis_a: int, axis_b: int):
    """Matrix product over one axis of each, float32."""
    axes = (((axis_a,), (axis_b,)), ((), ()))
    return jax.lax.dot_general(a, b, axes, preferred_element_type=jnp.float32)


def _scores(i, j, q, k, query_labels, key_labels):
    """Scores [tk, tq] of tile i of queries [H, tq] and tile j of keys [tk, H]."""
    scores = _product(k[...], q[...], 1, 0) * k.shape[1] ** -0.5
    tile_k, tile_q = scores.shape
    visible = layout.visible_labels(
        query_labels[0:1],
        query_labels[1:2],
        key_labels[0:1].reshape(tile_k, 1),
        key_labels[1:2].reshape(tile_k, 1),
    )
    index_q = i * tile_q + jax.lax.broadcasted_iota(jnp.int32, (1, tile_q), 1)
    index_k = j * tile_k + jax.lax.broadcasted_iota(jnp.int32, (tile_k, 1), 0)
    return jnp.where(visible & (index_k <= index_q), scores, NEG_INF)


def _forward_kernel(num_sums, fetched, *refs):
    """q, out, sums: [H, tq]. k: [tk, H]. v: [H, tk]. normaliser, top, total: [1, tq].

    Labels are [2, tq] and [2, tk]; `fetched` is of `_Walk`, as in all kernels.
    """
    q, k, v, query_labels, key_labels, out, normaliser, sums, top, total = refs
    i, j, visible, first, last = _step(num_sums, fetched)

    @pl.when(first)
    def _start():
        sums[...] = jnp.zeros_like(sums)
        total[...] = jnp.zeros_like(total)
        top[...] = jnp.full_like(top, NEG_INF)

    @pl.when(visible)
    def _add():
        scores = _scores(i, j, q, k, query_labels, key_labels)
        new_top = jnp.maximum(top[...], scores.max(axis=0, keepdims=True))
        # All 1 for a query that has seen no key yet; `kept` is 0 at its first.
        probs = jnp.exp(scores - new_top)
        kept = jnp.exp(top[...] - new_top)
        total[...] = total[...] * kept + probs.sum(axis=0, keepdims=True)
        added = _product(v[...], probs.astype(v.dtype), 1, 0)
        sums[...] = sums[...] * kept + added
        top[...] = new_top

    @pl.when(last)
    def _finish():
        out[...] = (sums[...] / total[...]).astype(out.dtype)
        normaliser[...] = top[...] + jnp.log(total[...])


def _gradients(i, j, inputs):
    """Probabilities and the gradients of scores, [tk, tq] float32.

    Args:
      inputs: q [H, tq], k and v [tk, H], labels of queries [2, tq] and of keys [2, tk],
        the output's gradient [H, tq], normalisers and `shared` of `_backward`, [1, tq].
    """
    q, k, v, query_labels, key_labels, gradient, normaliser, shared = inputs
    scores = _scores(i, j, q, k, query_labels, key_labels)
    probs = jnp.exp(scores - normaliser[...])
    d_probs = _product(v[...], gradient[...], 1, 0)
    return probs, probs * (d_probs - shared[...]) * k.shape[1] ** -0.5


def _query_gradient_kernel(num_sums, fetched, *refs):
    """d_queries, sums: [H, tq]; the other arguments are inputs of `_gradients`."""
    *inputs, d_queries, sums = refs
    k = inputs[1]
    i, j, visible, first, last = _step(num_sums, fetched)

    @pl.when(first)
    def _start():
        sums[...] = jnp.zeros_like(sums)

    @pl.when(visible)
    def _add():
        _, d_scores = _gradients(i, j, inputs)
        sums[...] += _product(k[...], d_scores.astype(k.dtype), 0, 0)

    @pl.when(last)
    def _finish():
        d_queries[...] = sums[...].astype(d_queries.dtype)


def _key_gradient_kernel(num_sums, fetched, *refs):
    """d_keys, d_values and their sums: [tk, H]; the rest are inputs of `_gradients`."""
    *inputs, d_keys, d_values, key_sums, value_sums = refs
    q, gradient = inputs[0], inputs[5]
    j, i, visible, first, last = _step(num_sums, fetched)

    @pl.when(first)
    def _start():
        key_sums[...] = jnp.zeros_like(key_sums)
        value_sums[...] = jnp.zeros_like(value_sums)

    @pl.when(visible)
    def _add():
        probs, d_scores = _gradients(i, j, inputs)
        key_sums[...] += _product(d_scores.astype(q.dtype), q[...], 1, 1)
        value_sums[...] += _product(probs.astype(gradient.dtype), gradient[...], 1, 1)

    @pl.when(last)
    def _finish():
        d_keys[...] = key_sums[...].astype(d_keys.dtype)
        d_values[...] = value_sums[...].astype(d_values.dtype)
