"""How long a compiled program takes, by its compiler's own estimates.

The TPU compiler notes beside each fusion and copy how many cycles it expects (`hlo`). A
program's instructions run one after the other, so their sum, loop bodies times their
trips, is an estimate of its time. Four things have none, and are priced here:

* asynchronous copies: bytes at the data sheet's bandwidth, one after the other, beside
  what runs meanwhile; what is waited for counts (group `copies`);
* collectives: bytes over the links of a ring, at the data sheet's rate. `seconds` counts
  those that are waited for, `collective_seconds` all of them as if none overlapped;
* Pallas kernels: the longer of their bytes at that bandwidth and their bundles. Both are
  of what a kernel declares (`pl.CostEstimate`): its FLOPs, and the bytes of transfers that
  it starts itself, in as many bundles for each as a step of its grid takes (`kernels`);
  without bundles, FLOPs at the peak. One that declares nothing is priced by its operands
  and results, and by all steps of its grid;
* all else without an estimate: bytes at that bandwidth, at the least.

Of a program for GPUs the compiler notes seconds instead, by a model of each kernel, and of
collectives by the links. What it says of products that are left to cuBLAS is far off where
they make float32; they are priced at the peak, or by their bytes if that is longer. So are
plain copies. What it takes to launch a kernel is not counted.

It is one instrument for all programs, so ratios of two of them count, not milliseconds:
large products come out slightly too fast, memory-bound work too slow. Of a conditional
the branch that takes longest counts, and of a loop its most trips.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pr1_jax.plan import hlo
from pr1_jax.plan.kernels import Body
from pr1_jax.system.accelerators import GPUS, Hardware

COPIES, COLLECTIVES, OTHER = "copies", "collectives", "other"
# By the innermost of these name scopes of the traced code.
SCOPES = ("attention", "projections", "norms", "head", "draw", "optimizer", "rows")
GROUPS = (*SCOPES, COPIES, COLLECTIVES, OTHER)
ESTIMATED, AT_BANDWIDTH, AT_LINKS = "cycles", "bytes", "links"
BY_BUNDLES, DECLARED, AT_PEAK = "bundles", "declared", "peak"

_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("partition-id", "replica-id", "opt-barrier", "optimization-barrier"),
}
_RING = {  # bytes that a device takes in, times those of its result, over n devices
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
    "collective-broadcast": lambda n: 1.0,
    "ragged-all-to-all": lambda n: (n - 1) / n,
}
_COPIES = ("copy", "copy-start", "slice-start", "dynamic-slice-start")
_SLICES = ("slice", "dynamic-slice", "gather")
# Transformed ones, too: `transpose(jvp(attention))`.
_SCOPE = re.compile(rf"(?<![^/(])({'|'.join(SCOPES)})(?![^/)])")
_IN_PLACE = {"dynamic-update-slice": 1, "scatter": 2}  # which operand is written
_CHANNEL = re.compile(r"channel_id=\d+")
_GROUP = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_GROUP_GRID = re.compile(r"replica_groups=\[\d+,(\d+)\]")
_GROUP_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one instruction costs.

    Attributes:
      times: that it runs. seconds: that it is waited for, each time.
      bytes: of the device's main memory that it reads and writes, each time.
      link_seconds: of a collective, each time, were nothing to overlap.
      source: of its seconds: `ESTIMATED`, `AT_BANDWIDTH` or `AT_LINKS`; of a kernel
        whose bundles are counted `BY_BUNDLES`, else `DECLARED`, if it declares them.
      peak_share: of the peak, that a kernel's bundles allow; 0 = it has no products, or
        they are not counted.
    """

    name: str
    opcode: str
    group: str
    op_name: str
    times: int
    seconds: float
    bytes: int
    link_seconds: float = 0.0
    source: str = ESTIMATED
    peak_share: float = 0.0


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The costs of a program's instructions; all figures are of one device.

    Attributes:
      endless: names of loops whose trips are not known; their bodies count once.
    """

    costs: Sequence[Cost]
    endless: Sequence[str] = ()

    def seconds(self, group: str = "") -> float:
        """Of a group, or of all."""
        chosen = [x for x in self.costs if group in ("", x.group)]
        return sum(x.times * x.seconds for x in chosen)

    def bytes(self, group: str = "") -> int:
        """Moved to or from main memory, of a group or of all."""
        chosen = [x for x in self.costs if group in ("", x.group)]
        return sum(x.times * x.bytes for x in chosen)

    @property
    def collective_seconds(self) -> float:
        """Were none of the collectives to overlap with anything."""
        return sum(x.times * x.link_seconds for x in self.costs)

    @property
    def unestimated_seconds(self) -> float:
        """Of what has no estimate but its bytes or FLOPs: at the least."""
        guessed = (AT_BANDWIDTH, AT_PEAK, DECLARED)
        chosen = [x for x in self.costs if x.source in guessed]
        return sum(x.times * x.seconds for x in chosen if x.group != COPIES)

    def largest(self, count: int = 10) -> list[Cost]:
        """The instructions that take most of the time."""
        return sorted(self.costs, key=lambda x: -x.times * x.seconds)[:count]


def of_program(
    program: str | hlo.Program,
    hardware: Hardware,
    bodies: Mapping[str, Body] | None = None,
) -> Schedule:
    """The schedule of a compiled program.

    Args:
      program: `compiled.as_text()`, or what it was parsed to.
      bodies: of its kernels, as of `kernels.measure`.

    Raises:
      ValueError: the text is no HLO module, or no clock of a TPU is known.
    """
    if not tells_times(hardware):
        raise ValueError(f"{hardware.name} has no known clock, so cycles say nothing")
    if isinstance(program, str):
        program = hlo.parse(program)
    return _Walk(program, hardware, bodies or {}).run()


def tells_times(hardware: Hardware) -> bool:
    """Whether the device's compiler notes times, or cycles of a known clock."""
    return hardware.name in GPUS or hardware.clock_hz > 0


