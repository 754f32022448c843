"""All suites by name; they are run, shown, and written down."""

import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from pr1_jax.bench import blocks, lanes, report, sampling
from pr1_jax.bench.shapes import Bench
from pr1_jax.bench.update import update
from pr1_jax.system import files
from pr1_jax.system.tables import Table


def _limits(bench: Bench) -> list[Table]:
    """The peaks that all shares are of."""
    limits = bench.limits
    products = [
        {"size": size, "GFLOP/s": rate / 1e9} for size, rate in limits.matmuls.items()
    ]
    reads = [{"way": way, "GB/s": rate / 1e9} for way, rate in limits.reads.items()]
    note = "The best of each is the limit that everything else is a share of."
    return [
        Table(f"Square matrix products, {bench.config.dtype}", products),
        Table("Reading a large array", reads, note),
    ]


SUITES: dict[str, Callable[[Bench], list[Table]]] = {
    "limits": _limits,
    "sampling": sampling.sampling,
    "update": update,
    "blocks": blocks.blocks,
    "lanes": lanes.lanes,
}


def run(
    bench: Bench,
    names: Sequence[str],
    *,
    out: Path | None = None,
    show: Callable[[Table], None] | None = None,
) -> dict[str, Any]:
    """Runs suites one after another; where one fails, the others still run.

    Args:
      out: folder for results.json and results.md, brought up to date after every
        suite, since a long run may be cut off.
      show: called with every table.

    Returns:
      What the machine is, and under `suites` for each its tables, its seconds, and
      `error` if it failed.
    """
    about, results = _about(bench), {}
    for name in names:
        print(f"{name} …", file=sys.stderr, flush=True)
        began = time.perf_counter()
        tables, error = [], {}
        try:
            tables = SUITES[name](bench)
        except Exception as failure:  # noqa: BLE001 (the other suites are wanted)
            error = {"error": f"{type(failure).__name__}: {failure}"}
            print(f"{name} failed: {error['error']}", file=sys.stderr)
        sec = time.perf_counter() - began
        results[name] = {"tables": tables, "sec": sec, **error}
        if show is not None:
            for table in tables:
                show(table)
        if out is not None:
            files.write_json_by_key(
                out / "results.json", report.json_data(results, about)
            )
            text = report.markdown(results, about)
            files.replace_file(out / "results.md", text.encode())
    return report.json_data(results, about)


def _about(bench: Bench) -> dict[str, Any]:
    """What the figures depend on."""
    device = jax.devices()[0]
    return {
        "shape": bench.shape.name,
        "quick": bench.quick,
        "repeats": bench.repeats,
        "device": f"{device.platform} {device.device_kind}",
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "jax": jax.__version__,
        "python": platform.python_version(),
        "flops_per_sec": bench.limits.flops_per_sec,
        "bytes_per_sec": bench.limits.bytes_per_sec,
    }
