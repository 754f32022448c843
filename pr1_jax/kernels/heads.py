"""What stands between projections and attention of an update, in one pass on TPU.

Queries and keys are normalised and rotated, and laid out as `pallas` reads them. Left to
XLA, these are nine passes of a layer over them, and in the backward pass more, for
copies, and gradients of the scales. Here each pass reads and writes all of them once.

Heads are computed transposed, [H, tokens]: a norm is then a sum over rows of registers,
and the two halves that rotate are apart. As in decoding (`decode_kernel`), nothing is
rounded between norm and rotation.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from pr1_jax.kernels.pallas_kernel import on_shards

HEAD_DIMS = 64  # head dims must be multiples of it on TPU
_LANES = 128
_TILES = (512, 256, 128)  # tokens of a step
_VMEM_BYTES = 9 * 2**20  # for a step's blocks, two buffers each, of 16 MiB in all


class Raw(NamedTuple):
    """What has to be done with queries and keys as they are projected."""

    angles: tuple[jax.Array, jax.Array]  # of `layers.rotary_angles`, [B, T, H/2]
    scales: jax.Array | None  # [2, H] of the norms of queries and keys; None: no norms
    eps: float  # of the norms


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is static about a call."""

    num_heads: int  # N of a device
    num_kv_heads: int  # K of a device
    head_dim: int
    eps: float | None  # None: no norms
    tile: int  # tokens of a step
    interpret: bool
    mesh: AbstractMesh | None  # None: the kernels run where they are called
    batch: tuple[str, ...] | None  # mesh axes that sequences are split over
    heads: str | None  # mesh axis that heads are split over


