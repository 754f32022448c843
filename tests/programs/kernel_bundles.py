"""Bundles of each Pallas kernel at Qwen3-4B's shapes, beside JAX's splash attention.

    python -m tests.programs.kernel_bundles [--topology=v5e:2x2] [--kernels=flash,…]

needs `pip install "jax[tpu]"` and no TPU. A bundle is what a core issues in a cycle, so
the share of the peak is what a kernel reaches where nothing waits for memory. It is of a
step of the grid that does all that a step may do (`pr1_jax/plan/bundles.py`). Shapes are
of one device of four that share the heads (`tensor` 4), with one sequence of 3,072.
"""

import argparse
import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

from pr1_jax.plan import hardware
from pr1_jax.system.tables import Table

TOKENS, HEADS, KV_HEADS, HEAD_DIM = 3072, 8, 2, 128


def flash() -> tuple[Callable, list]:
    """Ours under the path mask, forward and both gradients."""
    import jax
    import jax.numpy as jnp

    from pr1_jax.kernels import pallas

    attend = lambda *xs: pallas.flash_attention(*xs).astype(jnp.float32).sum()
    shapes = [
        ((1, TOKENS, n, HEAD_DIM), "bfloat16") for n in (HEADS, KV_HEADS, KV_HEADS)
    ]
    return jax.grad(attend, (0, 1, 2)), shapes + 2 * [((1, TOKENS), "int32")]


def splash() -> tuple[Callable, list]:
    """JAX's own, causal, its default tiles but for lengths: as Tunix calls it."""
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

    tile = 1024
    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv")
    names += ("block_kv_dkv", "block_kv_dkv_compute", "block_q_dq", "block_kv_dq")
    sizes = splash_attention_kernel.BlockSizes(**dict.fromkeys(names, tile))
    mask = splash_attention_mask.CausalMask((TOKENS, TOKENS))
    masks = splash_attention_mask.MultiHeadMask([mask] * (HEADS // KV_HEADS))

    def attend(*xs):  # its mask is an array, which has to be traced
        kernel = splash_attention_kernel.make_splash_mqa_single_device(
            masks, block_sizes=sizes
        )
        return jax.vmap(kernel)(*xs).astype(jnp.float32).sum()

    shapes = [((KV_HEADS, HEADS // KV_HEADS, TOKENS, HEAD_DIM), "bfloat16")]
    shapes += 2 * [((KV_HEADS, TOKENS, HEAD_DIM), "bfloat16")]
    return jax.grad(attend, (0, 1, 2)), shapes


def decode(paths: int) -> tuple[Callable, list]:
    """Ours of a decode step: 32 rows of so many lanes, prompts shared by 8 rows."""
    import jax.numpy as jnp

    from pr1_jax.kernels import decode

    rows, slots, entries, prompt_slots = 32, 3072, 8, 2048
    lanes, width = rows * paths, 2 * HEAD_DIM
    shared = {
        "readers": 8,
        "prompt_slots": prompt_slots,
        "tile": decode.tile_slots(KV_HEADS, HEAD_DIM, jnp.bfloat16),
        "num_lanes": lanes,
    }

    def attend(lane, slot, visible, filled, length, reader, *arrays):
        walk = decode.walk(
            *(lane, slot, visible, filled), length=length, reader=reader, **shared
        )
        *arrays, sin, cos, scales = arrays
        norms = {"scales": scales, "eps": 1e-6}
        return decode.attend(*arrays, walk, angles=(sin, cos), **norms)

    ints = [(rows, paths), (rows, paths), (rows,), (entries,), (rows,)]
    shapes = [(shape, "int32") for shape in ints]
    shapes.insert(2, ((rows, paths, slots), "bool"))
    shapes += [((lanes, (HEADS + 2 * KV_HEADS) * HEAD_DIM), "bfloat16")]
    shapes += [((rows, KV_HEADS, slots, width), "bfloat16")]
    shapes += [((entries, KV_HEADS, prompt_slots, width), "bfloat16")]
    shapes += 2 * [((lanes, HEAD_DIM // 2), "float32")] + [((2, HEAD_DIM), "float32")]
    return attend, shapes


# By name: what returns a function to compile, and shapes of its arguments.
KERNELS = {
    "flash": flash,
    "decode": functools.partial(decode, 1),
    "decode in blocks": functools.partial(decode, 2),
    "splash": splash,
}


def measure(name: str, topology: hardware.Topology) -> list[Mapping[str, Any]]:
    """A row for each kernel that one of `KERNELS` calls."""
    import jax
    import numpy as np

    from pr1_jax.plan import hlo, kernels, schedule

    axes = ("data", "fsdp", "tensor")
    device = hardware.open_devices(topology)[0]
    mesh = jax.sharding.Mesh(np.array(device).reshape(1, 1, 1), axes)
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    with jax.set_mesh(mesh):
        function, shapes = KERNELS[name]()
        arguments = [jax.ShapeDtypeStruct(*x, sharding=place) for x in shapes]
        text = jax.jit(function).lower(*arguments).compile().as_text()
    program = hlo.parse(text)
    bodies = kernels.measure(program, topology.hardware)
    found = schedule.of_program(program, topology.hardware, bodies)
    return [
        {
            "of": name,
            "kernel": x.name,
            "MFLOP a step": bodies[x.name].flops / 1e6 or None,
            "MB a step": bodies[x.name].bytes / 1e6 or None,
            "bundles a step": bodies[x.name].bundles,
            "steps": bodies[x.name].steps or None,
            "share of the peak": x.peak_share or None,
            "MB": x.bytes / 1e6,
            "ms": 1e3 * x.seconds,
            "by": x.source,
            "share of bandwidth": x.bytes / topology.hardware.hbm_per_sec / x.seconds,
            "error": bodies[x.name].error,
        }
        for x in found.costs
        if x.name in bodies
    ]


def main() -> None:
    """Prints a table for each topology."""
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--topology", default="v5e:2x2", help="one, or some with commas")
    flags.add_argument("--kernels", default=",".join(KERNELS))
    args = flags.parse_args()
    for text in args.topology.split(","):
        topology = hardware.parse_topology(text)
        os.environ |= hardware.environment(topology)
        rows = [x for name in args.kernels.split(",") for x in measure(name, topology)]
        print(Table(f"Kernels on {text}", rows).markdown())


if __name__ == "__main__":
    main()
