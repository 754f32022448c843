"""Memory of one device by part, in bytes: from compiled programs, or by arithmetic.

A run has five moments at which memory can run out: the update, a prefill, the decode
steps, the growth of the responses' cache to its full size, and evaluation. While
sampling, the training state stays where it is. What lives across programs is counted
from shapes and shardings. What a program needs besides is what the compiler says that
it allocates, less those; without a compiler it is estimated.
"""

import dataclasses
import re
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pr1_jax.model import costs
from pr1_jax.model.config import ModelConfig
from pr1_jax.plan.programs import (
    abstract_batch,
    abstract_state,
    decoding_params,
    device_bytes,
    evaluation_entries,
    sampling_shape,
    training_stage,
)
from pr1_jax.stages.experiment import Experiment
from pr1_jax.system.accelerators import GIB
from pr1_jax.system.mesh import batch_shards

PARAMETERS, OPTIMIZER = "parameters", "optimizer state"
FROZEN = "frozen parameters"  # where adapters are trained; these are "parameters" then
REFERENCE, BATCH = "reference parameters", "batch"
GRADIENTS, TRAINING = "gradients", "training temporaries"
WEIGHTS, RESPONSES, PROMPTS = "decoding weights", "response cache", "prompt cache"
PREFILL, DECODE = "prefill temporaries", "decode temporaries"
GROWTH = "old cache while it grows"
SFT_UPDATE = "SFT update"  # a moment, where RL's has another

# What to change, by the part that is too large: +field to raise it, -field to lower it.
_REMEDIES = {
    PARAMETERS: ("+mesh.fsdp", "+mesh.tensor"),
    OPTIMIZER: ("+mesh.fsdp", "+mesh.tensor"),
    FROZEN: ("+mesh.fsdp", "+mesh.tensor"),
    REFERENCE: ("+mesh.fsdp", "+mesh.tensor"),
    BATCH: ("+rl.mini_batches",),
    GRADIENTS: ("+mesh.fsdp", "+mesh.tensor"),
    TRAINING: (
        "-rl.micro_batch_size",
        "+model.remat",
        "-model.logits_chunk",
        "-model.query_chunk",
        "+mesh.tensor",
    ),
    WEIGHTS: ("+mesh.tensor",),
    RESPONSES: ("-rollout.rows", "+mesh.tensor", "-rollout.max_response_tokens"),
    PROMPTS: ("-rollout.rows", "-rollout.max_prompt_tokens", "+mesh.tensor"),
    PREFILL: ("-rollout.prompts_per_prefill", "+mesh.tensor"),
    DECODE: ("-rollout.rows", "+mesh.tensor"),
    GROWTH: ("-rollout.rows", "+mesh.tensor", "-rollout.max_response_tokens"),
}


@dataclasses.dataclass(frozen=True)
class Program:
    """What a compiled program allocates on a device, arguments included.

    Attributes:
      total: bytes. arguments: those of them that are arguments; 0 = not known.
      compile_sec: what compiling took.
      fits: whether the compiler found enough memory; else `total` is what it wanted.
    """

    total: int
    arguments: int = 0
    compile_sec: float = 0.0
    fits: bool = True


def compile_program(lowered: jax.stages.Lowered, arguments: int) -> Program:
    """Compiles; a program that is too large is a `Program` as well.

    Args:
      arguments: bytes of them by count, for one that is too large.
    """
    return compile_with_text(lowered, arguments)[0]


def compile_with_text(
    lowered: jax.stages.Lowered, arguments: int
) -> tuple[Program, str]:
    """Compiles, as `compile_program`; with its text, "" for one that is too large."""
    began = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        total = _wanted(str(error), arguments)
        if total is None:
            raise
        took = time.perf_counter() - began
        return Program(total, arguments, took, fits=False), ""
    took, analysis = time.perf_counter() - began, compiled.memory_analysis()
    given = analysis.argument_size_in_bytes
    return Program(program_bytes(analysis), given, took), compiled.as_text()


def program_bytes(analysis: Any) -> int:
    """What a program allocates on a device, from its `memory_analysis()`."""
    total = analysis.argument_size_in_bytes + analysis.output_size_in_bytes
    return total + analysis.temp_size_in_bytes - analysis.alias_size_in_bytes


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_TOTAL = re.compile(r"Used ([\d.]+)([KMGT]?)\w* of [\d.]+[KMGT]?\w* hbm")
_TEMPORARIES = re.compile(r"HLO temporaries \(([\d.]+)([KMGT]?)\w*\) exceeds")


