"""Sets the results of all rounds side by side: a Markdown table and a JSON summary.

`python table.py FOLDER --out RESULTS` reads FOLDER/round<n>/<work>-<row>.json, as the
workers write them, and writes RESULTS/peers.md and RESULTS/peers.json. A row is a peer,
or a peer in another mode, such as "trl_eager". A .log without its .json is of a process
that failed. A round's seconds are the median of its repeats; of several rounds stand
the median, the least and the greatest. The standard library is all that it needs.
"""

import argparse
import json
import math
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORKS = ("sampling", "update", "step")
OURS = "ours"

# Of one process, in seconds or bytes.
MEASURES: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "unit_sec": lambda result: statistics.median(result["seconds"]),
    "first_sec": lambda result: result["first_sec"],
    "from_start_sec": lambda result: result["load_sec"] + result["first_sec"],
    "second_sec": lambda result: result["second_sec"],
    "peak_rss_bytes": lambda result: result["peak_rss_bytes"],
}
_NAMES = {
    "unit_sec": "time of a unit",
    "first_sec": "first unit once the model is loaded",
    "from_start_sec": "first unit from the start of the process",
    "peak_rss_bytes": "peak memory",
}


@dataclass(frozen=True)
class Target:
    """At `work`, a peer is to need at least `least` times our `measure`."""

    work: str
    measure: str
    peer: str
    least: float


TARGETS = (
    Target("sampling", "unit_sec", "tunix", 2.5),
    Target("sampling", "unit_sec", "trl", 3.0),
    Target("update", "unit_sec", "tunix", 2.0),
    Target("update", "unit_sec", "trl", 1.4),
    Target("step", "unit_sec", "tunix", 3.0),
    Target("step", "unit_sec", "trl", 3.0),
    Target("step", "first_sec", "tunix", 1.0),
    Target("step", "from_start_sec", "tunix", 1.0),
    Target("update", "peak_rss_bytes", "tunix", 1.0),
    Target("update", "peak_rss_bytes", "trl", 1.0),
)


@dataclass(frozen=True)
class Spread:
    """Of a value in several rounds, or of a ratio of two."""

    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Row:
    """A peer, or a mode of it, at one work."""

    work: str
    name: str  # "trl_eager"
    results: dict[int, dict[str, Any]]  # by round
    failed: list[str]  # logs, relative to the folder of all rounds

    @property
    def peer(self) -> str:
        return self.name.partition("_")[0]

    @property
    def title(self) -> str:
        return self.name.replace("_", " ")

    def values(self, measure: str) -> dict[int, float]:
        """What was measured, by round."""
        return {n: MEASURES[measure](result) for n, result in self.results.items()}

    def spread(self, measure: str) -> Spread:
        return Spread.of(list(self.values(measure).values()))

    @property
    def tokens_per_sec(self) -> float:
        tokens = next(iter(self.results.values()))["tokens"]
        return tokens / self.spread("unit_sec").median


def read_rows(folder: Path) -> list[Row]:
    """All rows, ours first at each work.

    Raises:
      ValueError: there is none, or rows of one work differ in their tokens.
    """
    rows: dict[tuple[str, str], Row] = {}
    for log in sorted(folder.glob("round*/*.log"), key=_round):
        work, _, name = log.stem.partition("-")
        row = rows.setdefault((work, name), Row(work, name, {}, []))
        if (result := _read(log.with_suffix(".json"))) is None:
            row.failed.append(str(log.relative_to(folder)))
        else:
            row.results[_round(log)] = result
    if not rows:
        raise ValueError(f"{folder} has no round<n>/<work>-<row>.log")
    results = [result for row in rows.values() for result in row.results.values()]
    for work in WORKS:
        found = {result["tokens"] for result in results if result["work"] == work}
        if len(found) > 1:
            raise ValueError(f"{folder}: {work} of {sorted(found)} tokens")
    order = lambda row: (WORKS.index(row.work), row.name != OURS, row.name)
    return sorted(rows.values(), key=order)


def _round(log: Path) -> int:
    return int(log.parent.name.removeprefix("round"))


def _read(file: Path) -> dict[str, Any] | None:
    """A worker's result; None where it wrote none, or not all of it."""
    try:
        return json.loads(file.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def ratio(row: Row, ours: Row | None, measure: str) -> Spread | None:
    """A row's measure over ours: the ratio of medians, and the range over rounds."""
    if ours is None or not ours.results or not row.results:
        return None
    mine, others = ours.values(measure), row.values(measure)
    medians = row.spread(measure).median / ours.spread(measure).median
    both = [others[n] / mine[n] for n in others if n in mine] or [medians]
    return Spread(medians, min(both), max(both))


def find(rows: Sequence[Row], work: str, name: str) -> Row | None:
    return next((r for r in rows if (r.work, r.name) == (work, name)), None)


def judge(target: Target, rows: Sequence[Row]) -> dict[str, Any]:
    """A target with what was measured against the peer's best mode; met: None = not."""
    modes = [r for r in rows if (r.work, r.peer) == (target.work, target.peer)]
    modes = [row for row in modes if row.results]
    best = min(modes, key=lambda r: r.spread(target.measure).median, default=None)
    found = None
    if best is not None:
        found = ratio(best, find(rows, target.work, OURS), target.measure)
    return {
        **vars(target),
        "row": best.name if best else None,
        "ratio": vars(found) if found else None,
        "met": found.median >= target.least if found else None,
    }


def machine() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                break
    except OSError:
        pass  # not Linux
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0))}


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """All that the table shows, by round where it was measured by round."""
    return {
        "machine": machine(),
        "versions": {
            row.peer: result["version"]
            for row in rows
            for result in row.results.values()
        },
        "rows": [_summary_of(row, find(rows, row.work, OURS)) for row in rows],
        "targets": [judge(target, rows) for target in TARGETS],
    }


