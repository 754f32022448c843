"""What is measured: the model's shape, the sizes of the work, what a suite is given."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from pr1_jax.bench.limits import Limits
from pr1_jax.bench.plans import Plan, Trace, planned_sampler
from pr1_jax.model.backend import Backend, choose
from pr1_jax.model.config import ModelConfig
from pr1_jax.model.params import init_params, unbox
from pr1_jax.sampler.sampler import Sampler
from pr1_jax.sampler.settings import Vocab

_NEWLINE, _TAGS = 10, 6


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the suites' work, in tokens, rows and responses."""

    # sampling, sweeps
    rows: int = 32
    prompt_tokens: int = 64
    response_tokens: int = 128
    used_tokens: int = 64  # while capacity is swept
    capacities: tuple[int, ...] = (128, 256, 512, 1024)
    prompt_capacities: tuple[int, ...] = (64, 128, 256, 512)
    response_lengths: tuple[int, ...] = (32, 64, 128, 256, 512)
    prompt_lengths: tuple[int, ...] = (64, 128, 256, 512, 1024)
    row_counts: tuple[int, ...] = (4, 8, 16, 32, 64, 128)
    path_counts: tuple[int, ...] = (2, 3, 4, 6, 8)
    # prompts
    groups: int = 4
    group_size: int = 8
    long_prompt: int = 1000
    # blocks, lanes, refill
    paths: tuple[int, ...] = (2, 4, 8)
    plan_tokens: int = 384  # about, of the longest response with two paths
    lane_path_tokens: int = 64
    lane_buckets: tuple[tuple[float, ...], ...] = ((1, 2), (1, 1.25, 1.5, 2))
    lane_steps_per_chunk: int = 16
    lane_turns: int = 3  # of a repeat: each is short
    refill_responses: tuple[int, ...] = (32, 64, 256)
    # update
    update_rows: int = 32
    update_tokens: int = 192
    micro_batches: tuple[int, ...] = (4, 8, 16, 32)
    # decode_limits
    batches: tuple[int, ...] = (1, 32, 128)
    update_lengths: tuple[int, ...] = (192, 512, 1024, 2048)
    update_batches: tuple[int, ...] = (8, 32)
    micro_batch_tokens: int = 16384


QUICK = Sizes(
    rows=4,
    prompt_tokens=8,
    response_tokens=12,
    used_tokens=8,
    capacities=(128,),
    prompt_capacities=(72,),
    response_lengths=(12,),
    prompt_lengths=(72,),
    row_counts=(2,),
    path_counts=(3,),
    groups=1,
    group_size=4,
    long_prompt=70,
    paths=(2,),
    plan_tokens=40,
    lane_path_tokens=18,
    lane_buckets=((1, 2),),
    lane_steps_per_chunk=4,
    lane_turns=1,
    refill_responses=(4, 8),
    update_rows=4,
    update_tokens=12,
    micro_batches=(2,),
    batches=(4,),
    update_lengths=(12,),
    update_batches=(4,),
    micro_batch_tokens=24,
)


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model, and what goes with its size."""

    name: str
    model: ModelConfig
    logits_chunk: int = 0  # of the update
    plan_tokens: int = 0  # other than `Sizes.plan_tokens`
    # The baselines' prefill: shapes that are compiled. Few cost padding, many time.
    prefill_rows: tuple[int, ...] = (1, 4, 16)
    prefill_lengths_per_octave: int = 4


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            "small",
            ModelConfig(
                vocab_size=4096,
                num_layers=8,
                width=256,
                num_heads=8,
                num_kv_heads=4,
                head_dim=32,
                mlp_width=768,
            ),
        ),
        Shape(
            "qwen3_0_6b",
            ModelConfig(
                vocab_size=151_936,
                num_layers=28,
                width=1024,
                num_heads=16,
                num_kv_heads=8,
                head_dim=128,
                mlp_width=3072,
                dtype="bfloat16",
                param_dtype="bfloat16",
                scan_layers=True,
                remat=True,
            ),
            logits_chunk=2048,
            plan_tokens=1024,
            prefill_rows=(4, 16),
            prefill_lengths_per_octave=2,
        ),
        Shape(
            "tiny",
            ModelConfig(
                vocab_size=64,
                num_layers=1,
                width=16,
                num_heads=2,
                num_kv_heads=1,
                head_dim=8,
                mlp_width=24,
            ),
            prefill_rows=(2,),
            prefill_lengths_per_octave=1,
        ),
    )
}


def vocab_of(config: ModelConfig) -> Vocab:
    """The tags and EOS are the last ids of the vocabulary."""
    ids = range(config.vocab_size - _TAGS - 1, config.vocab_size)
    return Vocab(tuple(ids), _NEWLINE)


@dataclasses.dataclass(frozen=True)
class Bench:
    """What a suite is given."""

    shape: Shape
    sizes: Sizes
    repeats: int
    limits: Limits
    traces: tuple[Trace, ...]
    traces_from: str
    quick: bool = False
    kernels: str = "auto"  # of decode steps and updates, as of `kernels`

    @property
    def config(self) -> ModelConfig:
        """The model."""
        return self.shape.model

    @functools.cached_property
    def backend(self) -> Backend:
        """What decode steps are computed with."""
        return choose(self.config, self.kernels)

    @property
    def plan_tokens(self) -> int:
        """Tokens of the longest planned response with two paths, about."""
        own = 0 if self.quick else self.shape.plan_tokens
        return own or self.sizes.plan_tokens

    @functools.cached_property
    def params(self) -> Any:
        """Random parameters; all suites share them."""
        init = lambda: unbox(init_params(self.config, jax.random.key(0)))
        return jax.block_until_ready(jax.jit(init)())

    @property
    def vocab(self) -> Vocab:
        """The vocabulary of `vocab_of`."""
        return vocab_of(self.config)

    @property
    def endless_vocab(self) -> Vocab:
        """EOS is an id past the vocabulary: no response ends before its budget."""
        *tags, _ = self.vocab.special_ids
        return Vocab((*tags, self.config.vocab_size), _NEWLINE)

    @property
    def key(self) -> jax.Array:
        """The PRNG key of all draws, by which planned samplers know their responses."""
        return jax.random.key(1)

    def planned(self, planned: Sequence[Plan], **options: Any) -> Sampler:
        """A sampler whose responses follow plans: `plans.planned_sampler`."""
        return planned_sampler(self.backend, self.vocab, planned, self.key, **options)

    def prompts(self, lengths) -> list[np.ndarray]:
        """Random prompts of these lengths, without tags."""
        rng, ids = np.random.default_rng(0), self.config.vocab_size - _TAGS - 1
        return [rng.integers(0, ids, length) for length in lengths]
