"""Where decoding and the update stand against the limits, and what a step spends."""

import collections
import gzip
import json
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from pr1_jax.bench import timing
from pr1_jax.bench.report import Plot, Table
from pr1_jax.bench.sampling import plain_sampler, work
from pr1_jax.bench.shapes import Bench
from pr1_jax.bench.update import Chain, figures, measure
from pr1_jax.model import costs

_TOP = 12  # operations that are named
_CONTAINERS = ("while", "call", "conditional")  # their time is that of what they hold


def decode_limits(bench: Bench) -> list[Table]:
    """All of them, for a GPU or TPU."""
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
            update, call = measure(bench, Chain(), **what)
            run = timing.alternate({"": call}, bench.repeats)[""]
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
        events = read_trace(Path(folder))
    spent = operation_costs(events)
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


def read_trace(folder: Path) -> list[dict[str, Any]]:
    """Events of the traces that `jax.profiler.trace` wrote below a folder."""
    events = []
    for path in sorted(folder.rglob("*.trace.json.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            events += json.load(file)["traceEvents"]
    return events


def operation_costs(
    events: Sequence[Mapping[str, Any]],
) -> dict[str, tuple[float, int]]:
    """Seconds and calls of every kind of HLO operation in a trace.

    A device's own lines are taken, and of these the one of operations where there is
    one; on a CPU, what its threads ran. Events that lie in others of their line are
    taken out of those, so that nothing counts twice.
    """
    processes, threads = {}, {}
    for event in events:
        if event.get("ph") != "M":
            continue
        name = event.get("args", {}).get("name")
        if event["name"] == "process_name":
            processes[event["pid"]] = name
        elif event["name"] == "thread_name":
            threads[event["pid"], event["tid"]] = name
    devices = {p for p, name in processes.items() if "/device:" in (name or "")}
    named = {line for line, name in threads.items() if name == "XLA Ops"}
    lines = collections.defaultdict(list)
    for event in events:
        line = event.get("pid"), event.get("tid")
        args = event.get("args", {})
        if event.get("ph") != "X" or "dur" not in event:
            continue
        on_device = line[0] in devices and (line in named or not named)
        if on_device if devices else "hlo_op" in args:
            lines[line].append(event)
    seconds, calls = collections.Counter(), collections.Counter()
    for line in lines.values():
        for event, own_us in _own_times(line):
            full = event.get("args", {}).get("hlo_op") or event["name"]
            name = re.sub(r"[.\d]+$", "", full)
            if name.startswith(_CONTAINERS):
                continue
            seconds[name] += own_us / 1e6
            calls[name] += 1
    return {name: (seconds[name], calls[name]) for name in seconds}


def _own_times(
    events: Iterable[Mapping[str, Any]],
) -> list[tuple[Mapping[str, Any], float]]:
    """Each event of a line with its time, less that of events that lie in it; in µs."""
    own, open_ = [], []  # of `open_`: index in `own`, end
    for event in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
        while open_ and open_[-1][1] <= event["ts"]:
            open_.pop()
        if open_:
            own[open_[-1][0]][1] -= event["dur"]
        open_.append((len(own), event["ts"] + event["dur"]))
        own.append([event, event["dur"]])
    return [(event, max(time, 0.0)) for event, time in own]
