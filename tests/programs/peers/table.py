"""Sets the results of all rounds side by side: a Markdown table and a JSON summary.

`python -m tests.programs.peers.table FOLDER --out RESULTS` reads
FOLDER/round<n>/<work>-<row>.json, as the workers write them, and writes
RESULTS/peers.md and RESULTS/peers.json. A row is a peer, or a peer in another mode, such
as "trl_eager". A .log without its .json is of a process that failed. A round's seconds
are the median of its repeats; of several rounds stand the median, the least and the
greatest.
"""

import argparse
import json
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pr1_jax.system import files, processor
from pr1_jax.system.tables import Spread, Table

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
class Row:
    """A peer, or a mode of it, at one work."""

    work: str
    name: str  # "trl_eager"
    results: dict[int, dict[str, Any]]  # by round
    failed: list[str]  # logs, relative to the folder of all rounds

    @property
    def peer(self) -> str:
        return self.name.partition("_")[0]

    def spread(self, measure: str, rounds: Sequence[int] = ()) -> Spread:
        """What was measured, round by round; of all rounds by default."""
        rounds = rounds or [*self.results]
        return Spread(tuple(MEASURES[measure](self.results[n]) for n in rounds))


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
    """A row's measure over ours by round; of medians where no round has both."""
    if ours is None or not ours.results or not row.results:
        return None
    if both := [n for n in row.results if n in ours.results]:
        return row.spread(measure, both).over(ours.spread(measure, both))
    return Spread((row.spread(measure).median / ours.spread(measure).median,))


def ours_at(rows: Sequence[Row], work: str) -> Row | None:
    """Our row at a work."""
    return next((row for row in rows if (row.work, row.name) == (work, OURS)), None)


def judge(target: Target, rows: Sequence[Row]) -> dict[str, Any]:
    """A target with what was measured against the peer's best mode; met: None = not."""
    modes = [r for r in rows if (r.work, r.peer) == (target.work, target.peer)]
    modes = [row for row in modes if row.results]
    best = min(modes, key=lambda r: r.spread(target.measure).median, default=None)
    measured = best and ratio(best, ours_at(rows, target.work), target.measure)
    return {
        **vars(target),
        "row": best and best.name,
        "ratio": measured,
        "met": measured and measured.median >= target.least,
    }


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Everything that was measured, by round."""
    return {
        "machine": {
            "cpu": processor.describe()[0],
            "cores": len(os.sched_getaffinity(0)),
        },
        "versions": {
            row.peer: result["version"]
            for row in rows
            for result in row.results.values()
        },
        "rows": [
            {"work": row.work, "row": row.name, "failed": row.failed}
            | {m: row.spread(m).values for m in MEASURES if row.results}
            for row in rows
        ],
    }


def markdown(rows: Sequence[Row]) -> str:
    """The table, the targets, and what both are of."""
    of = summary(rows)
    rounds = {n for row in rows for n in row.results}
    repeats = {len(result["seconds"]) for r in rows for result in r.results.values()}
    about = (
        f"On {of['machine']['cpu']}, {of['machine']['cores']} cores. Medians of "
        f"{' or '.join(map(str, sorted(repeats))) or 0} repeats, then of {len(rounds)} "
        "rounds, with the least and the greatest round in brackets. Times are in "
        "seconds, memory is in MB."
    )
    lines = ["# Beside other libraries", "", about, ""]
    for peer, versions in of["versions"].items():
        packages = ", ".join(f"{name} {version}" for name, version in versions.items())
        lines.append(f"- {peer}: {packages}")
    note = (
        "× ours: the row's time over ours, round by round. The first unit includes what "
        "compiles; from process start, also imports and the loading of weights. A target "
        "is set against a peer's best mode."
    )
    table = Table("", [_cells(row, ours_at(rows, row.work)) for row in rows])
    targets = Table("", [_target(judge(t, rows)) for t in TARGETS], note)
    return "\n".join([*lines, "", table.markdown(), targets.markdown()])


def _cells(row: Row, ours: Row | None) -> dict[str, Any]:
    first = next(iter(row.results.values()), {"checks": {}})
    spread = lambda measure: row.spread(measure) if row.results else None
    unit, peak = spread("unit_sec"), spread("peak_rss_bytes")
    return {
        "work": row.work,
        "row": row.name.replace("_", " "),
        "tokens": first.get("tokens"),
        "micro-batch": first["checks"].get("micro_batch"),
        "unit": unit,
        "tokens/s": unit and first["tokens"] / unit.median,
        "× ours": ratio(row, ours, "unit_sec") if row.name != OURS else None,
        "first unit": spread("first_sec"),
        "from process start": spread("from_start_sec"),
        "second unit": spread("second_sec"),
        "peak memory": peak and peak.times(1e-6),
        "failed": ", ".join(row.failed),
    }


def _target(judged: Mapping[str, Any]) -> dict[str, Any]:
    row = judged["row"] or judged["peer"]
    return {
        "work": judged["work"],
        "target": f"{_NAMES[judged['measure']]}, {row.replace('_', ' ')} over ours",
        "at least": judged["least"],
        "measured": judged["ratio"] or "not measured",
        "met": {True: "yes", False: "no", None: ""}[judged["met"]],
    }


def main() -> None:
    """Writes and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of all rounds")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    args = parser.parse_args()
    rows = read_rows(args.folder)
    text = markdown(rows)
    files.write_json_by_key(args.out / "peers.json", summary(rows))
    files.replace_file(args.out / "peers.md", text.encode())
    print(text, end="")


if __name__ == "__main__":
    main()
