"""What is measured: the model's shape, the sizes of the work, what a suite is given."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from pr1_jax.bench import plans
from pr1_jax.bench.limits import Limits
from pr1_jax.model.backend import Backend, choose
from pr1_jax.model.config import ModelConfig
from pr1_jax.model.params import init_params, unbox
from pr1_jax.sampler.forward import model_decode
from pr1_jax.sampler.sampler import Sampler
from pr1_jax.sampler.schedule import Batching
from pr1_jax.sampler.settings import Settings, Vocab

_NEWLINE, _TAGS = 10, 6


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the suites' work, in tokens, rows and responses."""

    # sampling
    rows: int = 32
    prompt_tokens: int = 64
    response_tokens: int = 128
    # blocks, lanes
    paths: tuple[int, ...] = (2, 4, 8)
    plan_tokens: int = 384  # about, of the longest response with two paths
    lane_path_tokens: int = 64
    lane_buckets: tuple[tuple[float, ...], ...] = ((1, 2), (1, 1.25, 1.5, 2))
    lane_steps_per_chunk: int = 16
    lane_turns: int = 3  # of a repeat: each is short
    # update
    group_size: int = 8
    update_rows: int = 32
    update_tokens: int = 192
    micro_batches: tuple[int, ...] = (4, 8, 16, 32)


QUICK = Sizes(
    rows=4,
    prompt_tokens=8,
    response_tokens=12,
    paths=(2,),
    plan_tokens=40,
    lane_path_tokens=18,
    lane_buckets=((1, 2),),
    lane_steps_per_chunk=4,
    lane_turns=1,
    group_size=4,
    update_rows=4,
    update_tokens=12,
    micro_batches=(2,),
)


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model, and what goes with its size."""

    name: str
    model: ModelConfig
    logits_chunk: int = 0  # of the update
    prefill_rows: tuple[int, ...] = (1, 4, 16)  # of the baseline, each compiled


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
            prefill_rows=(4, 16),
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
        ),
    )
}


@dataclasses.dataclass(frozen=True)
class Bench:
    """What a suite is given."""

    shape: Shape
    sizes: Sizes
    repeats: int
    limits: Limits
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

    @functools.cached_property
    def params(self) -> Any:
        """Random parameters; all suites share them."""
        init = lambda: unbox(init_params(self.config, jax.random.key(0)))
        return jax.block_until_ready(jax.jit(init)())

    @property
    def vocab(self) -> Vocab:
        """The tags and EOS are the last ids of the vocabulary."""
        ids = range(self.config.vocab_size - _TAGS - 1, self.config.vocab_size)
        return Vocab(tuple(ids), _NEWLINE)

    @property
    def planned_vocab(self) -> Vocab:
        """The same for planned blocks: a label is one token."""
        first = self.vocab.special_ids[0]
        labels = tuple((first - 3 - i,) for i in range(8))
        plan_ids = first - 2, first - 1
        return dataclasses.replace(self.vocab, label_ids=labels, plan_ids=plan_ids)

    @property
    def endless_vocab(self) -> Vocab:
        """EOS is an id past the vocabulary: no response ends before its budget."""
        *tags, _ = self.vocab.special_ids
        return Vocab((*tags, self.config.vocab_size), _NEWLINE)

    @property
    def key(self) -> jax.Array:
        """The PRNG key of all draws, by which planned samplers know their responses."""
        return jax.random.key(1)

    def planned(
        self,
        planned: Sequence[plans.Plan],
        *,
        rows: int,
        num_paths: int = 2,
        response_tokens: int = 0,
        kind: type[Sampler] = Sampler,
        **batching: Any,
    ) -> Sampler:
        """A sampler whose calls with `key` follow plans, which alone end anything.

        Args:
          response_tokens: capacity, if larger than the plans need. kind: of sampler.
        """
        needed = max(plan.needs for plan in planned)
        vocab, of_plans = self.vocab, {}
        if any(plan.path_plan for plan in planned):
            vocab = self.planned_vocab
            labels = tuple(f" {i + 1}" for i in range(len(vocab.label_ids)))
            of_plans = {"planned": True, "path_labels": labels, "min_plan_tokens": 3}
        settings = Settings(
            max_prompt_tokens=max(plan.prompt for plan in planned),
            max_response_tokens=max(needed, response_tokens),
            num_paths=num_paths,
            max_blocks=max(len(plan.main) for plan in planned),
            min_path_tokens=3 if of_plans else 2,
            summary_reserve=1,
            answer_reserve=0,
            **of_plans,
        )
        return kind(
            self.backend,
            vocab,
            settings,
            Batching(rows=rows, **batching),
            decode_fn=plans.planned(
                model_decode(self.backend, 1), planned, self.key, vocab
            ),
        )

    def prompts(self, lengths) -> list[np.ndarray]:
        """Random prompts of these lengths, without tags."""
        rng, ids = np.random.default_rng(0), self.config.vocab_size - _TAGS - 1
        return [rng.integers(0, ids, length) for length in lengths]
