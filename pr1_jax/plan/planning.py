"""A plan: memory at every moment, what fits, the largest batches, and a step's cost."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections

from pr1_jax.model.params import param_count
from pr1_jax.plan import costs, largest, memory
from pr1_jax.plan.hardware import Topology
from pr1_jax.plan.programs import (
    build,
    lower_sampling,
    lower_update,
    mini_batch,
    sampling_shape,
    training_stage,
)
from pr1_jax.stages.experiment import Experiment
from pr1_jax.system import mesh

_ESTIMATED = (
    "memory is arithmetic, without a compiler: temporaries are a guess within about a "
    "third"
)
_UNTRIED = (
    "kernels are compiled but not tried: on a GPU XLA picks the fastest, which may "
    "take other temporaries"
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that a plan says.

    Attributes:
      moments: at which memory can run out, of one device.
      largest: field -> its greatest value that fits (None: none was found); empty where
        it was not asked for.
      compile_sec: by program; empty where memory is arithmetic.
    """

    experiment: Experiment
    topology: Topology
    moments: Sequence[memory.Moment]
    largest: dict[str, int | None]
    lengths: costs.Lengths
    works: Sequence[costs.Work]
    traffic: Sequence[costs.Traffic]
    compile_sec: dict[str, float]

    @property
    def limit(self) -> int:
        """Bytes that a device has."""
        return self.topology.hardware.hbm_bytes

    @property
    def peak(self) -> memory.Moment:
        """The moment that needs most."""
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def fits(self) -> bool:
        """Whether all moments fit."""
        return all(moment.fits(self.limit) for moment in self.moments)

    @property
    def advice(self) -> list[str]:
        """What to change, for each moment that does not fit."""
        return [
            memory.advice(self.experiment, moment, self.limit)
            for moment in self.moments
            if not moment.fits(self.limit)
        ]

    @property
    def assumptions(self) -> list[str]:
        """What the figures take for granted."""
        n, c = self.lengths, self.experiment.config
        lengths = (
            f"costs are of {n.prompt_tokens:,} prompt and {n.response_tokens:,} "
            f"response tokens on average; the update pads to {n.update_tokens:,}"
        )
        if n.packed_tokens:
            lengths += f", {n.per_row} in a row of {n.packed_tokens:,}"
        lines = [
            lengths,
            "memory is of the longest prompts and responses",
            "seconds are at the peaks of the data sheet, so at the least",
        ]
        if c.rl.dynamic_sampling and "rl" in c.stages:
            lines.append("groups that dynamic sampling draws again are not counted")
        if self.topology.is_gpu:
            lines.append(_UNTRIED if self.compile_sec else _ESTIMATED)
        return lines

    def data(self) -> dict[str, Any]:
        """All of it for JSON. Sizes are bytes of one device, FLOPs are of all."""
        e, hardware = self.experiment, self.topology.hardware
        shape = sampling_shape(e)
        return {
            "config": e.config.name,
            "topology": self.topology.text,
            "devices": self.topology.num_devices,
            "mesh": dict(e.mesh.shape),
            "parameters": param_count(e.abstract_params()),
            "trained_parameters": param_count(e.abstract_trained()),
            "hardware": dataclasses.asdict(hardware),
            "compiled": bool(self.compile_sec),
            "compile_sec": self.compile_sec,
            "fits": self.fits,
            "limit_bytes": self.limit,
            "peak_bytes": self.peak.total,
            "headroom_bytes": self.limit - self.peak.total,
            "memory": {
                moment.name: {
                    "parts": dict(moment.parts),
                    "total": moment.total,
                    "fits": moment.fits(self.limit),
                }
                for moment in self.moments
            },
            "advice": self.advice,
            "largest": self.largest,
            "sampling_shape": dataclasses.asdict(shape),
            "lengths": dataclasses.asdict(self.lengths),
            "step": {
                "phases": {
                    work.name: dataclasses.asdict(work) | {"seconds": work.seconds}
                    for work in self.works
                },
                "flops": sum(work.flops for work in self.works),
                "seconds": costs.total_seconds(self.works),
                "traffic": {
                    x.name: {"bytes": x.bytes, "seconds": x.seconds}
                    for x in self.traffic
                },
            },
            "assumptions": self.assumptions,
        }