def arranged(q, k, v, raw: Raw, *, mesh, batch, heads, interpret: bool, tile: int = 0):
    """Queries, keys and values as the kernels of attention read them.

    Args:
      q: [B, T, N, H], projected. k, v: [B, T, K, H].
      mesh, batch, heads: how they are split, as of `pallas_kernel.Plan`.
      tile: tokens of a step, which divide T; 0 = as many as fit.

    Returns:
      q [B, K, R, H, T], normalised and rotated, as k [B, K, T, H]; v [B, K, T, H].
    """
    (B, T, N, H), K = q.shape, k.shape[2]
    parts = 1 if heads is None else mesh.shape[heads]
    plan = _Plan(
        num_heads=N // parts,
        num_kv_heads=K // parts,
        head_dim=H,
        eps=None if raw.scales is None else raw.eps,
        tile=tile or _tile(T, (N + 2 * K) // parts * H, q.dtype.itemsize),
        interpret=interpret,
        mesh=mesh,
        batch=batch,
        heads=heads,
    )
    flat = lambda x: x.reshape(B, T, -1)
    angles = jnp.concatenate(raw.angles, axis=-1).swapaxes(1, 2)  # [B, H, T]
    scales = raw.scales
    if scales is not None:
        scales = scales.astype(jnp.float32).T  # a column each
    q, k, v = _arranged(plan, flat(q), flat(k), flat(v), angles, scales)
    return q.reshape(B, K, N // K, H, T), k, v


def _tile(T: int, width: int, itemsize: int) -> int:
    """The most tokens of `_TILES` that divide T and fit; T if none divides it.

    Args:
      width: of a token's queries, keys and values. The backward pass reads them and their
        gradients and writes as much.
    """
    fits = lambda t: T % t == 0 and 6 * t * width * itemsize <= _VMEM_BYTES
    divides = [t for t in _TILES if T % t == 0]
    return next(filter(fits, divides), divides[-1] if divides else T)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _arranged(plan, q, k, v, angles, scales):
    return _arrange(plan, q, k, v, angles, scales)[0]


def _arrange(plan, q, k, v, angles, scales):
    """q [B, N · H, T], k and v [B, K, T, H], and residuals."""
    across, down, rows, whole = _partitions(plan)
    run = on_shards(plan, _forward, (across, across, rows, whole), (down, down))
    made_q, made_k = run(q, k, angles, scales)
    B, T, _ = v.shape
    made_v = v.reshape(B, T, -1, plan.head_dim).swapaxes(1, 2)
    return (made_q, made_k, made_v), (q, k, angles, scales)


def _backward(plan, residuals, gradients):
    across, down, rows, whole = _partitions(plan)
    shares = P((*(plan.batch or ()), *filter(None, [plan.heads])))
    run = on_shards(
        plan,
        _gradients,
        (across, across, rows, whole, down, down, down),
        (across, across, across, shares),
    )
    *to_heads, to_scales = run(*residuals, *gradients)
    return *to_heads, None, (None if plan.eps is None else to_scales.sum(axis=0))


_arranged.defvjp(_arrange, _backward)


def _partitions(plan):
    """Specs of arrays [B, T, heads], [B, heads, …] and [B, …], and of what all have."""
    return (
        P(plan.batch, None, plan.heads),
        P(plan.batch, plan.heads),
        P(plan.batch),
        P(),
    )


def _forward(plan, q, k, angles, scales):
    """q [B, N · H, T] and k [B, K, T, H] of those projected."""
    B, T, _ = q.shape
    return _call(
        _forward_kernel,
        plan,
        [("across", q), ("across", k), ("angles", angles), ("scales", scales)],
        [
            ("queries", (B, q.shape[2], T), q.dtype),
            ("keys", (B, plan.num_kv_heads, T, plan.head_dim), k.dtype),
        ],
    )


def _gradients(plan, q, k, angles, scales, d_queries, d_keys, d_values):
    """Of q, k and v as they are projected, and of the scales, [1, H, 2]."""
    gradients = _call(
        _backward_kernel,
        plan,
        [
            *(("across", q), ("across", k), ("angles", angles), ("scales", scales)),
            *(("queries", d_queries), ("keys", d_keys), ("keys", d_values)),
        ],
        [
            *(("across", q.shape, q.dtype), ("across", k.shape, k.dtype)),
            ("across", k.shape, d_values.dtype),
            ("sums", (len(q), plan.head_dim, 2), jnp.float32),
        ],
    )
    return *gradients[:3], gradients[3].sum(axis=0, keepdims=True)


def _call(kernel, plan, inputs, outputs):
    """Runs a kernel over sequences and tiles of tokens.

    Args:
      inputs: pairs (cut, array), or None for an array. outputs: (cut, shape, dtype).
    """
    H, tile = plan.head_dim, plan.tile
    B, T, _ = inputs[0][1].shape
    inputs = [(cut, x) for cut, x in inputs if x is not None]

    def spec(cut, shape):
        if cut == "across":
            return pl.BlockSpec((None, tile, shape[2]), lambda b, t: (b, t, 0))
        if cut in ("queries", "angles"):
            return pl.BlockSpec((None, shape[1], tile), lambda b, t: (b, 0, t))
        if cut == "keys":
            return pl.BlockSpec((None, shape[1], tile, H), lambda b, t: (b, 0, t, 0))
        if cut == "sums":
            return pl.BlockSpec((None, H, 2), lambda b, t: (b, 0, 0))
        return pl.BlockSpec((H, 2), lambda b, t: (0, 0))

    arrays = [x for _, x in inputs]
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for _, shape, dtype in outputs]
    return pl.pallas_call(
        functools.partial(kernel, plan),
        grid=(B, T // tile),
        in_specs=[spec(cut, x.shape) for cut, x in inputs],
        out_specs=[spec(cut, shape) for cut, shape, _ in outputs],
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=sum(8 * x.size for x in shapes),
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays + shapes),
            transcendentals=0,
        ),
        interpret=plan.interpret,
        name=f"heads{kernel.__name__}",
    )(*arrays)


def _groups(plan, heads: int):
    """Ranges of heads that are read together: they fill registers, if they can."""
    H = plan.head_dim
    pairs = H % _LANES and heads % 2 == 0
    size = 2 if pairs else 1
    return [range(n, n + size) for n in range(0, heads, size)]


