"""Sets the prices of all programs side by side: a Markdown table and a JSON summary.

`python -m tests.programs.tpu_peers.table FOLDER --out RESULTS` reads
FOLDER/<topology>/<peer>-<work>-<layers>.json, as the workers write them, and writes
RESULTS/tpu_peers.md and RESULTS/tpu_peers.json. A .log without its .json is of a program
that did not compile. Of two depths, a line through both says what 36 layers cost.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pr1_jax.plan import hardware
from pr1_jax.system import accelerators, files
from pr1_jax.system.tables import Table

LAYERS = 36
OURS, TUNIX = "ours", "tunix"
ADDED = (  # what grows in a line with layers
    *("seconds", "seconds_before_collectives", "seconds_without_overlap"),
    *("seconds_at_bandwidth", "flops", "needed_bytes", "own_bytes", "moved_bytes"),
    "memory_bytes",
)
NOTE = (
    "ms, of the compiler's estimates: ratios count. µs a token: of all devices together. "
    "ours / Tunix: time a token over the least that Tunix takes for such a token. A decode "
    "step needs the weights, and keys and values in use: half of the response's slots on "
    "average, and prompts, which ours reads once a group and Tunix once a row. Tunix "
    "attends over all slots of its cache, since its program does; what a program reads by "
    "its nature, at the bandwidth, stands beside the estimate."
)


@dataclass(frozen=True)
class Row:
    """A program of a peer on a topology.

    Attributes:
      work: "decode", "decode_blocks" or "update", or a mode as "update_packed".
      prices: by number of layers. failed: why there is none.
    """

    topology: str
    peer: str
    work: str
    prices: Mapping[int, Mapping[str, Any]]
    failed: str = ""

    @property
    def kind(self) -> str:
        """What it is compared in: "decode" or "update"."""
        return self.work.partition("_")[0]

    @property
    def device(self) -> accelerators.Hardware:
        """A device of the topology."""
        return hardware.parse_topology(self.topology).hardware

    @property
    def any(self) -> Mapping[str, Any]:
        """What is the same at all depths."""
        return next(iter(self.prices.values()), {})

    def value(self, name: str) -> float | None:
        """One of `ADDED` at 36 layers; None where that is not known."""
        return at_depth({n: x.get(name, 0.0) for n, x in self.prices.items()})

    def over_peak(self, name: str) -> float | None:
        """FLOPs over those that the device could do in seconds of this name."""
        flops, seconds = self.value("flops"), self.value(name)
        return flops and flops / (self.device.flops_per_sec * seconds)

    @property
    def bandwidth(self) -> float | None:
        """Needed bytes over those that could be read meanwhile; None: not counted."""
        needed = self.value("needed_bytes")
        return (
            needed and needed / (self.device.hbm_per_sec * self.value("seconds"))
        ) or None

    @property
    def floor_sec(self) -> float | None:
        """Seconds of what the program reads by its nature, at the bandwidth."""
        own = self.value("own_bytes")
        return (own and own / self.device.hbm_per_sec) or None

    @property
    def token_sec(self) -> float | None:
        """Seconds of a token on all devices of the topology."""
        seconds = self.value("seconds")
        return seconds and seconds / self.any["tokens"]


def at_depth(values: Mapping[int, float]) -> float | None:
    """A figure at 36 layers, by a line through the two deepest where it is not there."""
    if LAYERS in values:
        return values[LAYERS]
    if len(values) < 2:
        return None
    few, many = sorted(values)[-2:]
    return values[many] + (LAYERS - many) * (values[many] - values[few]) / (many - few)


def read_rows(folder: Path) -> list[Row]:
    """All rows, in the order of topologies and works.

    Raises:
      ValueError: there is none.
    """
    prices: dict[tuple[str, str, str], dict[int, Any]] = {}
    failed: dict[tuple[str, str, str], str] = {}
    for log in sorted(folder.glob("*/*.log")):
        peer, work, layers = log.stem.split("-")
        key = log.parent.name.replace("-", ":", 1), work, peer
        found = prices.setdefault(key, {})
        if log.with_suffix(".json").is_file():
            found[int(layers)] = json.loads(log.with_suffix(".json").read_text())
        else:
            failed[key] = f"{layers} layers: {_said(log)}"
    if not prices:
        raise ValueError(f"{folder} has no <topology>/<peer>-<work>-<layers>.log")
    return [
        Row(topology, peer, work, prices[key], failed.get(key, ""))
        for key in sorted(prices)
        for topology, work, peer in [key]
    ]


def _said(log: Path) -> str:
    """The line of a log that says why, or its last."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    errors = [x for x in lines if "Error" in x.partition(":")[0]]
    return (errors or lines or ["nothing"])[-1][:200].replace("|", "/")