class _Trials:
    """Programs of a config on some devices, each compiled (or estimated) once."""

    def __init__(self, devices: Sequence[jax.Device], estimate: bool, say: Callable):
        self._devices, self._estimate, self._say = devices, estimate, say
        self._prefill: memory.Program | None = None
        self.compile_sec: dict[str, float] = {}

    def _compile(
        self, name: str, lowered: jax.stages.Lowered, arguments: int
    ) -> memory.Program:
        self._say(f"compiling {name}")
        program = memory.compile_program(lowered, arguments)
        self.compile_sec[name] = program.compile_sec
        return program

    def build(self, config: ml_collections.ConfigDict, **fields: int) -> Experiment:
        """The experiment with some fields changed, `section__field=value`."""
        if fields:
            config = config.copy_and_resolve_references()
            for name, value in fields.items():
                section, field = name.split("__")
                config[section][field] = value
        return build(config, self._devices)

    def update(self, experiment: Experiment) -> memory.Moment:
        """The moment of the update."""
        config = experiment.config
        size = config[training_stage(config)].micro_batch_size
        if self._estimate:
            program = memory.estimated_update(experiment)
        else:
            lowered = lower_update(experiment)
            known = memory.update_arguments(experiment)
            program = self._compile(f"update, micro-batch {size}", lowered, known)
        return memory.update_moment(experiment, program)

    def sampling(self, experiment: Experiment) -> list[memory.Moment]:
        """The moments of sampling; a prefill needs the same for any number of rows."""
        if self._estimate:
            programs = memory.estimated_sampling(experiment)
            return memory.sampling_moments(experiment, *programs)
        lowered, kept = lower_sampling(experiment), memory.sampling_parts(experiment)
        if self._prefill is None:
            known = kept[memory.WEIGHTS] + kept[memory.PROMPTS]
            program = self._compile("prefill", lowered["prefill"], known)
            rest = program.total - program.arguments
            self._prefill = dataclasses.replace(program, total=rest, arguments=0)
        rows = experiment.config.rollout.rows
        decode = self._compile(
            f"decode, {rows} rows", lowered["decode"], sum(kept.values())
        )
        return memory.sampling_moments(experiment, self._prefill, decode)


def make(
    config: ml_collections.ConfigDict,
    topology: Topology,
    devices: Sequence[jax.Device],
    *,
    prompt_tokens: int | None = None,
    response_tokens: int | None = None,
    find_largest: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> Plan:
    """Plans a config for devices, which only have to be known to a compiler.

    Args:
      prompt_tokens, response_tokens: means that costs are of; default half the longest.
      find_largest: whether to look for the largest batches, which compiles more.
      say: is called with a line of text whenever a program is compiled.

    Raises:
      ValueError: names the field or flag and its value.
    """
    estimate = topology.is_gpu and devices[0].platform == "cpu"
    trials = _Trials(devices, estimate, say)
    experiment = trials.build(config)
    lengths = costs.mean_lengths(experiment, prompt_tokens, response_tokens)
    update = trials.update(experiment)
    updates = [update, *_sft_update(trials, config)]
    sampling = trials.sampling(experiment)
    limit, largest = topology.hardware.hbm_bytes, {}
    if find_largest:
        stage = training_stage(config)
        largest[f"{stage}.micro_batch_size"] = _largest_micro_batch(
            trials, experiment, update, limit
        )
        largest["rollout.rows"] = _largest_rows(trials, experiment, sampling, limit)
    hardware = topology.hardware
    return Plan(
        experiment=experiment,
        topology=topology,
        moments=[*updates, *sampling],
        largest=largest,
        lengths=lengths,
        works=costs.step_work(experiment, hardware, lengths),
        traffic=costs.step_traffic(experiment, hardware, lengths),
        compile_sec=trials.compile_sec,
    )


def _sft_update(
    trials: _Trials, config: ml_collections.ConfigDict
) -> list[memory.Moment]:
    """That of SFT before RL, if it has larger micro-batches and so may need more."""
    larger = config.sft.micro_batch_size > config.rl.micro_batch_size
    if not (larger and {"sft", "rl"} <= {*config.stages}):
        return []
    config = config.copy_and_resolve_references()
    config.stages = ("sft",)
    moment = trials.update(trials.build(config))
    return [dataclasses.replace(moment, name=memory.SFT_UPDATE)]


def _peak(moments: Sequence[memory.Moment], limit: int) -> int:
    """The greatest total; above the limit in any case if a compiler gave up."""
    total = max(moment.total for moment in moments)
    return total if all(m.compiled for m in moments) else max(total, limit + 1)


def _largest_micro_batch(
    trials: _Trials, experiment: Experiment, update: memory.Moment, limit: int
) -> int | None:
    """The largest that divides the mini-batch, can be split over the devices and fits."""
    config = experiment.config
    stage = training_stage(config)
    whole, shards = mini_batch(config), mesh.batch_shards(experiment.mesh)
    sizes = [n for n in range(shards, whole + 1, shards) if whole % n == 0]
    name = f"{stage}__micro_batch_size"
    total = lambda n: _peak([trials.update(trials.build(config, **{name: n}))], limit)
    known = {config[stage].micro_batch_size: _peak([update], limit)}
    return largest.largest(sizes, total, limit, known)


def _largest_rows(
    trials: _Trials,
    experiment: Experiment,
    sampling: Sequence[memory.Moment],
    limit: int,
) -> int | None:
    """The most rows that fit: whole groups on every shard, at most a step's responses."""
    config = experiment.config
    shards, group = mesh.batch_shards(experiment.mesh), config.rl.group_size
    most = config.rl.prompts_per_step * group
    sizes = [*range(shards * group, most + 1, shards * group)]
    sizes = sizes or [*range(shards, most + 1, shards)]
    total = lambda n: _peak(
        trials.sampling(trials.build(config, rollout__rows=n)), limit
    )
    known = {config.rollout.rows: _peak(sampling, limit)}
    return largest.largest(sizes, total, limit, known)
