"""Attention by a dense mask against the exact rule: `python -m pr1_jax.study.dense --out=FILE`.

The published code writes visibility as a T×T mask for each trace (bool, from which
attention makes an additive one), and all T×T scores are computed, and kept for the
backward pass. `attention.label_attention` computes the same function from two integers a
token. Here both are one layer's attention, forward and backward, of one response with
blocks, in the shape of the embedded model: how far outputs and gradients are apart, the
memory that each takes beside its inputs (its mask included), and the time.
"""

import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from pr1_jax import layout
from pr1_jax.kernels import attention
from pr1_jax.system import cli, files

_OUT = flags.DEFINE_string("out", None, "File for the figures.")
_MAX = flags.DEFINE_integer("max", 2048, "Longest sequence, in tokens.", lower_bound=32)

_REPEATS = 5  # timed calls of each
_HEADS, _KV_HEADS, _HEAD_DIM = 4, 2, 32


def labels_of(length: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels (block, path) of a response, int32 [1, length] each.

    Blocks of two paths; each of them, and what lies between blocks, is an eighth.
    """
    eighth = np.arange(length) // max(1, -(-length // 8))
    block, path = np.array([[0, 1, 1, 0, 2, 2, 0, 0], [0, 1, 2, 0, 1, 2, 0, 0]])
    return tuple(x[eighth][None].astype(np.int32) for x in (block, path))


def dense_attention(q, k, v, mask):
    """Attention under a mask, bool [B, T, T]; shapes of `attention.label_attention`."""
    grouped = attention.group_queries(q, k.shape[2])  # [B, K, T · R, H]
    scores = jnp.einsum("BKQH,BSKH->BKQS", grouped, k) * q.shape[-1] ** -0.5
    bias = jnp.where(mask, 0.0, attention.NEG_INF)[:, None]
    scores = scores + jnp.repeat(bias, q.shape[2] // k.shape[2], axis=2)
    probs = jax.nn.softmax(scores, axis=-1)
    return attention.ungroup_queries(jnp.einsum("BKQS,BSKH->BKQH", probs, v), q)


def _with_gradient(attend, weight, inputs, *labels):
    """Attention to `inputs`, and the gradient of its product with `weight`."""
    out, back = jax.vjp(lambda *x: attend(*x, *labels), *inputs)
    return out, back(weight)


def compare(length: int, repeats: int = _REPEATS) -> dict[str, float]:
    """Figures of one length: `exact_…` and `dense_…` bytes and seconds, differences."""
    block, path = labels_of(length)
    mask = layout.visible(layout.Layout(np.zeros_like(block[0]), block[0], path[0]))
    *inputs, weight = (
        jax.random.normal(
            jax.random.fold_in(jax.random.key(length), i), (1, length, n, _HEAD_DIM)
        )
        for i, n in enumerate((_HEADS, _KV_HEADS, _KV_HEADS, _HEADS))
    )
    jobs = {
        "exact": (attention.label_attention, (jnp.array(block), jnp.array(path))),
        "dense": (dense_attention, (jnp.array(mask[None]),)),
    }
    figures: dict[str, float] = {"tokens": length}
    calls, outputs, times = {}, {}, {name: [] for name in jobs}
    for name, (attend, labels) in jobs.items():
        job = jax.jit(functools.partial(_with_gradient, attend, weight))
        program = job.lower(inputs, *labels).compile()
        of_labels = sum(x.nbytes for x in labels)
        temporary = program.memory_analysis().temp_size_in_bytes
        figures[f"{name}_bytes"] = int(temporary) + of_labels
        calls[name] = functools.partial(program, inputs, *labels)
        outputs[name] = jax.block_until_ready(calls[name]())
    for _ in range(repeats):  # taking turns
        for name, call in calls.items():
            began = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(time.perf_counter() - began)
    for name, taken in times.items():
        figures[f"{name}_sec"] = statistics.median(taken)
    gap = lambda a, b: float(jnp.abs(a - b).max())
    gaps = jax.tree.map(gap, outputs["exact"], outputs["dense"])
    return figures | {"max_difference": max(jax.tree.leaves(gaps))}


def lengths(longest: int) -> list[int]:
    """128, 256, … up to `longest`, which is always one of them."""
    sizes = [longest]
    while sizes[0] > 128:
        sizes.insert(0, sizes[0] // 2)
    return sizes


def main(argv: list[str]) -> None:
    """Writes a list with the figures of each length."""
    del argv
    cli.require([_OUT])
    files.write_json(_OUT.value, [compare(length) for length in lengths(_MAX.value)])


if __name__ == "__main__":
    cli.run(main)
