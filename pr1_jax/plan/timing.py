"""What the compiler says of the time of a config's programs: `--schedule`.

An update, by micro-batch; a prefill, by call; a decode step in main streams, and one with
all rows in a block. Each is compiled as it is run, in its largest shapes, and its text is
read (`schedule`). Beside its seconds stand what the model needs: FLOPs of its products,
and bytes of weights and of keys and values in use, at the plan's mean lengths.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from pr1_jax.model import costs as model_costs
from pr1_jax.plan import costs, hlo, kernels, memory, schedule
from pr1_jax.plan.hardware import Topology, has_gpu_compiler
from pr1_jax.plan.kernels import Body
from pr1_jax.plan.programs import (
    lower_sampling,
    lower_update,
    mini_batch,
    sampling_shape,
    training_stage,
)
from pr1_jax.plan.schedule import Schedule
from pr1_jax.stages import checks
from pr1_jax.stages.experiment import Experiment
from pr1_jax.system.accelerators import TPUS, Hardware

_GPU_LIMITS = (
    "times are what XLA's GPU compiler expects of a kernel: ratios count, not milliseconds",
    "matrix products are taken to be cuBLAS's at the peak, so at the least; launches of "
    + "kernels are not counted",
    "a loop counts with its most trips, a conditional with its longest branch",
)
_TPU_LIMITS = (
    "times are the compiler's estimates of cycles: ratios count, not milliseconds",
    "large products come out slightly too fast, memory-bound work up to 4 times too slow",
    "what has no estimate costs its bytes at the data sheet's bandwidth, a collective its "
    + "own at the links' rate, one after the other",
    "a Pallas kernel costs its declared FLOPs in the bundles that the compiler makes of "
    + "them, or its declared bytes at the bandwidth, if that is longer",
    "a loop counts with its most trips, a conditional with its longest branch",
)


def limits(topology: Topology) -> Sequence[str]:
    """What the times of a device's compiler cannot know."""
    return _GPU_LIMITS if topology.is_gpu else _TPU_LIMITS


@dataclasses.dataclass(frozen=True)
class Timing:
    """A program, of one device.

    Attributes:
      runs: of what is named in one call of it: micro-batches, or steps.
      flops: of a run, on one device. needed_bytes: of a run, of main memory; 0 = not
        counted.
      memory_bytes: of a call, arguments included.
      bodies: of its Pallas kernels, by instruction.
    """

    name: str
    schedule: Schedule
    runs: int
    flops: float
    needed_bytes: float
    memory_bytes: int
    compile_sec: float
    bodies: Mapping[str, Body] = dataclasses.field(default_factory=dict)

    def seconds(self, group: str = "") -> float:
        """Of a run; of a group of `schedule.GROUPS`, or of all."""
        return self.schedule.seconds(group) / self.runs

    @property
    def without_overlap(self) -> float:
        """Seconds of a run, if no collective overlaps with anything."""
        waited = self.schedule.seconds(schedule.COLLECTIVES)
        hidden = self.schedule.collective_seconds - waited
        return self.seconds() + hidden / self.runs

    @property
    def unestimated(self) -> float:
        """Seconds of a run that are priced by bytes, for want of an estimate."""
        return self.schedule.unestimated_seconds / self.runs

    @property
    def before_collectives(self) -> float:
        """Seconds of a run without any collective."""
        return self.seconds() - self.seconds(schedule.COLLECTIVES)

    def mfu(self, hardware: Hardware) -> float:
        """FLOPs by those that the device could do meanwhile, 0 to 1."""
        return self.flops / (hardware.flops_per_sec * self.seconds())

    def bandwidth_share(self, hardware: Hardware) -> float:
        """Needed bytes by those that the device could read meanwhile, 0 to 1."""
        return self.needed_bytes / (hardware.hbm_per_sec * self.seconds())

    @property
    def kernels(self) -> list[schedule.Cost]:
        """The costs of its Pallas kernels."""
        return [x for x in self.schedule.costs if x.name in self.bodies]

    def _cost(self, x: schedule.Cost) -> dict[str, Any]:
        return dataclasses.asdict(x) | {"times": x.times / self.runs}

    def data(self, hardware: Hardware) -> dict[str, Any]:
        """For JSON; times in seconds of a run."""
        return {
            "seconds": self.seconds(),
            "seconds_by_group": {
                group: self.seconds(group)
                for group in schedule.GROUPS
                if self.schedule.bytes(group) or self.seconds(group)
            },
            "seconds_before_collectives": self.before_collectives,
            "seconds_without_overlap": self.without_overlap,
            "seconds_at_bandwidth": self.unestimated,
            "flops": self.flops,
            "mfu": self.mfu(hardware),
            "needed_bytes": self.needed_bytes,
            "moved_bytes": self.schedule.bytes() / self.runs,
            "bandwidth_share": self.bandwidth_share(hardware),
            "memory_bytes": self.memory_bytes,
            "compile_sec": self.compile_sec,
            "loops_of_unknown_length": [*self.schedule.endless],
            "kernels": [
                self._cost(x) | dataclasses.asdict(self.bodies[x.name])
                for x in self.kernels
            ],
            "largest": [*map(self._cost, self.schedule.largest())],
        }


