"""Where decoding and the update stand against the limits, and what a step spends."""

import collections
import re
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax

from pr1_jax.bench import timing
from pr1_jax.bench.report import Plot, Table
from pr1_jax.bench.sampling import plain_sampler, work
from pr1_jax.bench.shapes import Bench
from pr1_jax.bench.update import Update, figures
from pr1_jax.model import costs

_TOP = 12  # operations that are named
_CONTAINERS = ("while", "call", "conditional")  # their time is that of what they hold


def decode_limits(bench: Bench) -> list[Table]:
    """Tables that tell what a GPU or TPU is busy with."""
    return [_batches(bench), _updates(bench), _operations(bench)]


def _batches(bench: Bench) -> Table:
    sizes = bench.sizes
    prompt, tokens = sizes.prompt_tokens, sizes.response_tokens
    works = {}
    for rows in sizes.batches:
        sampler = plain_sampler(bench, rows=rows, prompt=prompt, response=tokens)
        works[str(rows)] = work(bench, sampler, bench.prompts([prompt] * rows))
    runs = timing.alternate(works, bench.repeats)
    table = []
    for rows in sizes.batches:
        run, half = runs[str(rows)], tokens // 2
        cost = costs.decode_step(bench.config, rows=rows, prompt=prompt, response=half)
        limit_ms = 1e3 * cost.seconds(bench.limits)
        bytes_ms = 1e3 * cost.bytes / bench.limits.bytes_per_sec
        table.append(
            {
                "rows": rows,
                "ms per step": run["step_ms"],
                "tokens per second": run["step_ms"].rate(1e3 * rows),
                "share of bandwidth": run["step_ms"].rate(bytes_ms),
                "limit ms per step": limit_ms,
                "share of limit": run["step_ms"].rate(limit_ms),
            }
        )
    note = f"{prompt} + {tokens} tokens; bytes of a step half way, the host included."
    plot = Plot("rows", ("ms per step",), ("limit ms per step",))
    return Table("Decode by batch", table, note, plot)


def _updates(bench: Bench) -> Table:
    sizes, table = bench.sizes, []
    for tokens in sizes.update_lengths:
        for rows in sizes.update_batches:
            micro = min(max(sizes.micro_batch_tokens // tokens, 1), rows)
            while rows % micro:
                micro -= 1
            what = {"rows": rows, "tokens": tokens, "micro_batch": micro}
            update = Update(bench, [], **what)
            run = timing.alternate({"": update}, bench.repeats)[""]
            shape = {"tokens": tokens, "batch": rows, "micro-batch": micro}
            table.append(shape | figures(bench, update, run))
    plot = Plot("tokens", ("MFU",), by="batch")
    return Table("GRPO update by length and batch", table, plot=plot)


def _operations(bench: Bench) -> Table:
    """Profiles one call of the sampler."""
    sizes = bench.sizes
    rows, prompt, tokens = sizes.rows, sizes.prompt_tokens, sizes.response_tokens
    sampler = plain_sampler(bench, rows=rows, prompt=prompt, response=tokens)
    call = work(bench, sampler, bench.prompts([prompt] * rows))
    call()  # compiles
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            call()
        (path,) = Path(folder).rglob("*.xplane.pb")
        spent = operation_costs(jax.profiler.ProfileData.from_file(str(path)).planes)
    total = sum(sec for sec, _ in spent.values()) or 1.0
    top = sorted(spent.items(), key=lambda item: -item[1][0])[:_TOP]
    table = [
        {
            "operation": name,
            "ms": 1e3 * sec,
            "share of all": sec / total,
            "calls": calls,
        }
        for name, (sec, calls) in top
    ]
    note = "By name of the HLO operation without its number, device time alone."
    return Table(f"What sampling {rows} × {tokens} tokens spends", table, note)


def operation_costs(planes: Iterable[Any]) -> dict[str, tuple[float, int]]:
    """Seconds and calls of every kind of HLO operation in a profile.

    A device's own lines are taken, and of these the one of operations where there is
    one; on a CPU, what its threads ran. Events that lie in others of their line are
    taken out of those, so that nothing counts twice.

    Args:
      planes: of `jax.profiler.ProfileData`.
    """
    planes = list(planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:")]
    lines = [line for plane in devices or planes for line in plane.lines]
    lines = [line for line in lines if line.name == "XLA Ops"] or lines
    seconds, calls = collections.Counter(), collections.Counter()
    for line in lines:
        operations = [
            (event, stats.get("hlo_op", event.name))
            for event in line.events
            for stats in [dict(event.stats)]
            if devices or "hlo_op" in stats
        ]
        own_ns = _own_times([(e.start_ns, e.duration_ns) for e, _ in operations])
        for (_, full), time_ns in zip(operations, own_ns):
            name = re.sub(r"[.\d]+$", "", full)
            if not name.startswith(_CONTAINERS):
                seconds[name] += time_ns / 1e9
                calls[name] += 1
    return {name: (seconds[name], calls[name]) for name in seconds}


def _own_times(events: Sequence[tuple[float, float]]) -> list[float]:
    """Durations of events (start, duration) of a line, less those of events within."""
    own, open_ = [duration for _, duration in events], []  # of `open_`: index, end
    for i in sorted(range(len(events)), key=lambda i: (events[i][0], -events[i][1])):
        start, duration = events[i]
        while open_ and open_[-1][1] <= start:
            open_.pop()
        if open_:
            own[open_[-1][0]] -= duration
        open_.append((i, start + duration))
    return [max(time, 0.0) for time in own]