def _summary_of(row: Row, ours: Row | None) -> dict[str, Any]:
    found = {"work": row.work, "row": row.name, "failed": row.failed}
    if not row.results:
        return found
    results = list(row.results.values())
    found |= {
        "repeats": len(results[0]["seconds"]),
        "tokens": results[0]["tokens"],
        "tokens_per_sec": row.tokens_per_sec,
        "micro_batch": results[0]["checks"].get("micro_batch"),
    }
    for measure in MEASURES:
        spread = vars(row.spread(measure))
        found[measure] = spread | {"rounds": row.values(measure)}
        if row.name != OURS and (to_ours := ratio(row, ours, measure)):
            found[measure]["to_ours"] = vars(to_ours)
    return found


def markdown(rows: Sequence[Row]) -> str:
    """The table, the targets, and what both are of."""
    found = summary(rows)
    rounds = {n for row in rows for n in row.results}
    repeats = {len(result["seconds"]) for r in rows for result in r.results.values()}
    about = (
        f"On {found['machine']['cpu']}, {found['machine']['cores']} cores. Medians of "
        f"{_list(repeats)} repeats, then of {len(rounds)} rounds, with the least and "
        "the greatest round in brackets. Times are in seconds, memory is in MB."
    )
    lines = ["# Beside other libraries", "", about, ""]
    for peer, versions in found["versions"].items():
        packages = ", ".join(f"{name} {version}" for name, version in versions.items())
        lines.append(f"- {peer}: {packages}")
    head = ("work", "row", "tokens", "micro-batch", "unit", "tokens/s", "× ours")
    head += ("first unit", "from process start", "second unit", "peak memory")
    body = [_cells(row, find(rows, row.work, OURS)) for row in rows]
    targets = [_target_cells(target) for target in found["targets"]]
    head_of_targets = ("work", "target", "at least", "measured", "met")
    return (
        "\n".join(lines)
        + f"\n\n{_table(head, body)}\n{_table(head_of_targets, targets)}\n"
        + "× ours: the row's time over ours, of medians; over rounds in brackets. The "
        "first unit includes what compiles; from process start, also imports and the "
        "loading of weights. A target is set against a peer's best mode.\n"
    )


def _cells(row: Row, ours: Row | None) -> list[str]:
    failed = f"failed: {', '.join(row.failed)}" if row.failed else ""
    if not row.results:
        return [row.work, row.title, "", "", failed, *[""] * 6]
    result = next(iter(row.results.values()))
    unit = _spread(row.spread("unit_sec")) + (f"; {failed}" if failed else "")
    to_ours = ratio(row, ours, "unit_sec") if row.name != OURS else None
    return [
        row.work,
        row.title,
        str(result["tokens"]),
        str(result["checks"].get("micro_batch", "")),
        unit,
        _number(row.tokens_per_sec),
        _spread(to_ours) if to_ours else "",
        _spread(row.spread("first_sec")),
        _spread(row.spread("from_start_sec")),
        _spread(row.spread("second_sec")),
        _spread(row.spread("peak_rss_bytes"), 1e6),
    ]


def _target_cells(target: Mapping[str, Any]) -> list[str]:
    row = target["row"] or target["peer"]
    found = target["ratio"]
    return [
        target["work"],
        f"{_NAMES[target['measure']]}, {row.replace('_', ' ')} over ours",
        f"{target['least']:g}",
        _spread(Spread(**found)) if found else "not measured",
        {True: "yes", False: "no", None: ""}[target["met"]],
    ]


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _list(values: set[int]) -> str:
    return " or ".join(map(str, sorted(values))) or "0"


def _spread(spread: Spread, unit: float = 1.0) -> str:
    median, least, greatest = (
        _number(x / unit) for x in (spread.median, spread.least, spread.greatest)
    )
    return median if least == greatest else f"{median} ({least}–{greatest})"


def _number(x: float) -> str:
    """Three digits, or all that stand before the point."""
    return f"{x:.{max(0, 2 - math.floor(math.log10(x)))}f}" if x > 0 else f"{x:g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of all rounds")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    args = parser.parse_args()
    rows = read_rows(args.folder)
    text = markdown(rows)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "peers.json").write_text(json.dumps(summary(rows), indent=1) + "\n")
    (args.out / "peers.md").write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
