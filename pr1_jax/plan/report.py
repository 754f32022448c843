"""A plan as tables for the terminal."""

from collections.abc import Sequence

import rich.console
import rich.text

from pr1_jax.model.params import param_count
from pr1_jax.plan import costs, schedule, timing
from pr1_jax.plan.planning import Plan
from pr1_jax.system.accelerators import GIB, Hardware
from pr1_jax.system.tables import Table


def show(plan: Plan) -> rich.console.Group:
    """Memory, what fits, and a step's cost."""
    e, hardware = plan.experiment, plan.topology.hardware
    mesh = ", ".join(f"{name} {size}" for name, size in e.mesh.shape.items())
    count = param_count(e.abstract_params())
    title = (
        f"{e.config.name} on {plan.topology.text}: {plan.topology.num_devices} devices "
        f"({mesh}), {hardware.name}, {plan.limit / GIB:.2f} GiB each; "
        f"{count / 1e9:.3g} billion parameters"
    )
    if e.adapter_settings:
        title += (
            f", and {param_count(e.abstract_trained()) / 1e6:.3g} million in adapters"
        )
    parts = [rich.text.Text(title + "\n", style="bold")]
    parts += [memory_table(plan).terminal(), verdict(plan)]
    parts.append(work_table(plan).terminal())
    if plan.traffic:
        parts.append(traffic_table(plan).terminal())
    notes = "".join(f"* {line}\n" for line in plan.assumptions)
    return rich.console.Group(*parts, rich.text.Text(notes, style="dim"))


def show_timings(timings: timing.Timings) -> rich.console.Group:
    """Times of programs by group, and the instructions that take most of them."""
    made, topology = timings.experiment, timings.topology
    mesh = ", ".join(f"{name} {size}" for name, size in made.mesh.shape.items())
    title = f"{made.config.name} on {topology.text} ({mesh}), {topology.hardware.name}"
    parts = [rich.text.Text(title + "\n", style="bold")]
    parts.append(timing_table(timings.programs, topology.hardware).terminal())
    parts += [largest_table(x).terminal() for x in timings.programs]
    if any(x.kernels for x in timings.programs):
        parts.append(kernel_table(timings.programs).terminal())
    notes = "".join(f"* {line}\n" for line in timings.assumptions)
    return rich.console.Group(*parts, rich.text.Text(notes, style="dim"))


def timing_table(timings: Sequence[timing.Timing], hardware: Hardware) -> Table:
    """Milliseconds of a run by group of instructions, and what they come to."""
    row = lambda name, value: {"ms": name} | {x.name: value(x) for x in timings}
    rows = [
        row(group, lambda x, group=group: 1e3 * x.seconds(group))
        for group in schedule.GROUPS
        if any(x.seconds(group) for x in timings)
    ]
    rows += [
        row("all", lambda x: 1e3 * x.seconds()),
        row("before collectives", lambda x: 1e3 * x.before_collectives),
        row("if none of them overlaps", lambda x: 1e3 * x.without_overlap),
        row("without an estimate", lambda x: 1e3 * x.unestimated),
        row("MFU", lambda x: _share(x.mfu(hardware))),
        row("needed GB", lambda x: x.needed_bytes / 1e9 or None),
        row("moved GB", lambda x: x.schedule.bytes() / x.runs / 1e9),
        row(
            "bandwidth share",
            lambda x: _share(x.needed_bytes and x.bandwidth_share(hardware)),
        ),
        row("memory GiB", lambda x: x.memory_bytes / GIB),
    ]
    return Table("Estimated time on one device", rows)


def _share(value: float) -> str | None:
    return f"{100 * value:.0f} %" if value else None


def largest_table(of: timing.Timing) -> Table:
    """The ten instructions of a program that take longest."""
    rows = [
        {
            "instruction": x.name,
            "group": x.group,
            "times": x.times / of.runs,
            "ms each": 1e3 * x.seconds,
            "MB": x.bytes / 1e6,
            "by": x.source,
            "from": x.op_name[-48:],
        }
        for x in of.schedule.largest()
    ]
    return Table(of.name, rows)


def kernel_table(timings: Sequence[timing.Timing]) -> Table:
    """Pallas kernels, with the share of the peak that their instructions allow."""
    rows = [
        {
            "kernel": x.name,
            "program": of.name,
            "times": x.times / of.runs,
            "ms each": 1e3 * x.seconds,
            "MB": x.bytes / 1e6,
            "by": x.source,
            "bundles a step": of.bodies[x.name].bundles or None,
            "MFLOP a step": of.bodies[x.name].flops / 1e6 or None,
            "peak at most": _share(x.peak_share),
        }
        for of in timings
        for x in of.kernels
    ]
    return Table("Pallas kernels", rows)


def memory_table(plan: Plan) -> Table:
    """Parts by moment, in GiB; in MiB where all is small."""
    name, unit = ("GiB", GIB) if plan.peak.total >= GIB else ("MiB", GIB // 1024)
    names = dict.fromkeys(part for moment in plan.moments for part in moment.parts)
    rows = []
    for part in names:
        row = {"part": part}
        for moment in plan.moments:
            size = moment.parts.get(part)
            row[moment.name] = None if size is None else size / unit
        rows.append(row)
    total = {"part": "all"}
    share = {"part": "share of the memory"}
    for moment in plan.moments:
        total[moment.name] = moment.total / unit
        share[moment.name] = f"{100 * moment.total / plan.limit:.0f} %"
    return Table(f"Memory of a device, {name}", [*rows, total, share])


def verdict(plan: Plan) -> rich.text.Text:
    """Whether it fits, with how much to spare; if not, what to change."""
    spare = (plan.limit - plan.peak.total) / GIB
    if plan.fits:
        lines = [f"fits: {spare:.1f} GiB to spare at the {plan.peak.name}"]
    else:
        lines = [f"DOES NOT FIT: {line}" for line in plan.advice]
    for name, value in plan.largest.items():
        section, field = name.split(".")
        now = plan.experiment.config[section][field]
        found = "none found" if value is None else f"{value:,}"
        lines.append(f"largest {name} that fits: {found} (now {now:,})")
    style = "green" if plan.fits else "red"
    return rich.text.Text("\n".join(lines) + "\n", style=style)


def work_table(plan: Plan) -> Table:
    """FLOPs, bytes and seconds of a step's phases."""
    rows = [
        {
            "phase": work.name,
            "PFLOP": work.flops / 1e15,
            "GB a device": work.bytes / 1e9,
            "compute sec": work.compute_sec,
            "memory sec": work.memory_sec,
            "at least sec": work.seconds,
            "bound by": (
                "compute" if work.compute_sec >= work.memory_sec else "memory"
            ),
        }
        for work in plan.works
    ]
    total = {
        "phase": "step",
        "PFLOP": sum(work.flops for work in plan.works) / 1e15,
        "at least sec": costs.total_seconds(plan.works),
    }
    return Table("A step at the peaks of the hardware", [*rows, total])


def traffic_table(plan: Plan) -> Table:
    """Bytes over links between devices."""
    rows = [
        {"between devices": x.name, "GB a device": x.bytes / 1e9, "sec": x.seconds}
        for x in plan.traffic
    ]
    return Table("Over the links in a step, if nothing of it overlaps", rows)
