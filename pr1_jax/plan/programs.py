"""The real programs of a config, lowered for devices that need not be there.

An update as the trainer makes it; a prefill and a chunk of decode steps as the sampler
makes them, in the largest shapes that a run can come to. No array is ever made.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
from jax.sharding import Mesh

from pr1_jax import tags
from pr1_jax.model.config import ModelConfig
from pr1_jax.model.params import abstract_params, unbox
from pr1_jax.model.xla import Xla
from pr1_jax.plan import hardware, shapes
from pr1_jax.sampler.sampler import Sampler
from pr1_jax.sampler.settings import Vocab
from pr1_jax.stages import checks, experiment, sft, updater
from pr1_jax.stages.experiment import Experiment
from pr1_jax.system.mesh import batch_shards, local_mesh, make_mesh
from pr1_jax.training.state import TrainState
from pr1_jax.training.state import abstract_state as state_abstract_state


@dataclasses.dataclass(frozen=True)
class SamplingShape:
    """Largest sizes of the sampler's arrays, of one shard of the devices.

    Attributes:
      shards: over which rows are split; each has `mesh.tensor` devices.
      rows: responses decoded at the same time. lanes: tokens of a step, at most.
      entries: prompts kept. prompts_per_prefill: prompts of a prefill.
      slots: response tokens kept a row. slots_before: what they grow from, 0 = nothing.
      prompt_tokens: tokens of each that are kept.
    """

    shards: int
    rows: int
    lanes: int
    entries: int
    prompts_per_prefill: int
    slots: int
    slots_before: int
    prompt_tokens: int


def build(
    config: ml_collections.ConfigDict, devices: Sequence[jax.Device]
) -> Experiment:
    """The experiment on these devices; of a named model, without its tokenizer.

    Raises:
      ValueError, FileNotFoundError: names the field and its value.
    """
    config = config.copy_and_resolve_references()
    on_tpu = devices[0].platform == "tpu"
    if config.model.attention == "auto":  # would ask for the machine that plans
        config.model.attention = "pallas" if on_tpu else "xla"
    if config.kernels == "auto" and not on_tpu:  # they stand for accelerators
        config.kernels = "xla"
    path = config.model.path
    if not path or pathlib.Path(path).expanduser().is_dir():
        return experiment.build(config, devices=devices)
    checks.check(config, devices=devices)
    settings = checks.decode_settings(config)
    numerics = experiment.numerics(config.model)
    shape, num_tokens = shapes.published(path, settings.grammar, **numerics)
    tag_ids = tuple(range(num_tokens - len(settings.grammar.tags), num_tokens))
    six, plans = tag_ids[: len(tags.TAGS)], tag_ids[len(tags.TAGS) :]
    labels = tuple((0,) for _ in settings.path_labels)  # which ones makes no difference
    return Experiment(
        config=config,
        tokenizer=None,
        model=shape,
        vocab=Vocab((*six, six[0] - 1), 0, num_tokens, labels, plans),
        mesh=make_mesh(**config.mesh, devices=devices),
        settings=settings,
    )


def training_stage(config: ml_collections.ConfigDict) -> str:
    """The stage whose update is planned: `rl`, or `sft` of a config without it."""
    return "rl" if "rl" in config.stages else "sft"


def mini_batch(config: ml_collections.ConfigDict) -> int:
    """Sequences of one update."""
    if training_stage(config) == "sft":
        return config.sft.batch_size
    return config.rl.prompts_per_step * config.rl.group_size // config.rl.mini_batches


def abstract_state(made: Experiment) -> TrainState:
    """Shapes and shardings of the training state."""
    optimizer, _ = made.optimizer(training_stage(made.config))
    return state_abstract_state(made.abstract_trained(), optimizer, made.mesh)


def abstract_batch(made: Experiment) -> Any:
    """Shapes and shardings of a mini-batch, with leading axes [micro-batches, B]."""
    size = made.config[training_stage(made.config)].micro_batch_size
    return made.abstract_batch(mini_batch(made.config), size)


def lower_update(made: Experiment) -> jax.stages.Lowered:
    """One update: GRPO, or SFT where the config has no stage `rl`."""
    stage = updater if training_stage(made.config) == "rl" else sft
    return stage.lower_update(made)


def _of_one_process(made: Experiment) -> Experiment:
    """What one process of a run samples with: its devices, and its share of the rows.

    Raises:
      ValueError: `mesh.tensor` goes across processes.
    """
    local_mesh(made.mesh)  # which checks that
    every = made.mesh.devices.ravel()
    devices = hardware.devices_of_one_process(list(every))
    count = len(every) // len(devices)
    if count == 1:
        return made
    config = made.config.copy_and_resolve_references()
    for name in ("rows", "prompts_per_prefill"):
        config.rollout[name] = -(-config.rollout[name] // count)
    mesh = make_mesh(tensor=made.mesh.shape["tensor"], devices=devices)
    return dataclasses.replace(made, config=config, mesh=mesh)


def _sampler(made: Experiment) -> Sampler:
    return _of_one_process(made).sampler(made.config.rl.group_size)


def sampling_shape(made: Experiment) -> SamplingShape:
    """The largest shapes that the sampler comes to."""
    sampler = _sampler(made)
    schedule = sampler.schedule
    slots = [0, *schedule.slot_sizes]
    paths = made.settings.num_paths if made.settings.max_blocks else 1
    return SamplingShape(
        shards=batch_shards(made.mesh),
        rows=schedule.rows,
        lanes=schedule.rows * paths,
        entries=schedule.entries,
        prompts_per_prefill=schedule.prompts_per_prefill,
        slots=slots[-1],
        slots_before=slots[-2],
        prompt_tokens=schedule.prompt_sizes[-1],
    )


def evaluation_entries(made: Experiment) -> int:
    """Prompts kept by a shard while a stage evaluates; 0 where none does.

    They are more than in RL, where more rows share a prompt.
    """
    if not {"sft", "rl"} & {*made.config.stages}:
        return 0
    sampler = _of_one_process(made).sampler(made.config.eval.samples)
    return sampler.schedule.entries


def decoding_params(made: Experiment) -> Any:
    """Shapes and shardings of the weights that the sampler reads."""
    return _decoding_params(made.model, made.mesh)


@functools.lru_cache(maxsize=8)
def _decoding_params(config: ModelConfig, mesh: Mesh) -> Any:
    """They are asked for often, and tracing many layers that stand apart is slow."""
    boxed = abstract_params(config)
    backend = Xla(config)
    prepared = jax.eval_shape(backend.prepare, unbox(boxed))
    struct = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    return jax.tree.map(struct, prepared, backend.prepared_shardings(mesh))


def lower_sampling(
    made: Experiment, *, lanes: int = 0
) -> dict[str, jax.stages.Lowered]:
    """The sampler's `prefill` and `decode`, on the devices of one process.

    Args:
      lanes: of each row that a step can feed; 0: as many as a block has paths.
    """
    shape = sampling_shape(made)
    return _sampler(made).lower(
        _of_one_process(made).abstract_params(),
        slots=shape.slots,
        prompt_tokens=shape.prompt_tokens,
        num_lanes=lanes * shape.rows or shape.lanes,
    )


def device_bytes(tree: Any) -> int:
    """Bytes of a tree of shapes with shardings on one device."""
    size = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    return sum(size(x) for x in jax.tree.leaves(tree))
