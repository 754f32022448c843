"""What a setting of a config costs in an RL step, by the devices' compiler.

A step is its updates, its prefills and its decode steps, at the plan's mean lengths; their
times are those of `--schedule`, their memory is that of the plan. Where layers stand side
by side in a program (the sampler's, and an update without `model.scan_layers`), compiling
takes longer with each; they are alike, so that programs of eight and of twelve layers say
what all of them take, in a line. With fewer, weights are fetched while other things are
computed, and layers come out too fast. What sizes alone rule out is not compiled at all.

Programs once compiled are kept in a file, by their text before compilation, the devices,
and the versions of the compilers.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import inspect
import itertools
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import ml_collections

from pr1_jax.model.config import REMAT_POLICIES
from pr1_jax.plan import bundles, costs, hlo, kernels, memory, schedule, timing
from pr1_jax.plan.hardware import Topology
from pr1_jax.plan.programs import (
    build,
    lower_sampling,
    lower_update,
    mini_batch,
    sampling_shape,
)
from pr1_jax.plan.search import SAMPLING, UPDATE, Axis, Price, Setting
from pr1_jax.stages.experiment import TPU_OPTIONS, Experiment
from pr1_jax.system import files, mesh
from pr1_jax.system.accelerators import GIB

DEPTHS = (8, 12)  # layers of the models that are compiled
_MESH = tuple(f"mesh.{axis}" for axis in mesh.AXES)
_SFT_BATCH = "sft.micro_batch_size"  # which the mesh must be able to split, too
_MICRO_BATCH, _ROWS = "rl.micro_batch_size", "rollout.rows"
_REMAT, _POLICY = "model.remat", "model.remat_policy"
_CHUNK = "model.logits_chunk"
_CHUNKS = (2048, 8192)  # tokens of a micro-batch
_GUESS = 1.5  # arithmetic beyond so many times the memory is believed, uncompiled


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program, on one device.

    Attributes:
      seconds: of a call, by group of `schedule.GROUPS`; empty where it does not fit.
      rest: bytes that it takes besides its arguments. fits: as of `memory.Program`.
    """

    seconds: Mapping[str, float]
    rest: float
    fits: bool = True

    @property
    def total(self) -> float:
        """Seconds of all groups."""
        return sum(self.seconds.values())


def extrapolate(
    depths: Sequence[int], programs: Sequence[Compiled], layers: int
) -> Compiled:
    """The program of so many layers, on the line through those of two depths."""
    (a, b), (x, y) = depths, programs
    if not (x.fits and y.fits):
        return dataclasses.replace(y, fits=False)
    share = (layers - a) / (b - a)
    line = lambda first, second: max(first + share * (second - first), 0.0)
    seconds = {
        group: line(x.seconds.get(group, 0.0), y.seconds.get(group, 0.0))
        for group in dict.fromkeys([*x.seconds, *y.seconds])
    }
    return Compiled(seconds, line(x.rest, y.rest))


class Cache:
    """Compiled programs in a file of JSON lines, to which each is added at once.

    Args:
      path: of the file; it need not be there.

    Raises:
      ValueError: the file is damaged, or is a folder; names it.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = pathlib.Path(path).expanduser()
        if self.path.is_dir():
            raise ValueError(f"--search_cache={path} is a folder, not a file")
        self._known = {}
        for number, line in enumerate(files.read_json_lines(self.path), start=1):
            try:
                fields = {f.name: line[f.name] for f in dataclasses.fields(Compiled)}
                self._known[line["key"]] = Compiled(**fields)
            except KeyError as error:
                raise ValueError(
                    f"--search_cache={path}, line {number}: {error} is missing; it is "
                    "no file of this search"
                ) from error

    def get(self, key: str, make: Callable[[], Compiled], **about: str) -> Compiled:
        """The program of a key; made and kept, with what it is, if it is not there."""
        if key not in self._known:
            compiled = make()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            record = {"key": key, **about, **dataclasses.asdict(compiled)}
            with self.path.open("ab") as file:
                file.write(files.json_line(record))
            self._known[key] = compiled
        return self._known[key]


def default_cache() -> pathlib.Path:
    """The file in the user's cache folder."""
    return files.cache_folder() / "plan_programs.jsonl"


