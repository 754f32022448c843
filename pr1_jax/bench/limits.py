"""The peaks that this machine was measured to reach; `model.costs` counts the work."""

import dataclasses
import time

import jax
import jax.numpy as jnp

from pr1_jax.model import costs
from pr1_jax.model.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Limits(costs.Peaks):
    """Measured peaks: the best of what was tried.

    Attributes:
      matmuls: FLOP/s of a square product by its size, in the model's dtype.
      reads: bytes/s of reading a large array, by how.
    """

    matmuls: dict[int, float] = dataclasses.field(default_factory=dict)
    reads: dict[str, float] = dataclasses.field(default_factory=dict)


def measure(config: ModelConfig, *, quick: bool = False) -> Limits:
    """Measures both peaks in the model's dtype, in a few seconds."""
    on_cpu = jax.default_backend() == "cpu"
    sizes = (512, 1024, 2048) if on_cpu else (4096, 8192, 16384)
    gib = 0.25 if on_cpu else 4.0
    if quick:
        sizes, gib = (128, 256), 2**-8
    loops = 1 if on_cpu else 16  # against the time of a launch
    dtype = jnp.dtype(config.dtype)

    matmuls = {}
    for size in sizes:
        key = jax.random.key(0)
        square = jax.random.normal(key, (size, size), dtype) * size**-0.5
        repeat = lambda a, b: jax.lax.fori_loop(0, loops, lambda _, x: x @ b, a)
        seconds = _fastest(jax.jit(repeat), square, square)
        matmuls[size] = loops * 2 * size**3 / seconds

    columns = 4096
    array = jnp.ones((int(gib * 2**30) // columns // dtype.itemsize, columns), dtype)
    ways = {
        "sum": lambda x: x.sum(dtype=jnp.float32),
        "sum of rows": lambda x: x.sum(axis=1, dtype=jnp.float32),
        "times a vector": lambda x: x @ jnp.ones(columns, dtype),
    }
    reads = {
        name: array.nbytes / _fastest(jax.jit(way), array) for name, way in ways.items()
    }
    return Limits(max(matmuls.values()), max(reads.values()), matmuls, reads)


def _fastest(function, *args, repeats: int = 5) -> float:
    """The shortest of a few calls, in seconds; the first compiles and does not count."""
    jax.block_until_ready(function(*args))
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(function(*args))
        seconds.append(time.perf_counter() - began)
    return min(seconds)