@dataclasses.dataclass
class _Walk:
    """One pass over a program; `costs` and `endless` are added to."""

    program: hlo.Program
    hardware: Hardware
    bodies: Mapping[str, Body]
    costs: list[Cost] = dataclasses.field(default_factory=list)
    endless: list[str] = dataclasses.field(default_factory=list)

    def run(self) -> Schedule:
        self.computation(self.program.entry, 1)
        return Schedule(tuple(self.costs), tuple(self.endless))

    def computation(self, name: str, times: int) -> float:
        """Costs of a computation that runs so many times; its seconds, once."""
        inside = self.program.computations[name]
        clock = copied = linked = 0.0  # when the device, its copies, its links are free
        started: dict[str, tuple[hlo.Instruction, float]] = {}  # and when it ends
        for x in inside.values():
            part, key = self._part(x)
            if part == "done" and key in started:
                start, end = started.pop(key)
                wait = max(0.0, end - clock)
                self._add(start, times, wait, inside)
                clock += wait
            elif part == "start" and (of := self._links(x)):
                linked = max(linked, clock) + of
                started[key] = x, linked
            elif part == "start":
                copied = max(copied, clock) + self._at_bandwidth(x, inside)
                started[key] = x, copied
            elif part != "update" and not _is_free(x):
                begun = clock
                clock += self._one(x, times, inside)
                if x.kernel is not None and x.kernel.bytes:
                    # The bandwidth is one: its transfers come after those under way.
                    copied = max(copied, begun) + self._at_bandwidth(x, inside)
                    clock += self._wait(x, times, copied - clock)
        return clock

    def _part(self, x: hlo.Instruction) -> tuple[str, str]:
        """Whether it is the "start" or the "done" of something, and of what."""
        if collective := self._chained(x, "Start"):
            return "start", collective
        if collective := self._chained(x, "Done"):
            return "done", collective
        part = x.opcode.rpartition("-")[2]
        return part, x.operands[0] if part == "done" and x.operands else x.name

    def _chained(self, x: hlo.Instruction, part: str) -> str:
        """The channel of the collective that a fusion starts or ends, or "".

        Between the two, it goes on in fusions that also compute; they cost cycles.
        """
        if x.opcode != "fusion" or "kind=kCustom" not in x.rest:
            return ""
        body = self.program.computations[x.called[0]].values()
        target = f'custom_call_target="AsyncCollective{part}"'
        if not any(target in y.rest for y in body):
            return ""
        found = (_CHANNEL.search(y.rest) for y in body if y.opcode in _RING)
        return next((channel[0] for channel in found if channel), x.name)

    def _one(self, x: hlo.Instruction, times: int, inside: hlo.Computation) -> float:
        """Costs of an instruction that is waited for; its seconds, once."""
        if x.opcode == "while":
            trips = self.program.trips(x)
            if trips is None:
                self.endless.append(x.name)
            trips = 1 if trips is None else trips
            return trips * self.computation(x.computation("body"), times * trips)
        if x.opcode == "conditional":
            return self._branches(x, times)
        if x.opcode == "call":
            return self.computation(x.called[0], times)
        if of := self._links(x):
            return self._add(x, times, of, inside)
        if x.kernel is not None:
            return self._kernel(x, times, inside)
        if x.contracted:
            return self._product(x, times, inside)
        seconds = self._estimated(x)
        seconds = self._at_bandwidth(x, inside) if seconds is None else seconds
        return self._add(x, times, seconds, inside)

    def _estimated(self, x: hlo.Instruction) -> float | None:
        """Seconds by the compiler; None where it says nothing."""
        if x.cycles is not None:
            return x.cycles / self.hardware.clock_hz
        return x.seconds

    def _product(
        self, x: hlo.Instruction, times: int, inside: hlo.Computation
    ) -> float:
        """Costs of a matrix product at the peak; its seconds, once."""
        first = inside[x.operands[0]].results[0].dims
        flops = (
            2 * math.prod(x.results[0].dims) * math.prod(first[i] for i in x.contracted)
        )
        computing = flops / self.hardware.flops_per_sec
        seconds = max(computing, self._at_bandwidth(x, inside))
        return self._add(x, times, seconds, inside, source=AT_PEAK)

    def _kernel(self, x: hlo.Instruction, times: int, inside: hlo.Computation) -> float:
        """Costs of a Pallas kernel; its seconds, once."""
        body, declared = self.bodies.get(x.name, Body()), x.kernel.flops
        computing = body.seconds(declared, x.kernel.bytes, self.hardware)
        source = BY_BUNDLES
        if computing is None:
            computing = (declared or 0) / self.hardware.flops_per_sec
            source = AT_BANDWIDTH if declared is None else DECLARED
        seconds = max(computing, self._at_bandwidth(x, inside))
        share = body.share(self.hardware)
        return self._add(x, times, seconds, inside, source=source, peak_share=share)

    def _wait(self, x: hlo.Instruction, times: int, seconds: float) -> float:
        """Costs of what a kernel waits for copies; seconds, once, 0 at the least."""
        if seconds <= 0:
            return 0.0
        name = f"copies beside {x.name}"
        found = Cost(name, x.opcode, COPIES, x.op_name, times, seconds, 0)
        self.costs.append(dataclasses.replace(found, source=AT_BANDWIDTH))
        return seconds

    def _branches(self, x: hlo.Instruction, times: int) -> float:
        """Of a conditional: the branch that takes longest."""
        found = []
        for name in x.called:
            alone = _Walk(self.program, self.hardware, self.bodies)
            found.append((alone.computation(name, times), alone))
        seconds, chosen = max(found, key=lambda of: of[0])
        self.costs += chosen.costs
        self.endless += chosen.endless
        return seconds

    def _links(self, x: hlo.Instruction) -> float:
        """Seconds of a collective over its links; 0 for anything else."""
        if x.opcode == "async-start" or self._chained(x, "Start"):
            # It wraps what it starts.
            wrapped = self.program.computations[x.called[0]].values()
            return sum(map(self._links, wrapped))
        if devices := self._scatters(x):
            size = sum(a.bytes for a in x.results)
            return size * _RING["reduce-scatter"](devices) / self.hardware.ici_per_sec
        kind = x.opcode.removesuffix("-start")
        if kind not in _RING:
            return 0.0
        if x.seconds is not None:
            return x.seconds
        devices = _group_size(x.rest)
        if kind != "collective-permute" and devices < 2:
            return 0.0
        size = sum(a.bytes for a in _made(x))
        return size * _RING[kind](devices) / self.hardware.ici_per_sec

    def _scatters(self, x: hlo.Instruction) -> int:
        """Devices among which a fusion scatters a sum; 0 for anything else.

        TPUs take a sum's scattering as one: of an all-reduce each device makes its slice.
        """
        if x.opcode != "fusion" or "kind=kCustom" not in x.rest:
            return 0
        body = self.program.computations[x.called[0]]
        root = next(y for y in body.values() if y.is_root)
        summed = body.get(root.operands[0]) if root.operands else None
        if root.opcode != "dynamic-slice" or not summed:
            return 0
        return _group_size(summed.rest) if summed.opcode == "all-reduce" else 0

    def _at_bandwidth(self, x: hlo.Instruction, inside: hlo.Computation) -> float:
        return self._moved(x, inside) / self.hardware.hbm_per_sec

    def _moved(self, x: hlo.Instruction, inside: hlo.Computation) -> int:
        """Bytes of main memory that an instruction reads and writes."""
        if x.kernel is not None and x.kernel.bytes is not None:
            return x.kernel.bytes
        if x.opcode in _COPIES and x.opcode != "copy":
            to = x.results[:1] if x.opcode == "copy-start" else x.results[1:2]
            return sum(a.bytes for a in to or x.results[:1])
        if self._chained(x, "Start"):
            body = self.program.computations[x.called[0]]
            wrapped = [y for y in body.values() if y.opcode in _RING]
            return sum(self._moved(y, body) for y in wrapped)
        if x.opcode in _IN_PLACE:  # what is not written is not moved
            update = inside[x.operands[_IN_PLACE[x.opcode]]]
            return 2 * sum(a.bytes for a in update.results)
        body = self.program.computations[x.called[0]] if x.opcode == "fusion" else None
        read = 0
        for i, name in enumerate(x.operands):
            whole = sum(a.bytes for a in inside[name].results if not a.on_chip)
            read += min(whole, self._read(i, body)) if body else whole
        written = sum(a.bytes for a in _made(x) if not a.on_chip)
        if body and (updates := [*_updates(body)]):
            written = min(written, sum(updates))
        return read + written

    def _read(self, number: int, body: hlo.Computation) -> float:
        """Bytes that a fusion reads of an operand: less than all where it slices it."""
        found = (x for x in body.values() if x.opcode == "parameter")
        names = [x.name for x in found if x.arguments == str(number)]
        read = 0.0
        while names:
            name = names.pop()
            for x in (x for x in body.values() if name in x.operands):
                if x.opcode in _SLICES and x.operands[0] == name:
                    read += sum(a.bytes for a in x.results)
                elif x.opcode == "bitcast":
                    names.append(x.name)
                elif x.opcode == "fusion":
                    inner = self.program.computations[x.called[0]]
                    for i, operand in enumerate(x.operands):
                        read += self._read(i, inner) if operand == name else 0.0
                elif x.opcode in _IN_PLACE and x.operands[0] == name:
                    pass
                else:
                    return math.inf
        return read

    def _add(
        self,
        x: hlo.Instruction,
        times: int,
        seconds: float,
        inside: hlo.Computation,
        **fields: Any,
    ) -> float:
        link = self._links(x)
        source = AT_LINKS if link else AT_BANDWIDTH
        if x.seconds is not None or (x.cycles is not None and not link):
            source = ESTIMATED
        moved = self._moved(x, inside)
        group = COLLECTIVES if link else group_of(x)
        if moved or seconds or link:
            self.costs.append(
                Cost(
                    *(x.name, x.opcode, group, x.op_name, times, seconds, moved),
                    **{"link_seconds": link, "source": source} | fields,
                )
            )
        return seconds


