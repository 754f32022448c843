"""Attention of a decode step under the path mask, as one Pallas kernel for TPU.

Keys and values of a token lie side by side, [B, K, S, 2 H]: they come by one transfer, and
a token is a row of memory. What a step has to go over is a list of tiles, made once for
all layers (`walk`); in its order the kernel (`decode_kernel`) fetches several tiles ahead.
Which lanes may see a slot is a bit mask a slot, made once as well. A flat list of what is
ragged, and transfers that run ahead of it, are ideas of ragged paged attention
(https://github.com/vllm-project/tpu-inference).
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pr1_jax.kernels.decode_kernel import (
    PIECE,
    SUBLANES,
    WINDOW,
    Plan,
    Walk,
    kernel,
    scratch,
)

MOST_LANES = 32  # of a row: the bits of a mask

_TILE_BYTES = 1 << 19  # of a tile, about: what a transfer needs to be worth its latency


def tile_slots(num_kv_heads: int, head_dim: int, dtype) -> int:
    """Slots of a tile.

    Args:
      num_kv_heads: key heads of one device.
    """
    slot = num_kv_heads * 2 * head_dim * jnp.dtype(dtype).itemsize
    tile = PIECE
    while tile < 8 * PIECE and 2 * tile * slot <= _TILE_BYTES:
        tile *= 2
    return tile


def walk(
    lanes,
    slot,
    visible,
    filled,
    *,
    length,
    reader,
    readers: int,
    prompt_slots: int,
    tile: int,
    num_lanes: int,
) -> Walk:
    """The tiles that a decode step of B rows of P lanes goes over.

    Args:
      lanes: [B, P] int32, where each lane is in the flat list of L; L: it is not fed.
      slot: [B, P] int32, of its token; −1: its keys are there already. The lanes of a
        row write slots that lie side by side, the last ones of those that are filled.
      visible: [B, P, S] bool, slots that a lane may see.
      filled: [B] int32, slots in use, those of this step included.
      length: [M] int32, of the prompts.
      reader: [B] int32, entry · readers + the row's number among its readers;
        M · readers: it reads none.
      readers: rows that an entry can have. prompt_slots: tokens that it has space for.
      tile: slots of a tile. num_lanes: L.

    Raises:
      ValueError: a row has more lanes than a mask has bits.
    """
    (B, P), M, S = lanes.shape, len(length), visible.shape[2]
    if P > MOST_LANES:
        raise ValueError(f"{P} lanes a row are more than {MOST_LANES}")
    is_fed = (lanes < num_lanes).any(axis=1)
    of_entry = jnp.full((M * readers, P), num_lanes, jnp.int32)
    reader = jnp.where(is_fed, reader, M * readers)
    of_entry = of_entry.at[reader].set(lanes, mode="drop")
    is_read = (of_entry < num_lanes).reshape(M, -1).any(axis=1)
    lengths = jnp.where(is_read, length, 0), jnp.where(is_fed, filled, 0)
    lengths = jnp.concatenate(lengths).astype(jnp.int32)
    tiles = -(-lengths // tile)
    # A row has a tile, by whose end its lanes are put out, even before its first slot.
    tiles = tiles.at[M:].max(is_fed.astype(jnp.int32))
    ends = jnp.cumsum(tiles)
    number = jnp.arange(M * -(-prompt_slots // tile) + B * -(-S // tile))
    sequence = (ends <= number[:, None]).sum(axis=1)
    sequence = jnp.minimum(sequence, M + B - 1)  # behind the last tile: any
    bits = jnp.sum(visible << jnp.arange(P)[:, None], axis=1, dtype=jnp.int32)
    bits = jnp.pad(bits, [(0, 0), (0, -S % tile)])
    return Walk(
        count=ends[-1:].astype(jnp.int32),
        sequence=sequence.astype(jnp.int32),
        tile=(number - (ends - tiles)[sequence]).astype(jnp.int32),
        length=lengths,
        readers=of_entry.ravel(),
        lanes=lanes.astype(jnp.int32).ravel(),
        slot=jnp.where(lanes < num_lanes, slot, -1).astype(jnp.int32).ravel(),
        visible=bits.reshape(B, -1, 1, tile),
    )


def attend(
    projected,
    own,
    prompts,
    walk: Walk,
    *,
    angles=None,
    scales=None,
    eps: float = 0.0,
    cores: int = 1,
    interpret: bool | pltpu.InterpretParams = False,
):
    """Attention of a decode step's lanes, and the cache with their keys and values.

    Args:
      projected: [L, K · (G + 2) · H] of the flat list of lanes: of each key head the
        queries that share it, its key, its value.
      own: [B, K, S, 2 H], S a multiple of `PIECE`; taken over by the result.
      prompts: [M, K, S', 2 H], likewise. walk: of `walk`, in which L is the same.
      angles: `layers.rotary_angles` of the lanes; None: all are rotated already.
      scales: [2, H] float32, of the norms of queries and keys, whose epsilon is `eps`;
        None: they have none.
      cores: that share a device, and each takes a part of the heads if these divide.
      interpret: run without a TPU, slowly.

    Returns:
      out [L, K · G · H] in the dtype of `projected`, 0 for lanes that are not fed; norms,
      rotation and softmax are in float32. The new `own`.
    """
    plan = _plan(projected, own, walk, cores)
    plan = dataclasses.replace(
        plan, norm_eps=None if scales is None else eps, is_rotated=angles is None
    )
    L, K, H, groups = len(projected), own.shape[1], plan.head_dim, plan.groups
    if scales is None:
        scales = jnp.zeros((2, H))
    sin, cos = angles or (jnp.zeros((L, H // 2)),) * 2
    angles = jnp.stack([jnp.concatenate(x, 1) for x in ((-sin, sin), (cos, cos))])
    by_head = lambda n: pl.BlockSpec((L, plan.heads * n * H), lambda h, *_: (0, h))
    whole = lambda x: pl.BlockSpec(x.shape, lambda h, *_: (0,) * x.ndim)
    anywhere, scalars = pl.BlockSpec(memory_space=pl.ANY), walk[:-1]
    if not interpret:  # else XLA would copy a whole cache to VMEM, and back
        stays = lambda x: pltpu.with_memory_space_constraint(x, pltpu.HBM)
        own, prompts = stays(own), stays(prompts)
    return pl.pallas_call(
        functools.partial(kernel, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(K // plan.heads,),
            in_specs=[
                by_head(groups + 2),
                whole(angles),
                whole(scales),
                *[anywhere] * 3,
            ],
            out_specs=[by_head(groups), anywhere],
            scratch_shapes=scratch(plan, L, own.dtype),
        ),
        out_shape=[
            jax.ShapeDtypeStruct((L, K * groups * H), projected.dtype),
            jax.ShapeDtypeStruct(own.shape, own.dtype),
        ],
        input_output_aliases={len(scalars) + 5: 1},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=["parallel"],
            disable_bounds_checks=True,
            vmem_limit_bytes=_vmem_bytes(plan, projected, own.dtype),
        ),
        cost_estimate=_cost(projected, own, prompts, plan),
        interpret=interpret,
        name="decode_attention",
    )(*scalars, projected, angles, scales, walk.visible, prompts, own)


def _plan(projected, own, walk: Walk, cores: int) -> Plan:
    """What is static about a call, where queries and keys are ready."""
    (B, K, _, width), M = own.shape, len(walk.length) - len(own)
    groups, P = 2 * projected.shape[1] // (K * width) - 2, len(walk.lanes) // B
    return Plan(
        entries=M,
        row_lanes=P,
        entry_lanes=len(walk.readers) // M,
        heads=K if K % cores else K // cores,
        head_dim=width // 2,
        groups=groups,
        queries=-(-groups // SUBLANES) * SUBLANES,
        norm_eps=None,
        is_rotated=True,
        tile=walk.visible.shape[3],
        window=WINDOW * (1 + -(-(P - 1) // WINDOW)),
    )


def _vmem_bytes(plan: Plan, projected, dtype) -> int:
    """VMEM that a call may take: what it has there, and as much again for the compiler."""
    size = 8 * projected.nbytes  # arguments and results, two of each
    for x in scratch(plan, len(projected), dtype):
        if x.memory_space == pltpu.VMEM:
            *outer, rows, lanes = x.shape
            padded = -(-rows // SUBLANES) * SUBLANES * -(-lanes // 128) * 128
            size += math.prod(outer) * padded * x.dtype.itemsize
    return max(2 * size, 16 << 20)


def _cost(projected, own, prompts, plan: Plan) -> pl.CostEstimate:
    """On average: half of a row's slots in use, whole prompts, each read by all it can.

    How many entries are read is not known: here as few as rows of whole groups need.
    """
    (B, K, S, width), L = own.shape, len(projected)
    readers = plan.entry_lanes // plan.row_lanes
    entries = min(plan.entries, -(-B // readers))
    pairs = L * K * plan.groups * (S // 2 + prompts.shape[2])
    of_prompts = prompts.nbytes // plan.entries * entries
    return pl.CostEstimate(
        flops=2 * pairs * width,
        transcendentals=pairs,
        bytes_accessed=own.nbytes // 2 + of_prompts + 2 * B * S + 2 * projected.nbytes,
    )
