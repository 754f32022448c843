"""What an RL step costs at the least: FLOPs, bytes and seconds at a device's peaks.

FLOPs are counted by `model.costs`. Seconds are of whichever takes longer, computing or
reading memory, with all devices busy; what goes over the links between devices stands
apart, since it may or may not overlap. Blocks are taken to cost what plain text of the
same length does.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp

from pr1_jax.model import costs as model_costs
from pr1_jax.model.config import ModelConfig
from pr1_jax.plan import memory
from pr1_jax.plan.programs import (
    decoding_params,
    device_bytes,
    mini_batch,
    sampling_shape,
    training_stage,
)
from pr1_jax.stages.experiment import Experiment
from pr1_jax.system.accelerators import Hardware


@dataclasses.dataclass(frozen=True)
class Work:
    """A phase of an RL step.

    Attributes:
      flops: of all devices. bytes: read and written, on one device.
      compute_sec, memory_sec: at the peaks; the phase takes the longer of the two.
    """

    name: str
    flops: float
    bytes: float
    compute_sec: float
    memory_sec: float

    @property
    def seconds(self) -> float:
        """The roofline."""
        return max(self.compute_sec, self.memory_sec)


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that a device takes in over its links in an RL step, and how long that is."""

    name: str
    bytes: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Mean tokens that costs are of.

    Attributes:
      update_tokens: that an update computes of a response, its prompt included.
      per_row: responses in a row of an update.
      packed_tokens: of a row, where it holds several; else 0.
    """

    prompt_tokens: int
    response_tokens: int
    update_tokens: int
    per_row: int = 1
    packed_tokens: int = 0


def mean_lengths(
    experiment: Experiment, prompt_tokens: int | None, response_tokens: int | None
) -> Lengths:
    """Given lengths, or half of the longest; an update pads to a length bucket.

    Or it fills rows, with as many as fit of responses that are all of this length.

    Raises:
      ValueError: names the flag that is out of range.
    """
    s = experiment.settings
    given = {
        "prompt_tokens": (prompt_tokens, s.max_prompt_tokens),
        "response_tokens": (response_tokens, s.max_response_tokens),
    }
    lengths = {}
    for name, (value, most) in given.items():
        lengths[name] = max(most // 2, 1) if value is None else value
        if not 1 <= lengths[name] <= most:
            raise ValueError(
                f"--{name}={value} must be from 1 to rollout.max_{name}={most}"
            )
    total = sum(lengths.values())
    sizes = experiment.policy(sampling=True).sizes(experiment.row_tokens)
    fitting = [n for n, _ in sizes if n >= total]
    if not experiment.packs:
        return Lengths(**lengths, update_tokens=fitting[0])
    row = min(fitting, key=lambda n: n // (n // total))
    count = row // total
    return Lengths(
        **lengths, update_tokens=row // count, per_row=count, packed_tokens=row
    )


def step_work(
    experiment: Experiment, hardware: Hardware, lengths: Lengths
) -> list[Work]:
    """Prefill, decode and update of one RL step, or the update of one SFT step."""
    sampled = "rl" in experiment.config.stages
    phases = [_prefill, _decode, _update] if sampled else [_update]
    return [phase(experiment, hardware, lengths) for phase in phases]


def _work(name, experiment, hardware: Hardware, flops: float, bytes_: float) -> Work:
    peak = hardware.flops_per_sec * experiment.mesh.size
    return Work(name, flops, bytes_, flops / peak, bytes_ / hardware.hbm_per_sec)


def responses(experiment: Experiment) -> int:
    """Sequences of a step."""
    config = experiment.config
    if training_stage(config) == "sft":
        return config.sft.batch_size
    return config.rl.prompts_per_step * config.rl.group_size


def weight_bytes(experiment: Experiment, *, logits: bool = True) -> float:
    """Bytes of the weights that one device reads for a forward pass."""
    whole = model_costs.weight_bytes(experiment.model, logits=logits)
    return whole / experiment.mesh.shape["tensor"]


def _prefill(experiment: Experiment, hardware: Hardware, lengths: Lengths) -> Work:
    config, shape = experiment.config, sampling_shape(experiment)
    prompts, T = config.rl.prompts_per_step, lengths.prompt_tokens
    cost = model_costs.prefill(experiment.model, rows=1, tokens=T)
    calls = math.ceil(prompts / (shape.shards * shape.prompts_per_prefill))
    written = memory.cache_bytes(experiment, math.ceil(prompts / shape.shards), T)
    bytes_ = calls * weight_bytes(experiment, logits=False) + written
    return _work("prefill", experiment, hardware, prompts * cost.flops, bytes_)


def _decode(experiment: Experiment, hardware: Hardware, lengths: Lengths) -> Work:
    """Steps of a full batch half way through their responses.

    A step reads the weights, each row's own keys and values, and each group's prompt.
    A response takes as many steps as it has tokens, or those that its deadline leaves:
    then the rest is written beside them.
    """
    config, shape = experiment.config, sampling_shape(experiment)
    all_rows, group = shape.rows * shape.shards, config.rl.group_size
    half, prompt = lengths.response_tokens // 2, lengths.prompt_tokens
    cost = model_costs.decode_step(
        experiment.model, rows=all_rows, prompt=prompt, response=half
    )
    tokens = lengths.response_tokens
    steps = min(tokens, experiment.settings.max_sequential_steps or tokens)
    batches = responses(experiment) / all_rows
    bytes_ = weight_bytes(experiment)
    bytes_ += memory.cache_bytes(experiment, shape.rows, half)
    bytes_ += memory.cache_bytes(experiment, math.ceil(shape.rows / group), prompt)
    flops, bytes_ = batches * tokens * cost.flops, batches * steps * bytes_
    return _work("decode", experiment, hardware, flops, bytes_)


def _update(experiment: Experiment, hardware: Hardware, lengths: Lengths) -> Work:
    """Three forward passes, and what is recomputed; the state moves once."""
    model, rows = experiment.model, responses(experiment)
    trained = min(experiment.settings.max_response_tokens, lengths.update_tokens)
    flops = model_costs.update_flops(
        model, rows=rows, tokens=lengths.update_tokens, trained=trained
    )
    passes = 3
    if _recomputes(model):
        passes += 1
        tokens = rows * lengths.update_tokens
        flops += flops / 3 - 2 * _kept_weights(model) * tokens
        if model.remat_policy == "attention":
            scores = model_costs.update_flops(
                model, rows=rows, tokens=lengths.update_tokens, trained=0
            )
            flops -= scores / 3 - 2 * model_costs.layer_weights(model) * tokens
    if experiment.adapter_settings:  # weights of layers have no gradients
        flops -= 2 * model_costs.layer_weights(model) * rows * lengths.update_tokens
    micro_batches, updates = _counts(experiment, lengths)
    state = memory.resident(experiment)
    grads = state[memory.PARAMETERS]
    bytes_ = micro_batches * (passes * weight_bytes(experiment) + 3 * grads)
    moved = 2 * (state[memory.PARAMETERS] + state[memory.OPTIMIZER]) + grads
    bytes_ += updates * moved
    return _work("update", experiment, hardware, flops, bytes_)


def _recomputes(model: ModelConfig) -> bool:
    """Whether the backward pass of a layer computes its products with weights again."""
    return model.remat and model.remat_policy != "dots"


def _kept_weights(model: ModelConfig) -> int:
    """Weights of layers whose products no backward pass asks for, or finds kept."""
    down = model.width * model.mlp_width
    o = model.width * model.num_heads * model.head_dim
    return model.num_layers * (down + (model.remat_policy == "attention") * o)


def _counts(experiment: Experiment, lengths: Lengths) -> tuple[int, int]:
    """Micro-batches and updates of a step."""
    config, rows = experiment.config, responses(experiment)
    stage = training_stage(config)
    size = config[stage].micro_batch_size * lengths.per_row
    return math.ceil(rows / size), rows // mini_batch(config)


def step_traffic(
    experiment: Experiment, hardware: Hardware, lengths: Lengths
) -> list[Traffic]:
    """What a device takes in over its links, by the mesh axis that asks for it.

    A micro-batch gathers every weight over `fsdp` for its forward pass and again for
    its backward pass (where `remat` computes forward again), in the dtype of
    activations, and scatters their gradients' sums; over `data` it adds those. Over
    `tensor`, each layer gathers activations twice and scatters sums of them twice, forward
    and backward. Where it recomputes, it gathers twice again, and scatters once more if it
    kept nothing. The sampler gathers all weights once a step. Gradients of adapters are
    too few to count.
    """
    c, mesh = experiment.model, experiment.mesh
    a = jnp.dtype(c.dtype).itemsize
    data, fsdp, tensor = (mesh.shape[name] for name in ("data", "fsdp", "tensor"))
    weights = device_bytes(decoding_params(experiment))
    micro_batches, _ = _counts(experiment, lengths)
    summed = 0 if experiment.adapter_settings else weights
    of_fsdp = micro_batches * (2 * weights + summed)
    traffic = {
        "fsdp: weights and gradients": of_fsdp * (fsdp - 1) / fsdp,
        "data: gradients": micro_batches * 2 * summed / fsdp * (data - 1) / data,
        "tensor: activations": 0.0,
        "sampler: weights": 0.0,
    }
    shards = data * fsdp
    tokens = responses(experiment) * lengths.update_tokens * 2  # forward, backward
    tokens += (
        c.remat * tokens // 4 + (c.remat and c.remat_policy == "nothing") * tokens // 8
    )
    if "rl" in experiment.config.stages:
        tokens += responses(experiment) * lengths.response_tokens
        tokens += experiment.config.rl.prompts_per_step * lengths.prompt_tokens
        traffic["sampler: weights"] = weights * (shards - 1) / shards
    sums = 2 * c.num_layers * c.width * a * tokens / shards
    traffic["tensor: activations"] = 2 * sums * (tensor - 1) / tensor
    rate = hardware.ici_per_sec
    return [Traffic(name, n, n / rate) for name, n in traffic.items() if n]


def total_seconds(works: Sequence[Work]) -> float:
    """Seconds of all phases, one after the other."""
    return sum(work.seconds for work in works)
