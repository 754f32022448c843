"""What one run came to: read from its folder, or from the small file that keeps it.

A run is tens of MB. `OUT/found/seed<k>.json` keeps of each cell that is finished at a seed
what is told of it, in less than a thousand bytes a cell: how many responses to each
held-out problem are right and have a block, a few means, courses of training at `POINTS`
points, and digests of all responses and of all metrics, by which a run that is made again
is compared to the last bit. With these files a study goes on where its runs are not. They
also have the commits and versions that made them, and `OUT/found/settings.json` what the
runs were made with; where today's settings are others, they are refused.
"""

import base64
import dataclasses
import hashlib
import importlib.metadata
import json
import pathlib
import platform
import subprocess
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pr1_jax.report import analysis
from pr1_jax.study import cells, folder
from pr1_jax.study.cells import Cell
from pr1_jax.study.folder import Study
from pr1_jax.system import files, processor

POINTS = 30  # of a course, at most: means over steps that follow each other

# Whether a response counts, by the fields of its record.
_OF_RESPONSES = {
    "accuracy": lambda r: r["verdict"] == "correct",
    "parallel_ratio": lambda r: r["num_blocks"] > 0,
}
SHARES = tuple(_OF_RESPONSES)
LENGTHS = ("total_tokens", "sequential_steps")
OF_BLOCKS = ("work_division", "identical_paths")
BEFORE = tuple(f"before_{name}" for name in SHARES)  # where it started, evaluated alike
# Of planned blocks alone: the mean number of their paths, and of searches that a response
# makes at once, which are the paths of its blocks, or one where it has none.
PATHS, SEARCHES = "num_paths", "searches"

