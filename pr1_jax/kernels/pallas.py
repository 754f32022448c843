"""Attention under the path mask as Pallas kernels for TPU, forward and backward.

The scores of a tile of queries against a tile of keys exist in VMEM alone. Between the
passes only outputs and normalisers are kept. A tile of keys that no query of a tile may
see, because it lies in the future, belongs to siblings or, where a row holds several
sequences, to another one, is not computed; one that all of them may see needs no mask; the
mask of any other is made there from one integer a token, or two (docs/method.md,
section 2).

A step of a kernel has a tile of queries of all heads that share a key head, and goes
through the tiles of many keys, which stay in VMEM from step to step. While one head waits
for the vector unit, another keeps the matrix unit busy. The backward pass makes each
score once for the three gradients.

Scores are held transposed, [keys, queries]. Maxima, sums, normalisers and the labels of
queries are then rows, which a TPU stores densely; as columns each would be widened to
128 lanes. Queries, and what is shaped like them, therefore come as [B, K, R, H, T].
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from pr1_jax.kernels import heads
from pr1_jax.kernels.pallas_kernel import (
    HIDDEN,
    PARTLY,
    PATH_BITS,
    VISIBLE,
    Plan,
    backward_kernel,
    forward_kernel,
    on_shards,
)
from pr1_jax.system.mesh import RULES

KEPT = "attention"  # name of what policies of remat keep (`checkpoint_name`)

_TILES = (256, 128)  # tokens; the last is the width of a vector register
_MOST_QUERIES = 1024  # of all heads in a tile
_VMEM_BYTES = 23 * 2**19  # for tiles and parts of arrays, of 16 MiB in all


def flash_attention(
    q,
    k,
    v,
    block,
    path,
    start=None,
    raw: heads.Raw | None = None,
    *,
    tile_q: int = 0,
    tile_k: int = 0,
    held: int = 0,
    interpret: bool = False,
):
    """Causal attention in which siblings do not see each other (docs/method.md, section 2).

    Under a mesh (`jax.set_mesh`) every device runs the kernels on its own sequences
    and heads; axes that do not divide them are left out.

    Args:
      q: [B, T, N, H], bfloat16 or float32.
      k, v: [B, T, K, H], N a multiple of K.
      block, path: [B, T] int32 labels, below 2^15; all zero for plain causal attention.
      start: [B, T] int32, index of the first key that a query may see: of the first token
        of its sequence, where a row holds several. None: 0.
      raw: if q and k are as they are projected: norms and rotation, done here.
      tile_q, tile_k: tokens of a tile, on TPU multiples of 128; 0 = `default_tile`.
      held: keys in VMEM at once, at most, and a tile at least; 0 = as many as fit.
      interpret: run without a TPU, slowly.

    Returns:
      [B, T, N, H] in q's dtype; the softmax is float32.

    Raises:
      ValueError: N is not a multiple of K.
    """
    (B, T, N, H), K = q.shape, k.shape[2]
    if N % K:
        raise ValueError(f"{N} query heads are not a multiple of {K} key heads")
    tile_q = tile_q or default_tile(T, N // K)
    tile_k = tile_k or default_tile(T)
    most = held or _most_held(H, k.dtype.itemsize, tile_q * N // K)
    held = _held_keys(T, math.lcm(tile_q, tile_k), most)
    padding = -T % held
    # Padded keys lie behind all queries, padded queries have no gradient.
    pad = lambda x: jnp.pad(x, [(0, 0), (0, padding), *[(0, 0)] * (x.ndim - 2)])
    starts = [] if start is None else [start]
    labels = _pad_labels(jnp.stack([block, path, *starts], axis=1), padding)
    sizes = {"tokens": T + padding, "tile_q": tile_q, "tile_k": tile_k, "held": held}
    plan = _plan(B, K, **sizes, interpret=interpret)
    q, k, v = map(pad, (q, k, v))
    if raw is None:
        q = q.reshape(B, -1, K, N // K, H).transpose(0, 2, 3, 4, 1)
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    else:
        raw = raw._replace(angles=tuple(map(pad, raw.angles)))
        where = {"mesh": plan.mesh, "batch": plan.batch, "heads": plan.heads}
        q, k, v = heads.arranged(q, k, v, raw, **where, interpret=interpret)
    out = _attention(plan, q, k, v, labels)
    return out.transpose(0, 4, 1, 2, 3).reshape(B, -1, N, H)[:, :T]


def default_tile(T: int, heads: int = 1) -> int:
    """The largest tile of tokens that lengthens T by a quarter at most, or 128.

    Args:
      heads: that share a key head, of a tile of queries.
    """
    fits = lambda t: -T % t <= T // 4 and t * heads <= _MOST_QUERIES
    return next(filter(fits, _TILES), _TILES[-1])


def _most_held(H: int, itemsize: int, queries: int) -> int:
    """Keys of head dim H that VMEM holds, beside a tile of queries of all heads.

    Four arrays, gradients among them, are like the keys and four like the queries, two
    buffers each; sums are float32, of two and of one.
    """
    free = _VMEM_BYTES - queries * H * (8 * itemsize + 4)
    return free // (H * (8 * itemsize + 8))


def _held_keys(T: int, tile: int, most: int) -> int:
    """Keys in VMEM at once, a multiple of `tile`, such that few are padding."""
    parts = math.ceil(T / max(most // tile * tile, tile))
    return math.ceil(T / parts / tile) * tile


def tile_kinds(block, path, tile_q: int, tile_k: int, start=None):
    """Which tiles of keys the queries of a tile may see, int32 [B, T / tq, T / tk].

    `HIDDEN`: no pair is visible. `VISIBLE`: all are. `PARTLY`: neither is certain; in
    canonical order some pairs of such a tile are visible.

    Args:
      block, path, start: [B, T] int32, as of `flash_attention`; T need not be a multiple
        of the tiles.
    """
    padding = -block.shape[1] % math.lcm(tile_q, tile_k)
    labels = _pad_labels(jnp.stack([block, path], axis=1), padding)
    q, k = _Tiles.of(labels, tile_q), _Tiles.of(labels, tile_k)
    q, k = (
        _Tiles(*(jnp.expand_dims(x, axis) for x in tiles))
        for tiles, axis in ((q, -1), (k, -2))
    )
    # Of blocks, and of paths: all are one and the same; none is in both tiles.
    one = jnp.minimum(q.least, k.least) == jnp.maximum(q.most, k.most)
    apart = (q.most < k.least) | (k.most < q.least)
    index_q = tile_q * jnp.arange(labels.shape[2] // tile_q)[:, None]
    index_k = tile_k * jnp.arange(labels.shape[2] // tile_k)
    hidden = ~q.has_main & ~k.has_main & one[0] & apart[1]
    hidden |= index_k >= index_q + tile_q
    visible = (index_k + tile_k <= index_q + 1) & (apart[0] | one[1])
    if start is not None:
        start = jnp.pad(start, [(0, 0), (0, padding)], mode="edge")
        start = start.reshape(len(start), -1, 1, tile_q)
        hidden |= index_k + tile_k <= start.min(axis=-1)
        visible &= start.max(axis=-1) <= index_k
    return jnp.where(hidden, HIDDEN, jnp.where(visible, VISIBLE, PARTLY))


class _Tiles(NamedTuple):
    """The least and the greatest label of the tokens in paths, by tile."""

    least: jax.Array  # [2, B, tiles], of blocks and of paths; a great number if none is
    most: jax.Array  # −1 if none is
    has_main: jax.Array  # bool [B, tiles], some are in the main stream

    @classmethod
    def of(cls, labels, tile: int):
        """Of labels [B, 2, T]."""
        tiles = labels.reshape(*labels.shape[:2], -1, tile).swapaxes(0, 1)
        is_main = (tiles == 0).all(axis=0)
        # Where a path has block 0, as in no layout, the main stream is its sibling.
        stray = ((tiles[0] == 0) & (tiles[1] != 0)).any(axis=(1, 2), keepdims=True)
        is_main &= ~stray
        least = jnp.where(is_main, jnp.iinfo(tiles.dtype).max, tiles).min(axis=-1)
        most = jnp.where(is_main, -1, tiles).max(axis=-1)
        return cls(least, most, is_main.any(axis=-1))


def _pad_labels(labels, padding: int):
    """Repeats the last token's labels [B, n, T], so that tiles keep to their path."""
    return jnp.pad(labels, [(0, 0), (0, 0), (0, padding)], mode="edge")