def _is_free(x: hlo.Instruction) -> bool:
    """Whether it takes no time: what reserves memory neither reads nor writes it."""
    return x.opcode in _FREE or 'custom_call_target="AllocateBuffer"' in x.rest


def _made(x: hlo.Instruction) -> Sequence[hlo.Array]:
    """What an instruction makes; one that starts another lists its operands as well."""
    if x.contracted:
        return x.results[:1]  # the other is cuBLAS's scratch
    if not x.opcode.endswith("-start") or x.opcode == "all-reduce-start":
        return x.results
    made = [a for a in x.results if a.dims]  # scalars are contexts
    return made[len(made) // 2 :]


def group_of(x: hlo.Instruction) -> str:
    """One of `GROUPS`: by opcode, else by the innermost scope that is one of them."""
    if x.opcode in _COPIES:
        return COPIES
    return next(reversed(_SCOPE.findall(x.op_name)), OTHER)


def _group_size(attributes: str) -> int:
    """Devices of a replica group."""
    if found := _GROUP.search(attributes):
        return len(found[1].split(","))
    if found := _GROUP_GRID.search(attributes):
        return int(found[1])
    if found := _GROUP_MESH.search(attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        size = 1
        for name in re.findall(r"'(\w+)'", found[2]):
            size *= int(sizes[name])
        return size
    return 1


def _updates(body: hlo.Computation) -> Iterator[int]:
    """Bytes that a fusion writes into an array which it updates in place."""
    for x in body.values():
        if x.opcode in _IN_PLACE and x.is_root:
            update = x.operands[_IN_PLACE[x.opcode]]
            yield sum(a.bytes for a in body[update].results)
