"""Attention by a dense mask against the exact rule: `python -m pr1_jax.study.dense`.

The published code writes visibility as a T×T mask for each trace (bool, from which
attention makes an additive one), and all T×T scores are computed, and kept for the
backward pass. `attention.label_attention` computes the same function from two integers a
token. Here both are one layer's attention, forward and backward, of one response with
blocks, in the shape of the embedded model: how far outputs and gradients are apart, the
memory that each takes beside its inputs (its mask included), and the time.
"""

import json
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

from absl import flags

from pr1_jax.system import cli

_OUT = flags.DEFINE_string("out", None, "File for the figures; default: print them.")
_MAX = flags.DEFINE_integer("max", 2048, "Longest sequence, in tokens.", lower_bound=32)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed calls of each.", lower_bound=1)

_HEADS, _KV_HEADS, _HEAD_DIM = 4, 2, 32


def labels_of(length: int) -> tuple[Any, Any]:
    """Labels (block, path) of a response, int32 [1, length] each.

    Blocks of two paths; each of them, and what lies between blocks, is an eighth.
    """
    import numpy as np

    eighth = np.arange(length) // max(1, -(-length // 8))
    block = np.select([(eighth >= 1) & (eighth <= 2), eighth >= 4], [1, 2], 0)
    block = np.where(eighth >= 6, 0, block)
    path = np.select([(eighth == 1) | (eighth == 4), block > 0], [1, 2], 0)
    return block[None].astype(np.int32), path[None].astype(np.int32)


def dense_attention(q, k, v, mask):
    """Attention under a mask, bool [B, T, T]; shapes of `attention.label_attention`."""
    import jax
    import jax.numpy as jnp

    from pr1_jax.kernels.attention import NEG_INF, group_queries, ungroup_queries

    grouped = group_queries(q, k.shape[2])  # [B, K, T · R, H]
    scores = jnp.einsum("BKQH,BSKH->BKQS", grouped, k) * q.shape[-1] ** -0.5
    bias = jnp.where(mask, 0.0, NEG_INF)[:, None]
    scores = scores + jnp.repeat(bias, q.shape[2] // k.shape[2], axis=2)
    probs = jax.nn.softmax(scores, axis=-1)
    return ungroup_queries(jnp.einsum("BKQS,BSKH->BKQH", probs, v), q)


def compare(length: int, repeats: int) -> dict[str, float]:
    """Figures of one length: `exact_…` and `dense_…` bytes and seconds, differences."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from pr1_jax import layout
    from pr1_jax.kernels import attention

    block, path = labels_of(length)
    zeros = np.zeros(length, np.int32)
    mask = layout.visible(layout.Layout(zeros, block[0], path[0]))[None]
    key = jax.random.key(length)
    shape = lambda heads: (1, length, heads, _HEAD_DIM)
    heads = (_HEADS, _KV_HEADS, _KV_HEADS, _HEADS)
    *inputs, weight = (
        jax.random.normal(jax.random.fold_in(key, i), shape(n))
        for i, n in enumerate(heads)
    )

    def with_gradient(attend):
        def run(inputs, *labels):
            out, back = jax.vjp(lambda *x: attend(*x, *labels), *inputs)
            return out, back(weight)

        return run

    jobs = {
        "exact": (attention.label_attention, (jnp.array(block), jnp.array(path))),
        "dense": (dense_attention, (jnp.array(mask),)),
    }
    figures: dict[str, float] = {"tokens": length}
    compiled, outputs, times = {}, {}, {name: [] for name in jobs}
    for name, (attend, labels) in jobs.items():
        lowered = jax.jit(with_gradient(attend)).lower(tuple(inputs), *labels)
        compiled[name] = lowered.compile()
        analysis = compiled[name].memory_analysis()
        of_labels = sum(x.nbytes for x in labels)
        figures[f"{name}_bytes"] = int(analysis.temp_size_in_bytes) + of_labels
        outputs[name] = jax.block_until_ready(compiled[name](tuple(inputs), *labels))
    for _ in range(repeats):  # taking turns
        for name, (_, labels) in jobs.items():
            began = time.perf_counter()
            jax.block_until_ready(compiled[name](tuple(inputs), *labels))
            times[name].append(time.perf_counter() - began)
    for name, taken in times.items():
        figures[f"{name}_sec"] = statistics.median(taken)
    gaps = jax.tree.map(
        lambda a, b: float(jnp.abs(a - b).max()), outputs["exact"], outputs["dense"]
    )
    return figures | {"max_difference": max(jax.tree.leaves(gaps))}


def lengths(longest: int) -> Sequence[int]:
    """128, 256, … up to `longest`, which is always one of them."""
    sizes = []
    while not sizes or sizes[0] > 128:
        sizes.insert(0, longest if not sizes else sizes[0] // 2)
    return sizes


def main(argv: list[str]) -> None:
    """Writes or prints a list with the figures of each length."""
    del argv
    from pr1_jax.system import files

    figures = [compare(length, _REPEATS.value) for length in lengths(_MAX.value)]
    if _OUT.value is None:
        json.dump(figures, sys.stdout, indent=1)
    else:
        files.write_json(_OUT.value, figures)


if __name__ == "__main__":
    cli.run(main)