def _plan(B: int, K: int, **settings) -> Plan:
    """How a call is split over the mesh that it is traced under, if any."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return Plan(**settings, mesh=None)
    batch, heads = RULES["batch"], RULES["kv_heads"]
    divides = lambda axes, n: n % math.prod(mesh.shape[axis] for axis in axes) == 0
    return Plan(
        **settings,
        mesh=mesh,
        batch=batch if divides(batch, B) else None,
        heads=heads if divides((heads,), K) else None,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(plan, q, k, v, labels):
    return _attention_forward(plan, q, k, v, labels)[0]


def _attention_forward(plan, q, k, v, labels):
    """Output [B, K, R, H, T] and residuals. labels: as of `_call`."""
    heads, rows = _partitions(plan)
    run = on_shards(plan, _forward, (heads,) * 3 + (rows,), (heads,) * 2)
    out, normaliser = run(q, k, v, labels)
    out, normaliser = _kept(out), _kept(normaliser)
    return out, (q, k, v, labels, out, normaliser)


def _kept(x):
    """x under the name `KEPT`, as integers: of floats JAX makes another copy."""
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    floats = jax.lax.bitcast_convert_type(checkpoint_name(bits, KEPT), x.dtype)
    # Who reads it shares it: XLA would make it of the bits for each.
    return jax.lax.optimization_barrier(floats)


def _attention_backward(plan, residuals, gradient):
    heads, rows = _partitions(plan)
    parts = (heads,) * 3 + (rows,) + (heads,) * 3
    run = on_shards(plan, _backward, parts, (heads,) * 3)
    return *run(*residuals, gradient), None


_attention.defvjp(_attention_forward, _attention_backward)


def _partitions(plan):
    """Specs of arrays [B, K, …] and [B, …]."""
    return P(plan.batch, plan.heads), P(plan.batch)


def _forward(plan, q, k, v, labels):
    """Output [B, K, R, H, T] and base-2 normalisers [B, K, R, T] float32."""
    (B, K, R, H, T), tile = q.shape, plan.tile_q
    return _call(
        forward_kernel,
        plan,
        labels,
        [("queries", q), ("keys", k), ("keys", v)],
        [("queries", q.shape, q.dtype), ("rows", (B, K, R, T), jnp.float32)],
        scratch=[(R, H, tile), (R, tile), (R, tile)],
        products=2,
    )


def _backward(plan, q, k, v, labels, out, normaliser, gradient):
    """Gradients of q, k and v."""
    (R, H), parts = q.shape[2:4], plan.tokens // plan.held
    dtype = q.dtype if parts == 1 else jnp.float32
    d_queries, d_keys, d_values = _call(
        backward_kernel,
        plan,
        labels,
        [
            *(("queries", q), ("keys", k), ("keys", v)),
            *(("queries", out), ("rows", normaliser), ("queries", gradient)),
        ],
        [
            ("part_queries", (parts, *q.shape), dtype),
            ("keys", k.shape, k.dtype),
            ("keys", v.shape, v.dtype),
        ],
        scratch=[(R, H, plan.tile_q), (R, plan.tile_q), *[(plan.held, H)] * 2],
        products=5,
    )
    return d_queries.sum(axis=0).astype(q.dtype), d_keys, d_values


def _call(kernel, plan, labels, inputs, outputs, *, scratch, products: int):
    """Runs a kernel over sequences, key heads, and tiles of queries × parts of the keys.

    Of the last two the first is the outer in the forward pass, whose results are of
    queries, and the second in the backward pass.

    Args:
      labels: [B, 2, T], blocks and paths, or [B, 3, T], starts too.
      inputs: pairs (cut, array). outputs: triples (cut, shape, dtype).
      scratch: shapes of float32 sums. products: matrix products for each score.
    """
    B, K, R, H, T = inputs[0][1].shape
    tile, held = plan.tile_q, plan.held
    num_q, parts = T // tile, T // held
    keys_outer = kernel is backward_kernel

    def at(index, *, clamp: bool = True):
        """An index of blocks by sequence, key head, tile of queries, part of the keys."""

        def of_step(b, h, outer, inner, _):
            i, j = (inner, outer) if keys_outer else (outer, inner)
            if clamp and keys_outer:  # nothing is fetched for what is not computed
                i = jnp.maximum(i, j * (held // tile))
            elif clamp:
                j = jnp.minimum(j, jax.lax.div(i * tile + tile - 1, held))
            return index(b, h, i, j)

        return of_step

    blocks = (None, None, R, H, tile)
    specs = {
        "queries": pl.BlockSpec(blocks, at(lambda b, h, i, j: (b, h, 0, 0, i))),
        "part_queries": pl.BlockSpec(
            (None, *blocks), at(lambda b, h, i, j: (j, b, h, 0, 0, i), clamp=False)
        ),
        "rows": pl.BlockSpec(
            (None, None, R, tile), at(lambda b, h, i, j: (b, h, 0, i))
        ),
        "keys": pl.BlockSpec(
            (None, None, held, H), at(lambda b, h, i, j: (b, h, j, 0))
        ),
        "query_labels": pl.BlockSpec(
            (None, labels.shape[1] - 1, tile), at(lambda b, h, i, j: (b, 0, i))
        ),
        "key_labels": pl.BlockSpec((None, 1, held), at(lambda b, h, i, j: (b, 0, j))),
    }
    block, path, *starts = jnp.unstack(labels, axis=1)
    kinds = tile_kinds(block, path, tile, plan.tile_k, *starts)
    packed = (labels[:, :1] << PATH_BITS) | labels[:, 1:2]
    of_queries = jnp.concatenate([packed, labels[:, 2:]], axis=1)
    cuts = [*[cut for cut, _ in inputs], "query_labels", "key_labels"]
    arrays = [*[array for _, array in inputs], of_queries, packed]
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for _, shape, dtype in outputs]
    # Causal tiles are computed whole; labels hide fewer or more of them.
    pairs = B * K * R * T * (T + tile) // 2
    return pl.pallas_call(
        functools.partial(kernel, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, K, parts, num_q) if keys_outer else (B, K, num_q, parts),
            in_specs=[specs[cut] for cut in cuts],
            out_specs=[specs[cut] for cut, _, _ in outputs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * pairs * H,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays + shapes),
            transcendentals=pairs,
        ),
        interpret=plan.interpret,
        name=kernel.__name__.strip("_"),
    )(kinds.reshape(-1), *arrays)