@dataclasses.dataclass(frozen=True)
class Timings:
    """All programs of a config."""

    experiment: Experiment
    topology: Topology
    lengths: costs.Lengths
    programs: Sequence[Timing]

    @property
    def assumptions(self) -> list[str]:
        """What the figures take for granted."""
        n = self.lengths
        unknown = {name for x in self.programs for name in x.schedule.endless}
        names = ", ".join(sorted(unknown))
        bodies = {k: v for x in self.programs for k, v in x.bodies.items()}
        errors = [f"{name}: {x.error}" for name, x in bodies.items() if x.error]
        return [
            *limits(self.topology),
            (
                f"needed bytes of a decode step are of {n.prompt_tokens:,} prompt tokens, "
                f"and half of {n.response_tokens:,} response tokens written"
            ),
            *[f"loops whose length is not known count once: {names}"] * bool(unknown),
            *[f"a kernel whose bundles are not counted, {x}" for x in errors],
        ]

    def data(self) -> dict[str, Any]:
        """All of it for JSON; of one device."""
        hardware = self.topology.hardware
        return {
            "config": self.experiment.config.name,
            "topology": self.topology.text,
            "mesh": dict(self.experiment.mesh.shape),
            "hardware": dataclasses.asdict(hardware),
            "lengths": dataclasses.asdict(self.lengths),
            "programs": {x.name: x.data(hardware) for x in self.programs},
            "assumptions": self.assumptions,
        }