class Prices:
    """The `search.Space` of a config on devices that need not be there.

    Attributes:
      given: the config's fields as they are written, where a mesh may say -1.
      compiled: programs compiled so far.

    Args:
      prompt_tokens, response_tokens: as of `planning.make`.
      cache: of programs. say: is called with a line of text when one is compiled, and
        when a setting is priced.

    Raises:
      ValueError: names the field or flag and its value.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        topology: Topology,
        devices: Sequence[jax.Device],
        *,
        cache: Cache,
        prompt_tokens: int | None = None,
        response_tokens: int | None = None,
        say: Callable[[str], None] = lambda text: None,
    ):
        if "rl" not in config.stages:
            raise ValueError(
                f"stages={config.stages}: --search is of RL steps, so the stage rl must "
                "be there"
            )
        timing.check_tells_times(topology, "--search")
        self._config, self._devices = config, devices
        self.topology, self._cache, self._say = topology, cache, say
        self.experiment = build(config, devices)
        self.lengths = costs.mean_lengths(
            self.experiment, prompt_tokens, response_tokens
        )
        self.compiled = 0
        names = (*_MESH, _SFT_BATCH, _MICRO_BATCH, _REMAT, _POLICY, _CHUNK, _ROWS)
        self.given = {name: _field(config, name) for name in names}
        shape = {f"mesh.{axis}": n for axis, n in self.experiment.mesh.shape.items()}
        self.own = self.given | shape  # without a -1
        self.meshes = [*self._meshes()]

    # --- What can be set -------------------------------------------------------------

    def _meshes(self) -> Iterator[Setting]:
        """Meshes that the model's sizes, the batches and the processes allow."""
        model, count = self.experiment.model, self.experiment.mesh.size
        sizes = model.num_heads, model.num_kv_heads, model.mlp_width
        for tensor in _divisors(math.gcd(count, *sizes)):
            for fsdp in _divisors(math.gcd(count // tensor, model.width)):
                data = count // tensor // fsdp
                setting = dict(zip(_MESH, (data, fsdp, tensor), strict=True))
                setting[_SFT_BATCH] = math.lcm(self.own[_SFT_BATCH], data * fsdp)
                smallest = {_MICRO_BATCH: data * fsdp}
                with contextlib.suppress(ValueError):  # it cannot be
                    sampling_shape(self._build({**setting, **smallest}))
                    yield setting

    def axes(self, kind: str, mesh: Setting) -> Sequence[Axis]:
        """As of `search.Space`."""
        shards = mesh[_MESH[0]] * mesh[_MESH[1]]
        if kind == SAMPLING:
            rl = self.experiment.config.rl
            most = rl.prompts_per_step * rl.group_size
            groups = shards * rl.group_size  # a whole one on each
            rows = _ladder(groups if groups <= most else shards, most)
            return [_axis(_ROWS, sorted({*rows, self._own_rows(shards)}))]
        whole = mini_batch(self.experiment.config)
        sizes = [shards * n for n in _divisors(whole // shards)]
        chunks = sorted({*_CHUNKS, self.own[_CHUNK]} - {0})
        return [
            _axis(_MICRO_BATCH, sizes),
            Axis("remat", self._remat_choices),
            _axis(_CHUNK, [*chunks, 0]),
        ]

    def _own_rows(self, shards: int) -> int:
        """The config's rows, as many on each shard."""
        return -(-self.own[_ROWS] // shards) * shards

    @functools.cached_property
    def _remat_choices(self) -> Sequence[Setting]:
        """All policies by what they keep, and no remat at all."""
        model = self.experiment.model
        kept = lambda policy: memory.remat_numbers(
            dataclasses.replace(model, remat_policy=policy), 1
        )
        policies = sorted(REMAT_POLICIES, key=kept)
        choices = [{_REMAT: True, _POLICY: policy} for policy in policies]
        return [*choices, {_REMAT: False, _POLICY: self.own[_POLICY]}]

    def start(self, kind: str, mesh: Setting, like: Setting) -> Setting:
        """As of `search.Space`: as many responses a shard; of rows all that there are.

        Rows are walked down from there, and those that sizes rule out cost nothing.
        """
        axes = self.axes(kind, mesh)
        if kind == SAMPLING:
            return axes[0].choices[-1]
        shards = lambda x: x[_MESH[0]] * x[_MESH[1]]
        wanted = like[_MICRO_BATCH] * shards(mesh) / shards(like)
        near = lambda x: abs(math.log(x[_MICRO_BATCH] / wanted))
        start = {name: like[name] for name in (_REMAT, _POLICY, _CHUNK)}
        return start | min(axes[0].choices, key=near)

    def _build(self, setting: Setting) -> Experiment:
        config = self._config.copy_and_resolve_references()
        for name, value in setting.items():
            section, field = name.split(".")
            config[section][field] = value
        return build(config, self._devices)

    # --- What it costs ---------------------------------------------------------------

    def bound(self, kind: str, mesh: Setting) -> float:
        """As of `search.Space`: at the peaks, nothing computed again, with most rows."""
        shards = mesh[_MESH[0]] * mesh[_MESH[1]]
        rows = [x[_ROWS] for x in self.axes(SAMPLING, mesh)[0].choices]
        fields = {**mesh, _MICRO_BATCH: shards, _REMAT: False}
        fits = []
        for count in rows:
            made = self._build({**fields, _ROWS: count})
            limit = self.topology.hardware.hbm_bytes
            if fits and not all(x.fits(limit) for x in self._least(made)):
                break
            fits.append(made)
        works = costs.step_work(fits[-1], self.topology.hardware, self.lengths)
        chosen = [x for x in works if (x.name == UPDATE) == (kind == UPDATE)]
        # An update's weights are read once a micro-batch, of a size not known here.
        return sum(x.compute_sec if kind == UPDATE else x.seconds for x in chosen)

    @staticmethod
    def _least(made: Experiment) -> list[memory.Moment]:
        """Sampling, if its programs took nothing but their arguments."""
        kept = sum(memory.sampling_parts(made).values())
        return memory.sampling_moments(made, memory.Program(0), memory.Program(kept))

    def price(self, kind: str, setting: Setting, *, full: bool = False) -> Price:
        """As of `search.Space`. `full`: memory is that of the whole program, compiled."""
        if kind == SAMPLING:  # where any micro-batch will do that the mesh can split
            any_size = setting[_MESH[0]] * setting[_MESH[1]]
            setting = {**setting, _MICRO_BATCH: any_size}
        try:
            made = self._build(setting)
        except ValueError as error:
            return Price({}, {}, str(error))
        of_kind = self._update if kind == UPDATE else self._sampling
        price = of_kind(made, setting, full)
        seconds = f"{price.total:,.4g} s" if not price.why else price.why
        self._say(f"{describe(kind, setting)}: {seconds}")
        return price

    def _update(self, made: Experiment, setting: Setting, full: bool) -> Price:
        limit = self.topology.hardware.hbm_bytes
        guess = memory.update_moment(made, memory.estimated_update(made))
        sure = memory.resident(made)
        least = sum(sure.values()) + sure[memory.PARAMETERS]  # gradients
        if least > limit or guess.total > _GUESS * limit:
            return _too_large([guess], limit, "by arithmetic")
        mean = timing.of_lengths(made, self.lengths)
        name, scanned = describe(UPDATE, setting), made.model.scan_layers
        program = self._at_depth(name, mean, lower_update, scanned)
        given = memory.update_arguments(made)
        moment = memory.update_moment(made, memory.Program(int(given + program.rest)))
        # Of the longest batch, which takes more, what is neither state nor gradient.
        longer = made.row_tokens / mean.row_tokens
        parts = dict(moment.parts)
        parts[memory.TRAINING] = int(parts[memory.TRAINING] * longer)
        moment = dataclasses.replace(moment, parts=parts, compiled=program.fits)
        if full and program.fits:
            whole = self._compile(f"{name}, in full", lower_update(made))
            total = memory.Program(int(given + whole.rest), fits=whole.fits)
            moment = memory.update_moment(made, total)
        if not moment.fits(limit):
            return _too_large([moment], limit)
        updates = costs.responses(made) / mini_batch(made.config)
        return Price({"update": updates * program.total}, {"update": moment.total})

    def _sampling(self, made: Experiment, setting: Setting, full: bool) -> Price:
        limit, shape = self.topology.hardware.hbm_bytes, sampling_shape(made)
        kept = memory.sampling_parts(made)
        least = self._least(made)
        if not all(moment.fits(limit) for moment in least):
            return _too_large(least, limit, "by arithmetic")
        name = describe(SAMPLING, setting)
        lower = lambda of, piece: lower_sampling(of, lanes=1)[piece]
        # A prefill takes the same for any number of rows.
        alike = self._build({**setting, _ROWS: self._own_rows(shape.shards)})
        prefill, decode = (
            self._at_depth(
                f"{piece}, {name}", of, functools.partial(lower, piece=piece)
            )
            for piece, of in (("prefill", alike), ("decode", made))
        )
        widest = decode
        if full:  # with all rows in blocks, as the plan's own
            lowered = lower_sampling(made)["decode"]
            widest = self._compile(f"decode, {name}, in full", lowered)
        wanted = [
            memory.Program(int(x.rest + y), fits=x.fits)
            for x, y in zip((prefill, widest), (0, sum(kept.values())), strict=True)
        ]
        moments = memory.sampling_moments(made, *wanted)
        if not all(moment.fits(limit) for moment in moments):
            return _too_large(moments, limit)
        rl, n, s = made.config.rl, self.lengths, made.settings
        calls = math.ceil(
            rl.prompts_per_step / (shape.shards * shape.prompts_per_prefill)
        )
        longest = s.max_sequential_steps or s.max_response_tokens
        mean = min(n.response_tokens, longest)
        batches = max(costs.responses(made) / (shape.rows * shape.shards), 1.0)
        steps = mean * batches + longest - mean
        return Price(
            {
                "prefill": calls
                * prefill.total
                * n.prompt_tokens
                / shape.prompt_tokens,
                "decode": steps * decode.total / made.config.rollout.steps_per_chunk,
            },
            {moment.name: moment.total for moment in moments},
        )

    def _at_depth(
        self,
        name: str,
        made: Experiment,
        lower: Callable[[Experiment], jax.stages.Lowered],
        scanned: bool = False,
    ) -> Compiled:
        """A program of all layers, by models of a few where they stand side by side."""
        layers = made.model.num_layers
        if scanned or layers <= DEPTHS[-1]:
            return self._compile(name, lower(made))
        programs = []
        for depth in DEPTHS:
            model = dataclasses.replace(made.model, num_layers=depth)
            less = dataclasses.replace(made, model=model)
            programs.append(self._compile(f"{name}, {depth} layers", lower(less)))
            if not programs[-1].fits:
                return programs[-1]
        return extrapolate(DEPTHS, programs, layers)

    def _compile(self, name: str, lowered: jax.stages.Lowered) -> Compiled:
        key = _key(lowered, self.topology)
        make = functools.partial(self._really_compile, name, lowered)
        return self._cache.get(key, make, name=name, topology=self.topology.text)

    def _really_compile(self, name: str, lowered: jax.stages.Lowered) -> Compiled:
        self._say(f"compiling {name}")
        self.compiled += 1
        sizes, text = memory.compile_with_text(lowered, 0)
        rest = sizes.total - sizes.arguments
        if not sizes.fits:
            return Compiled({}, rest, fits=False)
        program = hlo.parse(text)
        bodies = kernels.measure(program, self.topology.hardware)
        found = schedule.of_program(program, self.topology.hardware, bodies)
        seconds = {group: found.seconds(group) for group in schedule.GROUPS}
        return Compiled({g: x for g, x in seconds.items() if x}, rest)

    @property
    def assumptions(self) -> list[str]:
        """What the figures take for granted."""
        n, s = self.lengths, self.experiment.settings
        longest = s.max_sequential_steps or s.max_response_tokens
        return [
            *timing.limits(self.topology),
            (
                f"the sampler's programs (and an update's, without model.scan_layers) were "
                f"compiled with {DEPTHS[0]} and {DEPTHS[1]} layers; time and memory of "
                f"{self.experiment.model.num_layers} are on the line through them"
            ),
            (
                f"a step samples and trains {costs.responses(self.experiment):,} responses of "
                f"{n.response_tokens:,} tokens to prompts of {n.prompt_tokens:,}; all rows are "
                f"in main streams, and at a step's end the last go on to {longest:,} tokens"
            ),
            (
                f"updates are timed at {n.update_tokens:,} tokens a response; their memory is "
                f"that of rows of {self.experiment.row_tokens:,}, in proportion"
            ),
            (
                "old log-probs that the trainer computes again, rewards and evaluations are "
                "not counted"
            ),
        ]


def describe(kind: str, setting: Setting) -> str:
    """A setting in a few words."""
    shape = " × ".join(str(setting[name]) for name in _MESH)
    if kind == SAMPLING:
        return f"mesh {shape}, {setting[_ROWS]} rows"
    remat = setting[_POLICY] if setting[_REMAT] else "none"
    chunk = setting[_CHUNK] or "none"
    return f"mesh {shape}, micro-batch {setting[_MICRO_BATCH]}, remat {remat}, chunk {chunk}"


def _too_large(
    moments: Sequence[memory.Moment], limit: int, how: str = "compiled"
) -> Price:
    """The price of what does not fit: which moment needs how much, and what of it most."""
    worst = max(moments, key=lambda moment: (not moment.fits(limit), moment.total))
    size, most = worst.total / GIB, worst.parts[worst.biggest] / GIB
    why = (
        f"{worst.name} needs {size:.1f} of {limit / GIB:.2f} GiB ({how}), {most:.1f} of "
        f"them for {worst.biggest}"
    )
    if not worst.compiled:
        why = f"{worst.name}: the compiler finds no way within {limit / GIB:.2f} GiB"
    return Price({}, {moment.name: moment.total for moment in moments}, why)


def _key(lowered: jax.stages.Lowered, topology: Topology) -> str:
    """What a compiled program follows from, and how it is read, as a digest."""
    names = "XLA_FLAGS", "LIBTPU_INIT_ARGS"
    flags = [*(os.environ.get(name, "") for name in names), TPU_OPTIONS]
    reading = [
        inspect.getsource(module) for module in (bundles, hlo, kernels, schedule)
    ]
    hardware = dataclasses.astuple(topology.hardware)
    depends = (topology.text, hardware, _versions(), flags, reading)
    text = "\0".join([*map(str, depends), lowered.as_text()])
    return hashlib.sha256(text.encode()).hexdigest()[:24]


@functools.cache
def _versions() -> list[str]:
    found = (
        (x.metadata["Name"], x.version) for x in importlib.metadata.distributions()
    )
    return sorted(f"{n} {x}" for n, x in found if n and n.startswith(("jax", "libtpu")))


def _field(config: ml_collections.ConfigDict, name: str) -> Any:
    section, field = name.split(".")
    return config[section][field]


def _axis(field: str, values: Sequence[Any]) -> Axis:
    return Axis(field, [{field: value} for value in values])


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _ladder(step: int, most: int) -> list[int]:
    """`step` times 1 to 8, 10, 12, 14, 16, 20, …, up to `most`; one at least."""
    quarters = (n << k for k in range(32) for n in (4, 5, 6, 7))
    counts = [1, 2, 3, *itertools.takewhile(lambda n: n * step <= most, quarters)]
    return [step * n for n in counts if n == 1 or step * n <= most]