def _lanes(plan, group: range) -> slice:
    return slice(group[0] * plan.head_dim, (group[-1] + 1) * plan.head_dim)


def _read(plan, x, group: range):
    """Heads [H, tile] float32 of x [tile, heads · H]."""
    together = x[:, _lanes(plan, group)].T.astype(jnp.float32)
    return jnp.split(together, len(group), axis=0)


def _write(plan, x, group: range, heads):
    """Undoes `_read`, in x's dtype."""
    together = heads[0] if len(heads) == 1 else jnp.concatenate(heads, axis=0)
    x[:, _lanes(plan, group)] = together.astype(x.dtype).T


def _rotated(x, angles, sign: int = 1):
    """x [H, tile] rotated by angles [H, tile], sines first; backwards if sign is −1."""
    half = len(x) // 2
    sin, cos = sign * angles[:half], angles[half:]
    first, second = x[:half], x[half:]
    out = first * cos - second * sin, second * cos + first * sin
    return jnp.concatenate(out, axis=0)


def _normalised(plan, x):
    """x [H, tile] / rms(x), and 1 / rms(x)."""
    inverse = jax.lax.rsqrt(jnp.mean(x * x, axis=0, keepdims=True) + plan.eps)
    return x * inverse, inverse


def _forward_kernel(plan, *refs):
    """q: [tile, N · H]. k: [tile, K · H]. Out: [N · H, tile] and [K, tile, H]."""
    q, k, angles, *scales, queries, keys = refs

    def prepared(x, which):
        if scales:
            x = _normalised(plan, x)[0] * scales[0][:, which : which + 1]
        return _rotated(x, angles[...])

    for group in _groups(plan, plan.num_heads):
        for n, x in zip(group, _read(plan, q, group), strict=True):
            at = _lanes(plan, range(n, n + 1))
            queries[at] = prepared(x, 0).astype(queries.dtype)
    for group in _groups(plan, plan.num_kv_heads):
        for n, x in zip(group, _read(plan, k, group), strict=True):
            keys[n] = prepared(x, 1).astype(keys.dtype).T


def _backward_kernel(plan, *refs):
    """Gradients, in the shapes of what they belong to; of the scales [H, 2], summed."""
    *inputs, d_q, d_k, d_v, d_scales = refs
    q, k, angles, *scales, d_queries, d_keys, d_values = inputs

    @pl.when(pl.program_id(1) == 0)
    def _start():
        d_scales[...] = jnp.zeros_like(d_scales)

    def gradient(x, d_x, which, total):
        """Of a head x [H, tile] with the gradient d_x of what was made of it."""
        d_x = _rotated(d_x, angles[...], -1)
        if not scales:
            return d_x, total
        x, inverse = _normalised(plan, x)
        total += d_x * x
        d_x = d_x * scales[0][:, which : which + 1]
        shared = jnp.mean(d_x * x, axis=0, keepdims=True)
        return (d_x - x * shared) * inverse, total

    def all_heads(count, which, x, d_x, read):
        total = jnp.zeros((plan.head_dim, plan.tile), jnp.float32)
        for group in _groups(plan, count):
            out = []
            for n, one in zip(group, _read(plan, x, group), strict=True):
                one, total = gradient(one, read(n).astype(jnp.float32), which, total)
                out.append(one)
            _write(plan, d_x, group, out)
        d_scales[:, which : which + 1] += total.sum(axis=1, keepdims=True)

    row = lambda n: _lanes(plan, range(n, n + 1))
    all_heads(plan.num_heads, 0, q, d_q, lambda n: d_queries[row(n)])
    all_heads(plan.num_kv_heads, 1, k, d_k, lambda n: d_keys[n].T)
    for group in _groups(plan, plan.num_kv_heads):
        values = [d_values[n] for n in group]
        together = values[0] if len(group) == 1 else jnp.concatenate(values, axis=1)
        d_v[:, _lanes(plan, group)] = together