def measure(
    made: Experiment,
    topology: Topology,
    *,
    prompt_tokens: int | None = None,
    response_tokens: int | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Timings:
    """Compiles a config's programs and reads their times.

    Args:
      prompt_tokens, response_tokens: as of `planning.make`.

    Raises:
      ValueError: the devices' compiler says nothing of time.
    """
    lengths = costs.mean_lengths(made, prompt_tokens, response_tokens)
    check_tells_times(topology, "--schedule")
    programs = []
    for work in works(made, lengths):
        say(f"compiling {work.name}")
        programs.append(read(work, topology.hardware))
    return Timings(made, topology, lengths, programs)


def check_tells_times(topology: Topology, flag: str) -> None:
    """Raises ValueError, with the flag, where the compiler says nothing of time."""
    if topology.is_gpu and not has_gpu_compiler():
        raise ValueError(
            f"{flag}: {topology.text} needs XLA's compiler for GPUs: "
            'pip install "jax[cuda12]" (no GPU is needed)'
        )
    if not schedule.tells_times(topology.hardware):
        known = ", ".join(x.name for x in TPUS.values() if schedule.tells_times(x))
        raise ValueError(
            f"{flag}: the compiler for {topology.text} tells cycles of an unknown clock; "
            f"leave the flag away, or take one of {known}"
        )


@dataclasses.dataclass(frozen=True)
class Work:
    """A program to be compiled; its figures are as of `Timing`."""

    name: str
    lower: Callable[[], jax.stages.Lowered]
    runs: int
    flops: float
    needed_bytes: float = 0.0


def read(
    work: Work,
    hardware: Hardware,
    *,
    count: Callable[[hlo.Program, Hardware], Mapping[str, Body]] = kernels.measure,
    keep: Callable[[str], None] = lambda text: None,
) -> Timing:
    """Compiles a program and reads its times.

    Args:
      count: bundles of its kernels. keep: is given the text of the compiled program.
    """
    lowered = work.lower()
    began = time.perf_counter()
    compiled = lowered.compile()
    took = time.perf_counter() - began
    text = compiled.as_text()
    keep(text)
    program = hlo.parse(text)
    bodies = count(program, hardware)
    return Timing(
        name=work.name,
        schedule=schedule.of_program(program, hardware, bodies),
        runs=work.runs,
        flops=work.flops,
        needed_bytes=work.needed_bytes,
        memory_bytes=memory.program_bytes(compiled.memory_analysis()),
        compile_sec=took,
        bodies=bodies,
    )


def works(made: Experiment, lengths: costs.Lengths) -> list[Work]:
    """A config's update, prefill, and decode steps."""
    return [_update(made, lengths), *_sampling(made, lengths)]


def _update(made: Experiment, lengths: costs.Lengths) -> Work:
    """An update, by micro-batch; its bytes are not counted, as products rule it."""
    made = of_lengths(made, lengths)
    config = made.config
    size = config[training_stage(config)].micro_batch_size
    flops = model_costs.update_flops(
        made.model,
        rows=size * lengths.per_row,
        tokens=lengths.update_tokens,
        trained=config.rollout.max_response_tokens,
    )
    return Work(
        f"update, micro-batch of {size} × {made.row_tokens:,}",
        lambda: lower_update(made),
        runs=mini_batch(config) // size,
        flops=flops / made.mesh.size,
    )


def of_lengths(made: Experiment, lengths: costs.Lengths) -> Experiment:
    """The experiment whose longest prompts and responses fill the mean length bucket.

    Or, where rows hold several responses, an equal part of a row; then its mini-batches
    have as many rows as would be filled.
    """
    config = made.config.copy_and_resolve_references()
    total = lengths.prompt_tokens + lengths.response_tokens
    response = lengths.update_tokens * lengths.response_tokens // total
    config.rollout.max_response_tokens = response
    config.rollout.max_prompt_tokens = lengths.update_tokens - response
    config.model.length_buckets = (lengths.update_tokens,)
    if lengths.packed_tokens:
        config.model.length_buckets = ()
        config.model.packed_tokens = lengths.packed_tokens
        section = config[training_stage(config)]
        size = section.micro_batch_size
        rows = -(-mini_batch(config) // (lengths.per_row * size)) * size
        if "group_size" in section:
            prompts = rows * section.mini_batches / section.group_size
            section.prompts_per_step = math.ceil(prompts)
        else:
            section.batch_size = rows
    settings = checks.decode_settings(config)
    return dataclasses.replace(made, config=config, settings=settings)


def _sampling(made: Experiment, lengths: costs.Lengths) -> Iterator[Work]:
    """A prefill, a step in main streams, and one with all rows in a block.

    Where blocks are planned, a step with all rows in a block of each number of paths.
    """
    shape, model = sampling_shape(made), made.model
    tensor, group = made.mesh.shape["tensor"], made.config.rl.group_size
    wide, prompt = shape.prompts_per_prefill, shape.prompt_tokens
    weights = costs.weight_bytes(made, logits=False)
    yield Work(
        f"prefill of {wide} × {prompt:,}",
        lambda: lower_sampling(made)["prefill"],
        runs=1,
        flops=model_costs.prefill(model, rows=wide, tokens=prompt).flops / tensor,
        needed_bytes=weights + memory.cache_bytes(made, wide, prompt),
    )
    half, mean = lengths.response_tokens // 2, lengths.prompt_tokens
    needed = costs.weight_bytes(made) + memory.cache_bytes(made, shape.rows, half)
    needed += memory.cache_bytes(made, -(-shape.rows // group), mean)
    paths = shape.lanes // shape.rows
    numbers = range(1, paths + 1) if made.settings.planned else sorted({1, paths})
    for lanes in numbers:
        name = f"blocks of {lanes}" if lanes > 1 else "main streams"
        cost = model_costs.decode_step(
            model, rows=shape.rows, prompt=mean, response=half, lanes=lanes
        )
        yield Work(
            f"decode step, {shape.rows} rows in {name}",
            lambda lanes=lanes: lower_sampling(made, lanes=lanes)["decode"],
            runs=made.config.rollout.steps_per_chunk,
            flops=cost.flops / tensor,
            needed_bytes=needed,
        )