def best(rows: Sequence[Row], topology: str, kind: str) -> Row | None:
    """The mode of Tunix that takes least time a token and fits into memory."""
    chosen = [
        x for x in rows if (x.topology, x.kind, x.peer) == (topology, kind, TUNIX)
    ]
    fitting = [
        x
        for x in chosen
        if x.token_sec and x.value("memory_bytes") <= x.device.hbm_bytes
    ]
    return min(fitting, key=lambda x: x.token_sec, default=None)


def ratio(row: Row, rows: Sequence[Row]) -> float | None:
    """Our time of a token over Tunix's at its best."""
    other = best(rows, row.topology, row.kind)
    if row.peer != OURS or other is None or not row.token_sec:
        return None
    return row.token_sec / other.token_sec


@dataclass(frozen=True)
class Target:
    """What one of our programs is to reach; `most`: at most, else at least."""

    work: str
    name: str
    bound: float
    value: Callable[[Row, Sequence[Row]], float | None]
    most: bool = False
    topology: str = ""  # "" = each


def _step_of_main(row: Row, rows: Sequence[Row]) -> float | None:
    same = [
        x
        for x in rows
        if (x.topology, x.peer, x.work) == (row.topology, OURS, "decode")
    ]
    steps = row.value("seconds"), same and same[0].value("seconds")
    return steps[0] / steps[1] if all(steps) else None


TARGETS = (
    Target("decode", "share of the bandwidth", 0.8, lambda row, _: row.bandwidth),
    Target("decode", "time a token, ours / Tunix", 0.6, ratio, most=True),
    Target(
        "decode_blocks",
        "a step, over one of main streams",
        1.15,
        _step_of_main,
        most=True,
    ),
    Target("decode_blocks", "time a token, ours / Tunix", 0.5, ratio, most=True),
    Target(
        *("update", "MFU before collectives", 0.5),
        lambda row, _: row.over_peak("seconds_before_collectives"),
    ),
    Target(
        *("update", "MFU if none overlaps", 0.42),
        lambda row, _: row.over_peak("seconds_without_overlap"),
    ),
    Target(
        "update",
        "time a token, ours / Tunix",
        0.85,
        ratio,
        most=True,
        topology="v5e:4x4",
    ),
)