def _wanted(message: str, arguments: int) -> int | None:
    """Bytes that a program would have used, from the TPU compiler's message."""
    size = lambda match: int(float(match[1]) * _UNITS[match[2]])
    if match := _TOTAL.search(message):
        return size(match)
    if match := _TEMPORARIES.search(message):
        return arguments + size(match)
    return None


@dataclasses.dataclass(frozen=True)
class Moment:
    """One of the times at which memory can run out: bytes by part."""

    name: str
    parts: Mapping[str, int]
    compiled: bool = True  # the compiler found enough memory, or was not asked

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())

    @property
    def biggest(self) -> str:
        """The part that takes most."""
        return max(self.parts, key=self.parts.__getitem__)

    def fits(self, limit: int) -> bool:
        """Whether so many bytes are enough."""
        return self.compiled and self.total <= limit


def resident(experiment: Experiment) -> dict[str, int]:
    """The training state and frozen parameters, which are there all the time."""
    state = abstract_state(experiment)
    parts = {
        PARAMETERS: device_bytes(state.params),
        OPTIMIZER: device_bytes(state.opt_state),
    }
    if "rl" in experiment.config.stages and experiment.config.rl.kl_coef:
        parts[REFERENCE] = parts[PARAMETERS]
    if frozen := device_bytes(experiment.abstract_frozen()):
        parts[FROZEN] = frozen
    return parts


def update_arguments(experiment: Experiment) -> int:
    """Bytes of what an update is given: the state, a mini-batch, frozen parameters."""
    given = abstract_state(experiment), abstract_batch(experiment)
    return device_bytes((*given, experiment.abstract_frozen()))


def update_moment(experiment: Experiment, program: Program) -> Moment:
    """The update; of what its program allocates, gradients are a part."""
    parts = resident(experiment)
    parts[BATCH] = device_bytes(abstract_batch(experiment))
    rest = max(program.total - update_arguments(experiment), 0)
    parts[GRADIENTS] = min(parts[PARAMETERS], rest)
    parts[TRAINING] = rest - parts[GRADIENTS]
    return Moment("update", parts, program.fits)


def cache_bytes(experiment: Experiment, rows: int, tokens: int) -> int:
    """Keys and values of so many rows and tokens on one device."""
    c, tensor = experiment.model, experiment.mesh.shape["tensor"]
    shards = tensor if c.num_kv_heads % tensor == 0 else 1
    return costs.cache_bytes(c, rows * tokens) // shards


def sampling_parts(experiment: Experiment) -> dict[str, int]:
    """What sampling keeps beside the training state, and gives to a decode step.

    A prefill is given the weights and the cache of prompts alone.
    """
    shape = sampling_shape(experiment)
    return {
        WEIGHTS: device_bytes(decoding_params(experiment)),
        RESPONSES: cache_bytes(experiment, shape.rows, shape.slots),
        PROMPTS: cache_bytes(experiment, shape.entries, shape.prompt_tokens),
    }


def sampling_moments(
    experiment: Experiment, prefill: Program, decode: Program
) -> list[Moment]:
    """Prefill, decode, growth of the cache and evaluation, beside the training state.

    An evaluation decodes and grows as RL does, with more prompts.

    Args:
      prefill: what one needs besides its arguments, as a program without any.
    """
    shape, kept = sampling_shape(experiment), sampling_parts(experiment)
    parts = resident(experiment) | kept
    decode_rest = max(decode.total - sum(kept.values()), 0)
    old = cache_bytes(experiment, shape.rows, shape.slots_before)
    moments = [
        Moment("prefill", parts | {PREFILL: prefill.total}, prefill.fits),
        Moment("decode", parts | {DECODE: decode_rest}, decode.fits),
        Moment("cache growth", parts | {GROWTH: old}),
    ]
    if entries := evaluation_entries(experiment):
        largest = max(moments[1:], key=lambda moment: moment.total)
        prompts = cache_bytes(experiment, entries, shape.prompt_tokens)
        evaluating = {**largest.parts, PROMPTS: prompts}
        moments.append(Moment("evaluation", evaluating, largest.compiled))
    return moments


