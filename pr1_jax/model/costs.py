"""What work with a decoder costs at the least: FLOPs and bytes, counted by hand.

Counted are the FLOPs of all matrix products, attention over visible pairs alone, and
the bytes of weights and of used keys and values. Divided by the peaks of a device they
give the time below which no program for this model can come. Norms, softmax, rotations
and the draw are left out. `bench` sets measured times beside it, `plan` predicts by it.
"""

import dataclasses

import jax.numpy as jnp

from pr1_jax.model.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Peaks:
    """The most that a device computes and reads in a second."""

    flops_per_sec: float
    bytes_per_sec: float


@dataclasses.dataclass(frozen=True)
class Cost:
    """FLOPs and bytes of some work, at the least."""

    flops: float
    bytes: float

    def seconds(self, peaks: Peaks) -> float:
        """The roofline: whichever of the two takes longer."""
        return max(self.flops / peaks.flops_per_sec, self.bytes / peaks.bytes_per_sec)


def layer_weights(config: ModelConfig) -> int:
    """The number of weights in all layers' matrices."""
    heads = 2 * config.num_heads + 2 * config.num_kv_heads  # q and o, k and v
    attention = config.width * heads * config.head_dim
    return config.num_layers * (attention + 3 * config.width * config.mlp_width)


def head_weights(config: ModelConfig) -> int:
    """The number of weights that make the logits, tied or not."""
    return config.vocab_size * config.width


def weight_bytes(config: ModelConfig, *, logits: bool = True) -> int:
    """Bytes of all weights that a forward pass reads, with or without the head."""
    count = layer_weights(config) + logits * head_weights(config)
    return count * jnp.dtype(config.dtype).itemsize


def cache_bytes(config: ModelConfig, tokens: int) -> int:
    """Bytes of the keys and values of so many tokens, in all layers."""
    numbers = 2 * config.num_layers * config.num_kv_heads * config.head_dim * tokens
    return numbers * jnp.dtype(config.dtype).itemsize


def forward(
    config: ModelConfig, *, tokens: int, pairs: int, cached: int, logits: int
) -> Cost:
    """The cost of one forward pass.

    A product with a matrix of n weights is 2n FLOPs a token; scores and their use are
    2 · 2 · N · H FLOPs a layer for each pair of a query and a key that it sees. Every
    weight is read once, whatever the number of tokens.

    Args:
      tokens: fed to the layers.
      pairs: of query and key, in one layer.
      cached: tokens whose keys and values are read from memory.
      logits: tokens whose logits are made.
    """
    heads = config.num_layers * config.num_heads * config.head_dim
    flops = 2 * layer_weights(config) * tokens
    flops += 4 * heads * pairs
    flops += 2 * head_weights(config) * logits
    size = weight_bytes(config, logits=logits > 0) + cache_bytes(config, cached)
    return Cost(flops, size)


def decode_step(
    config: ModelConfig, *, rows: int, prompt: int, response: int, lanes: int = 1
) -> Cost:
    """The cost of one decode step of rows of the same lengths.

    Args:
      prompt, response: tokens that each row has by then, without those of this step.
      lanes: tokens that each row feeds. A row's keys are read once for all of them;
        each lane is taken to see all, which it does but for its siblings'.
    """
    seen = prompt + response
    return forward(
        config,
        tokens=rows * lanes,
        pairs=rows * lanes * seen,
        cached=rows * seen,
        logits=rows * lanes,
    )


def prefill(config: ModelConfig, *, rows: int, tokens: int) -> Cost:
    """The cost of prefilling prompts of one length; no logits are made."""
    pairs = rows * _causal_pairs(tokens)
    return forward(config, tokens=rows * tokens, pairs=pairs, cached=0, logits=0)


def decode_seconds(
    config: ModelConfig, peaks: Peaks, *, rows: int, prompt: int, tokens: int
) -> float:
    """The least time for `tokens` tokens in every row, after its prompt's prefill."""
    steps = (
        decode_step(config, rows=rows, prompt=prompt, response=done)
        for done in range(tokens)
    )
    return sum(cost.seconds(peaks) for cost in steps)


def update_flops(
    config: ModelConfig, *, rows: int, tokens: int, trained: int, group_rows: int = 1
) -> float:
    """FLOPs of an update: 6 a weight and token, and causal attention.

    A backward pass is two forward passes. What `remat` computes again does not count.

    Args:
      trained: tokens of a row that have a log-prob; the head is not needed elsewhere.
      group_rows: so many rows share the tokens before those, which count once.
    """
    shared, copies = tokens - trained, rows - rows // group_rows
    cost = forward(
        config,
        tokens=rows * tokens - copies * shared,
        pairs=rows * _causal_pairs(tokens) - copies * _causal_pairs(shared),
        cached=0,
        logits=rows * trained,
    )
    return 3 * cost.flops


def _causal_pairs(tokens: int) -> int:
    return tokens * (tokens + 1) // 2