def judge(target: Target, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A target on each topology, with what was found; met: None = not found."""
    judged = []
    for row in rows:
        if (row.peer, row.work) != (OURS, target.work):
            continue
        if target.topology not in ("", row.topology):
            continue
        found = target.value(row, rows)
        met = found and (
            found <= target.bound if target.most else found >= target.bound
        )
        judged.append(
            {
                "topology": row.topology,
                "program": row.work.replace("_", " "),
                "target": target.name,
                "bound": f"{'at most' if target.most else 'at least'} {target.bound:g}",
                "found": found,
                "met": {True: "yes", False: "no", None: "not found"}[met],
            }
        )
    return judged


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """All prices at 36 layers, and those that they are made of."""
    return {
        "versions": versions(rows),
        "rows": [
            {
                "topology": row.topology,
                "work": row.work,
                "peer": row.peer,
                "failed": row.failed,
                "ours_over_tunix": ratio(row, rows),
                **{name: row.value(name) for name in ADDED},
                "seconds_by_group": _groups(row),
                **{name: row.any.get(name) for name in ("setting", "mesh", "tokens")},
                "depths": {n: _kept(x) for n, x in row.prices.items()},
            }
            for row in rows
        ],
        "targets": [x for target in TARGETS for x in judge(target, rows)],
    }


def _groups(row: Row) -> dict[str, float | None]:
    names = {name for x in row.prices.values() for name in x["seconds_by_group"]}
    at = lambda name: {
        n: x["seconds_by_group"].get(name, 0.0) for n, x in row.prices.items()
    }
    return {name: at_depth(at(name)) for name in sorted(names)}


def _kept(price: Mapping[str, Any]) -> dict[str, Any]:
    kernels = {x["name"]: x for x in price["kernels"]}
    names = "seconds", "times", "bytes", "source", "peak_share", "bundles", "error"
    return {name: price.get(name) for name in (*ADDED, "compile_sec")} | {
        "kernels": {k: {n: x[n] for n in names} for k, x in kernels.items()}
    }


def versions(rows: Sequence[Row]) -> dict[str, dict[str, str]]:
    """Of packages, by peer.

    Raises:
      ValueError: kept prices are of different versions.
    """
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        for price in row.prices.values():
            known = found.setdefault(row.peer, price["versions"])
            if known != price["versions"]:
                raise ValueError(
                    f"prices of {row.peer} are of {known} and of {price['versions']}: "
                    "make them again (REDO)"
                )
    return found


def markdown(rows: Sequence[Row]) -> str:
    """The table, the targets, and what both are of."""
    depths = {row.work: sorted(row.prices) for row in rows if row.prices}
    said = [f"{work} {' and '.join(map(str, n))}" for work, n in sorted(depths.items())]
    about = (
        f"Qwen3-4B, {LAYERS} layers (compiled: {'; '.join(said)}), bfloat16, one device of "
        "each topology. Tunix with splash attention, remat of layers, fsdp × tp."
    )
    lines = ["# Beside Tunix, by the TPU compiler", "", about, ""]
    for peer, packages in versions(rows).items():
        told = ", ".join(f"{name} {version}" for name, version in packages.items())
        lines.append(f"- {peer}: {told}")
    table = Table("", [_cells(row, rows) for row in rows], NOTE)
    targets = Table("", [x for target in TARGETS for x in judge(target, rows)])
    return "\n".join([*lines, "", table.markdown(), targets.markdown()])


def _cells(row: Row, rows: Sequence[Row]) -> dict[str, Any]:
    scaled = lambda name, factor: row.value(name) and factor * row.value(name)
    mesh = row.any.get("mesh", {})
    over_peak = row.over_peak if row.kind == "update" else lambda name: None
    return {
        "topology": row.topology,
        "program": row.work.replace("_", " "),
        "peer": row.peer,
        "setting": row.any.get("setting", ""),
        "mesh": " × ".join(f"{name} {n}" for name, n in mesh.items() if n > 1),
        "ms": scaled("seconds", 1e3),
        "before collectives": scaled("seconds_before_collectives", 1e3),
        "if none overlaps": scaled("seconds_without_overlap", 1e3),
        "its bytes at the bandwidth": row.floor_sec and 1e3 * row.floor_sec,
        "needed GB": scaled("needed_bytes", 1e-9) or None,
        "bandwidth share": row.bandwidth,
        "MFU before collectives": over_peak("seconds_before_collectives"),
        "MFU if none overlaps": over_peak("seconds_without_overlap"),
        "memory GiB": scaled("memory_bytes", 1 / accelerators.GIB),
        "µs a token": row.token_sec and 1e6 * row.token_sec,
        "ours / Tunix": ratio(row, rows),
        "did not compile": row.failed,
    }


def main() -> None:
    """Writes and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of all prices")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    args = parser.parse_args()
    rows = read_rows(args.folder)
    text = markdown(rows)
    files.write_json_by_key(args.out / "tpu_peers.json", summary(rows))
    files.replace_file(args.out / "tpu_peers.md", text.encode())
    print(text, end="")


if __name__ == "__main__":
    main()