def advice(experiment: Experiment, moment: Moment, limit: int) -> str:
    """Why a moment does not fit, and what to change."""
    config, tenant = experiment.config, moment.biggest
    stage = training_stage(config)
    stage = "sft" if moment.name == SFT_UPDATE else stage
    changes = []
    for remedy in _REMEDIES[tenant]:
        name = remedy[1:].replace("rl.", f"{stage}.", 1)
        section, field = name.split(".")
        if field not in config[section]:
            continue
        value = config[section][field]
        if value is True:
            continue
        if section == "mesh":
            value = experiment.mesh.shape[field]
        verb = "set" if not value else "raise" if remedy[0] == "+" else "lower"
        changes.append(f"{verb} {name} (now {value})")
    return (
        f"{moment.name} needs {moment.total / GIB:.1f} GiB of the {limit / GIB:.1f} GiB "
        f"of a device; the biggest tenant is its {tenant} "
        f"({moment.parts[tenant] / GIB:.1f} GiB): {', or '.join(changes)}"
    )


# --- By arithmetic, where there is no compiler --------------------------------------

_LIVE_SCORES = 3  # scores, probabilities and their gradient
_LIVE_LOGITS = 2  # of a draw: also by groups


def estimated_update(experiment: Experiment) -> Program:
    """Memory of the update's program from sizes alone; a guess within about a third.

    Counted are the state, the batch, gradients twice (summed, and of a micro-batch),
    the layers' inputs or all that they keep, one layer's work, and logits. With adapters
    this work has a layer's merged weights, and their gradient.
    """
    c, policy = experiment.model, experiment.policy(sampling=True)
    batch = abstract_batch(experiment)
    rows = batch.tokens.sharding.shard_shape(batch.tokens.shape)[1]
    T, tensor = batch.tokens.shape[2], experiment.mesh.shape["tensor"]
    itemsize = jnp.dtype(c.dtype).itemsize
    parts = resident(experiment)

    kept = _layer_numbers(c, tensor) * itemsize
    layers = remat_numbers(c, tensor) * itemsize if c.remat else kept
    chunk = min(c.query_chunk, T)
    scores = _LIVE_SCORES * 4 * rows * _heads(c, tensor) * chunk * T
    predicted = rows * min(T, policy.max_trained or T)
    if policy.logits_chunk:  # of all shards, and one token a row at least
        held = max(policy.logits_chunk // batch_shards(experiment.mesh), rows)
        predicted = min(predicted, held)
    logits = (4 + itemsize) * predicted * c.vocab_size  # and their gradient
    one_layer = rows * T * 2 * kept + scores
    if FROZEN in parts:
        one_layer += (
            2 * (itemsize + 4) * costs.layer_weights(c) // c.num_layers // tensor
        )
        total = parts[FROZEN]
    else:
        total = 0
    total += parts[PARAMETERS] * 3 + parts[OPTIMIZER] + device_bytes(batch)
    total += rows * T * c.num_layers * layers + max(one_layer, logits // tensor)
    return Program(int(total))


def estimated_sampling(experiment: Experiment) -> tuple[Program, Program]:
    """What `sampling_moments` is given, likewise."""
    c, shape = experiment.model, sampling_shape(experiment)
    tensor = experiment.mesh.shape["tensor"]
    W, T = shape.prompts_per_prefill, shape.prompt_tokens
    work = W * T * _layer_numbers(c, tensor) * jnp.dtype(c.dtype).itemsize
    work += 2 * 4 * W * _heads(c, tensor) * min(512, T) * T

    total = sum(sampling_parts(experiment).values())
    total += _LIVE_LOGITS * 4 * shape.lanes * c.vocab_size // tensor
    seen = shape.slots + shape.prompt_tokens
    total += 2 * 4 * shape.lanes * _heads(c, tensor) * seen
    return Program(int(work)), Program(int(total))


def _heads(config: ModelConfig, tensor: int) -> int:
    return config.num_heads // (tensor if config.num_heads % tensor == 0 else 1)


def remat_numbers(config: ModelConfig, tensor: int) -> int:
    """Numbers a token that a layer with `remat` keeps: its input, and by its policy."""
    c = config
    width = c.width // (tensor if c.num_kv_heads % tensor == 0 else 1)
    attention = c.num_heads * c.head_dim // tensor
    if c.remat_policy == "nothing":
        return width
    if c.remat_policy == "attention":
        return 2 * width + attention
    heads = 2 * c.num_kv_heads * c.head_dim // tensor  # k and v
    return 3 * width + 2 * attention + heads + 2 * c.mlp_width // tensor


def _layer_numbers(config: ModelConfig, tensor: int) -> int:
    """Numbers a token that a layer makes on its way: what it would keep."""
    c = config
    heads = 2 * c.num_heads + 2 * c.num_kv_heads  # q and what is attended to, k, v
    return 4 * c.width + (heads * c.head_dim + 3 * c.mlp_width) // tensor