_OF_STEPS = (*SHARES, *OF_BLOCKS)  # figures of an RL step
GAP, POSITION = "gap_mean", "position"  # and these, of the cells that show them
# What is compared of a step: not what took how long.
_COMPARED = ("rollout/", "reward/", "policy/", "loss/", "optim/")
_COMMON, _MAKERS = "common", "makers"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
      digests: SHA-256 of the held-out questions, of the responses to them, and of the
        metrics of all steps.
      samples: responses to a problem.
      counts: of `SHARES`: uint8 [P], how many of a problem's responses count.
      means: of all other metrics; NaN where a run has none.
      courses: figure -> float16 [points], NaN where no step of a point has one; of RL.
      steps: of RL.
    """

    digests: Mapping[str, str]
    samples: int
    counts: Mapping[str, np.ndarray]
    means: Mapping[str, float]
    courses: Mapping[str, np.ndarray]
    steps: int

    @property
    def problems(self) -> dict[str, np.ndarray]:
        """All metrics: float [P] where problems are known, else [1]."""
        shares = {name: count / self.samples for name, count in self.counts.items()}
        return shares | {name: np.array([x]) for name, x in self.means.items()}


def differences(first: Outcome, second: Outcome) -> list[str]:
    """Names of what two outcomes do not share to the last bit."""
    names = dict.fromkeys([*first.digests, *second.digests])
    return [n for n in names if first.digests.get(n) != second.digests.get(n)]


def read(study: Study, cell: Cell, seed: int) -> Outcome | None:
    """What a finished run came to, in its folder or as it is kept; None if neither.

    Raises:
      ValueError: what is kept was made with other settings.
    """
    workdir = study.workdir(cell.name, seed)
    here = folder.is_finished(workdir)
    return of_run(workdir, cell) if here else kept(study, cell, seed)


# --- Runs -----------------------------------------------------------------------------


def of_run(workdir: pathlib.Path, cell: Cell) -> Outcome:
    """What a finished run came to, from its records."""
    path = workdir / "rollouts" / f"eval_1_{cell.kind}.jsonl"
    if cell.kind == "evaluate":
        path = workdir / "samples" / f"hard_{cell.changes['eval.modes'][0]}.jsonl"
    records, is_rl = files.read_json_lines(path), cell.kind == "rl"
    samples = files.read_json(workdir / "config.json", {})["eval"]["samples"]
    lines = files.read_json_lines(workdir / "metrics.jsonl")
    lines = [line for line in lines if line["stage"] == cell.kind]
    said = ("response", "verdict", *LENGTHS)
    compared = lambda line: {n: x for n, x in line.items() if n.startswith(_COMPARED)}
    digests = {
        "questions": [record["question"] for record in records[::samples]],
        "responses": [[record[name] for name in said] for record in records],
        "steps": [*map(compared, lines)],
    }
    counts = {
        name: np.array([*map(does_count, records)], np.uint8).reshape(-1, samples)
        for name, does_count in _OF_RESPONSES.items()
    }
    return Outcome(
        {name: _digest(values) for name, values in digests.items()},
        samples,
        {name: x.sum(axis=1, dtype=np.uint8) for name, x in counts.items()},
        _means(records, cell) | (_before(workdir, cell) if is_rl else {}),
        _courses(workdir, cell, lines),
        len(lines) if is_rl else 0,
    )


def _digest(values: Any) -> str:
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _means(records: Sequence[Mapping[str, Any]], cell: Cell) -> dict[str, float]:
    """Means over responses, and over blocks."""
    means = {name: [record[name] for record in records] for name in LENGTHS}
    for name in (*OF_BLOCKS, *(PATHS,) * cell.planned):
        means[name] = [x for record in records for x in record.get(name, ())]
    if cell.planned:
        means[SEARCHES] = [np.mean(record.get(PATHS) or [1]) for record in records]
    rounded = lambda x: float(f"{x:.5g}")
    return {n: rounded(_mean(np.array(x, float))) for n, x in means.items()}


def _before(workdir: pathlib.Path, cell: Cell) -> dict[str, float]:
    """What it was evaluated at before its first step."""
    evaluations = files.read_json(workdir / "summary.json", {})["evaluations"]
    found = evaluations.get("eval_0_base", {})
    names = (*BEFORE, *(f"before_{PATHS}",) * cell.planned)
    return {n: found.get(f"eval/{n[7:]}", float("nan")) for n in names}


def _courses_of(cell: Cell) -> tuple[str, ...]:
    """Names of the courses of a cell."""
    if cell.kind != "rl":
        return ()
    shown = (GAP,) * (cell.name in cells.MEMBERS["shortcuts"])
    late, planned = (POSITION,) * (cell.start == "sft_late"), (PATHS,) * cell.planned
    return (*_OF_STEPS, *shown, *late, *planned)


def _courses(
    workdir: pathlib.Path, cell: Cell, lines: Sequence[Mapping[str, Any]]
) -> dict[str, np.ndarray]:
    """Figures of all RL steps, float16 [points] each."""
    known = lambda x: np.nan if x is None else x
    courses = {}
    for name in _courses_of(cell):
        key = "rollout/logp_gap_mean" if name == GAP else f"rollout/{name}"
        courses[name] = [known(line.get(key)) for line in lines]
    if POSITION in courses:
        paths = (
            workdir / "rollouts" / f"rl_{line['step']:06d}.jsonl" for line in lines
        )
        starts = map(analysis.relative_positions, map(files.read_json_lines, paths))
        courses[POSITION] = [_mean(np.array(x, float)) for x in starts]
    return {name: thinned(values) for name, values in courses.items()}


def thinned(course: Sequence[float], points: int = POINTS) -> np.ndarray:
    """Means over as many steps as `steps_a_point` says, float16 [points]."""
    width = steps_a_point(len(course), points)
    pieces = (course[i : i + width] for i in range(0, len(course), width))
    return np.array([_mean(np.array(x, float)) for x in pieces], np.float16)


def steps_a_point(steps: int, points: int = POINTS) -> int:
    """Steps that a point of a course is the mean of."""
    return max(1, -(-steps // points))


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")


# --- Files that keep them -------------------------------------------------------------


def kept(study: Study, cell: Cell, seed: int) -> Outcome | None:
    """What is kept of a run, if it is.

    Raises:
      ValueError: it, or what is kept beside it, was made with other settings.
    """
    record, settings = records(study, seed).get(cell.name), _kept_settings(study)
    compared = [(_COMMON, _common(study))]
    if record:
        compared.append((cell.name, _settings(study, cell)))
    for key, now in compared:
        then = settings.get(key, now if key == _COMMON else {})
        for name in dict.fromkeys([*then, *now]):
            was, is_now = then.get(name, "absent"), now.get(name, "absent")
            if was != is_now:
                who = "all runs were" if key == _COMMON else f"{key} was"
                raise ValueError(
                    f"{study.kept_settings}: {who} made with {name}={was}, which is "
                    f"{is_now} now; to run anew what is kept, remove it from all files there"
                )
    if record is None:
        return None
    nan = lambda x: float("nan") if x is None else x
    counts = unpack(record["counts"], "u1").reshape(len(SHARES), -1)
    names = _courses_of(cell)
    courses = unpack(record["courses"], "<f2").reshape(len(names), -1) if names else ()
    return Outcome(
        record["digests"],
        record["samples"],
        dict(zip(SHARES, counts)),
        {name: nan(x) for name, x in record["means"].items()},
        dict(zip(names, courses)),
        record["steps"],
    )


def keep(
    study: Study,
    cell: Cell,
    seed: int,
    *,
    seconds: float | None,
    made: Mapping[str, str],
) -> list[str]:
    """Keeps what a finished run came to; names of what was kept, and differs."""
    before, known = kept(study, cell, seed), records(study, seed)
    outcome = of_run(study.workdir(cell.name, seed), cell)
    settings = _kept_settings(study)
    settings |= {_COMMON: _common(study), cell.name: _settings(study, cell)}
    files.write_json_by_key(study.kept_settings, settings)
    makers = known.get(_MAKERS, [])
    if dict(made) not in makers:
        makers.append(dict(made))
    known[cell.name] = {
        "maker": makers.index(dict(made)),
        "seconds": seconds,
        "digests": dict(outcome.digests),
        "samples": outcome.samples,
        "counts": pack(np.stack([*outcome.counts.values()])),
        "means": dict(outcome.means),
        "courses": pack(np.array([*outcome.courses.values()], np.float16)),
        "steps": outcome.steps,
    }
    in_order = {name: known[name] for name in cells.CELLS if name in known}
    files.write_json_by_key(study.kept(seed), {_MAKERS: makers, **in_order})
    return differences(before, outcome) if before else []


def keep_finished(study: Study) -> None:
    """Keeps what is finished and is not kept yet, whatever commit made it."""
    for seed in study.seeds:
        known = records(study, seed)
        for name, cell in cells.CELLS.items():
            if name not in known and folder.is_finished(study.workdir(name, seed)):
                keep(study, cell, seed, seconds=None, made={"commit": "unknown"})


def of_dense(study: Study) -> list[dict[str, float]]:
    """The figures of `pr1_jax.study.dense` by length, or none.

    Raises:
      ValueError: they are of other lengths.
    """
    known = files.read_json(study.dense, [])
    if known and known[-1]["tokens"] != study.dense_tokens:
        raise ValueError(
            f"{study.dense} was made with --max={known[-1]['tokens']}, "
            f"and --size={study.size} asks for {study.dense_tokens}"
        )
    return known


def records(study: Study, seed: int) -> dict[str, Any]:
    """All that is kept of a seed, as JSON: by cell, and what they share."""
    return files.read_json(study.kept(seed), {})


def seconds(study: Study, seed: int) -> dict[str, float]:
    """What the kept runs of a seed took, by cell."""
    found = {n: x for n, x in records(study, seed).items() if n in cells.CELLS}
    return {n: x["seconds"] for n, x in found.items() if x["seconds"] is not None}


def makers(study: Study, seed: int) -> list[dict[str, str]]:
    """The commits, processors and versions that made what is kept of a seed."""
    return records(study, seed).get(_MAKERS, [])


def pack(values: np.ndarray) -> str:
    """Numbers as short text that reads as the same bits."""
    size = values.dtype.itemsize
    shuffled = values.ravel().view(np.uint8).reshape(-1, size).T  # like by like
    return base64.b85encode(zlib.compress(shuffled.tobytes(), 9)).decode()


def unpack(text: str, dtype: str) -> np.ndarray:
    """The numbers [N], little-endian, that `pack` was given."""
    shuffled = np.frombuffer(zlib.decompress(base64.b85decode(text)), np.uint8)
    size = np.dtype(dtype).itemsize
    return np.ascontiguousarray(shuffled.reshape(size, -1).T).view(dtype).ravel()


# --- What they were made with ---------------------------------------------------------


def _common(study: Study) -> dict[str, Any]:
    """What all runs of a study are made with today, as JSON."""
    given = {"size": study.size, "overrides": list(study.overrides)}
    return files.plain(given | cells.COMMON)


def _kept_settings(study: Study) -> dict[str, Any]:
    """What kept runs were made with, of all seeds: by cell, and what they share."""
    return files.read_json(study.kept_settings, {})


def _settings(study: Study, cell: Cell) -> dict[str, Any]:
    """What a run of the cell is made with beside it."""
    given = {"config": cell.config, "start": cell.start}
    return files.plain(given | cells.own_changes(cell, study.size))


def made() -> dict[str, str]:
    """The commit, processor and versions that figures depend on."""
    names = ("jax", "flax", "optax")
    return {
        "commit": _commit(),
        "processor": _processor(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in names},
    }


def _processor() -> str:
    """The processor that XLA compiles for: others round otherwise, and draw otherwise."""
    name, known = processor.describe()
    vectors = ("avx512f", "avx2", "sve", "asimd")
    widest = next((x for x in vectors if x in known.split()), "")
    return " ".join(filter(None, (platform.machine(), name, widest)))


def made_elsewhere(study: Study, cell: Cell, seed: int) -> list[str]:
    """What differs here from the processor and versions that made a kept run."""
    found = records(study, seed)
    then = found[_MAKERS][found[cell.name]["maker"]] if cell.name in found else {}
    return [
        f"{name} {then[name]}, not {here}"
        for name, here in made().items()
        if name != "commit" and then.get(name, here) != here
    ]


def _commit() -> str:
    """The commit that the working tree is at; `+ changes` where its code differs."""

    def git(*arguments: str) -> str:
        command, options = ["git", *arguments], {"capture_output": True, "text": True}
        done = subprocess.run(command, cwd=folder.ROOT, check=True, **options)
        return done.stdout.strip()

    try:
        code = ("--", "pr1_jax", "configs")  # a study may be in the working tree
        changed = git("status", "--porcelain", "--untracked-files=no", *code)
        commit = git("rev-parse", "--short=12", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + (" + changes" if changed else "")
