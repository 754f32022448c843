"""What the machine could do: measured peaks, and what the work costs at the least.

Costs are counted and not measured: the FLOPs of all matrix products, attention over
visible pairs alone, and the bytes of weights and of used keys and values. Divided by
the measured peaks they give the time below which no decoder of this model can come.
Norms, softmax, rotations and the draw are left out.
"""

import dataclasses
import time
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from pr1_jax.bench.report import Table
from pr1_jax.model.config import ModelConfig

if TYPE_CHECKING:
    from pr1_jax.bench.shapes import Bench


@dataclasses.dataclass(frozen=True)
class Limits:
    """Measured peaks of this machine.

    Attributes:
      flops_per_sec: the best of `matmuls`.
      bytes_per_sec: the best of `reads`.
      matmuls: FLOP/s of a square product by its size, in the model's dtype.
      reads: bytes/s of reading a large array, by how.
    """

    flops_per_sec: float
    bytes_per_sec: float
    matmuls: dict[int, float] = dataclasses.field(default_factory=dict)
    reads: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of some work, at the least."""

    flops: float
    bytes: float

    def seconds(self, limits: Limits) -> float:
        """The roofline: whichever of the two takes longer."""
        return max(self.flops / limits.flops_per_sec, self.bytes / limits.bytes_per_sec)


def layer_weights(config: ModelConfig) -> int:
    """Weights of all layers' matrices."""
    heads = 2 * config.num_heads + 2 * config.num_kv_heads  # q and o, k and v
    attention = config.width * heads * config.head_dim
    return config.num_layers * (attention + 3 * config.width * config.mlp_width)


def head_weights(config: ModelConfig) -> int:
    """Weights that make the logits, tied or not."""
    return config.vocab_size * config.width


def forward_cost(
    config: ModelConfig, *, tokens: int, pairs: int, cached: int, logits: int
) -> Cost:
    """Of one forward pass.

    A product with a matrix of n weights is 2n FLOPs a token; scores and their use are
    2 · 2 · N · H FLOPs a layer for each pair of a query and a key that it sees. Every
    weight is read once, whatever the number of tokens.

    Args:
      tokens: fed to the layers. pairs: of query and key, in one layer.
      cached: tokens whose keys and values are read from memory, in one layer.
      logits: tokens whose logits are made.
    """
    heads = config.num_layers * config.head_dim
    flops = 2 * layer_weights(config) * tokens
    flops += 4 * heads * config.num_heads * pairs
    flops += 2 * head_weights(config) * logits
    numbers = layer_weights(config) + (head_weights(config) if logits else 0)
    numbers += 2 * heads * config.num_kv_heads * cached
    return Cost(flops, numbers * jnp.dtype(config.dtype).itemsize)


def step_cost(
    config: ModelConfig, *, rows: int, prompt: int, response: int, lanes: int = 1
) -> Cost:
    """Of one decode step of rows that have a prompt each and the same lengths.

    Args:
      prompt, response: tokens that each row has by then, this step's not among them.
      lanes: tokens that each row feeds. A row's keys are read once for all of them;
        each lane is taken to see all, which it does but for its siblings'.
    """
    seen = prompt + response
    return forward_cost(
        config,
        tokens=rows * lanes,
        pairs=rows * lanes * seen,
        cached=rows * seen,
        logits=rows * lanes,
    )


def prefill_cost(config: ModelConfig, *, rows: int, tokens: int) -> Cost:
    """Of prompts of one length; no logits."""
    pairs = rows * tokens * (tokens + 1) // 2
    return forward_cost(config, tokens=rows * tokens, pairs=pairs, cached=0, logits=0)


def decode_seconds(
    config: ModelConfig, limits: Limits, *, rows: int, prompt: int, tokens: int
) -> float:
    """Limit of decoding `tokens` tokens in every row; its prompt is there already."""
    steps = (
        step_cost(config, rows=rows, prompt=prompt, response=done)
        for done in range(tokens)
    )
    return sum(cost.seconds(limits) for cost in steps)


def update_flops(
    config: ModelConfig,
    *,
    rows: int,
    tokens: int,
    trained: int,
    group_rows: int = 1,
) -> float:
    """FLOPs of an update: 6 a weight and token, and causal attention.

    A backward pass is two forward passes. What `remat` computes again does not count.

    Args:
      trained: tokens of a row that have a log-prob; the head is not needed elsewhere.
      group_rows: so many rows share the tokens before those, which count once.
    """
    pairs = lambda n: n * (n + 1) // 2
    shared, copies = tokens - trained, rows - rows // group_rows
    cost = forward_cost(
        config,
        tokens=rows * tokens - copies * shared,
        pairs=rows * pairs(tokens) - copies * pairs(shared),
        cached=0,
        logits=rows * trained,
    )
    return 3 * cost.flops


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


def suite(bench: "Bench") -> list[Table]:
    """The peaks that all shares are of."""
    found = bench.limits
    products = [
        {"size": size, "GFLOP/s": rate / 1e9} for size, rate in found.matmuls.items()
    ]
    reads = [{"way": way, "GB/s": rate / 1e9} for way, rate in found.reads.items()]
    note = "The best of each is the limit that everything else is a share of."
    return [
        Table(f"Square matrix products, {bench.config.dtype}", products),
        Table("Reading a large array", reads, note),
    ]


def _fastest(function, *args, repeats: int = 5) -> float:
    """The shortest of a few calls, in seconds; the first compiles and does not count."""
    jax.block_until_ready(function(*args))
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(function(*args))
        seconds.append(time.perf_counter() - began)
    return min(seconds)
