"""What one run came to: read from its folder, or from the small file that keeps it.

A run is tens of MB, most of them checkpoints. `OUT/found/seed<k>.json` keeps of each cell
that is finished at a seed all that is read of its run, a line a cell, every number as
exact as it was: with these files a study goes on where its runs are not. A line also has
the commit and versions that made it and the settings of its run; where today's are
others, it is refused.
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
from collections.abc import Mapping
from typing import Any

import numpy as np

from pr1_jax.report import analysis
from pr1_jax.study import cells, folder
from pr1_jax.study.cells import Cell
from pr1_jax.study.folder import Study
from pr1_jax.system import files, processor

# Figures of a response, by the fields of its record.
_OF_RESPONSES = {
    "accuracy": lambda r: r["verdict"] == "correct",
    "parallel_ratio": lambda r: r["num_blocks"] > 0,
    "total_tokens": lambda r: r["total_tokens"],
    "sequential_steps": lambda r: r["sequential_steps"],
}
METRICS = tuple(_OF_RESPONSES)

# Figures of an RL step, by the metric of its line.
_OF_STEPS = {
    "accuracy": "rollout/accuracy",
    "parallel_ratio": "rollout/parallel_ratio",
    "gap_mean": "rollout/logp_gap_mean",
}
POSITION = "position"  # and this one, of the step's responses
UNKNOWN = {"commit": "unknown"}  # what made a run that was not kept as it ended


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
      questions: SHA-256 of the held-out questions in their order.
      problems: metric -> float [P], means over a problem's responses.
      courses: figure -> float [steps], NaN where a step has none; of RL alone.
      switch: `reward.scaffold_steps` of its config.
    """

    questions: str
    problems: Mapping[str, np.ndarray]
    courses: Mapping[str, np.ndarray]
    switch: int


def differences(first: Outcome, second: Outcome) -> list[str]:
    """Names of the figures that two outcomes do not share to the last bit."""
    differing = [] if first.questions == second.questions else ["questions"]
    for kind in ("problems", "courses"):
        one, other = getattr(first, kind), getattr(second, kind)
        for name in dict.fromkeys([*one, *other]):
            both = name in one and name in other
            if not both or not np.array_equal(one[name], other[name], equal_nan=True):
                differing.append(f"{name} of {kind}")
    return differing


def read(study: Study, cell: Cell, seed: int) -> Outcome | None:
    """What a finished run came to, in its folder or as it is kept; None if neither.

    Raises:
      ValueError: what is kept was made with other settings.
    """
    workdir = study.workdir(cell, seed)
    return (
        of_run(workdir, cell)
        if folder.is_finished(workdir)
        else kept(study, cell, seed)
    )


# --- Runs -----------------------------------------------------------------------------


def of_run(workdir: pathlib.Path, cell: Cell) -> Outcome:
    """What a finished run came to, from its records."""
    if cell.kind == "evaluate":
        (mode,) = cell.changes["eval.modes"]
        path = workdir / "samples" / f"hard_{mode}.jsonl"
    else:
        path = workdir / "rollouts" / f"eval_1_{cell.kind}.jsonl"
    records = files.read_json_lines(path)
    config = files.read_json(workdir / "config.json", {})
    samples = config["eval"]["samples"]

    def by_problem(figure) -> np.ndarray:
        values = np.array([figure(record) for record in records], float)
        return values.reshape(-1, samples).mean(axis=1)

    questions = json.dumps([record["question"] for record in records[::samples]])
    return Outcome(
        hashlib.sha256(questions.encode()).hexdigest(),
        {name: by_problem(figure) for name, figure in _OF_RESPONSES.items()},
        _courses(workdir, cell) if cell.kind == "rl" else {},
        config.get("reward", {}).get("scaffold_steps", 0),
    )


def _courses(workdir: pathlib.Path, cell: Cell) -> dict[str, np.ndarray]:
    """Figures of all RL steps, [steps] each."""
    lines = files.read_json_lines(workdir / "metrics.jsonl")
    lines = [line for line in lines if line["stage"] == "rl"]
    known = lambda x: np.nan if x is None else x
    courses = {
        name: np.array([known(line.get(key)) for line in lines], float)
        for name, key in _OF_STEPS.items()
    }
    if cell.name in cells.MEMBERS["position"]:
        paths = (
            workdir / "rollouts" / f"rl_{line['step']:06d}.jsonl" for line in lines
        )
        starts = map(analysis.relative_positions, map(files.read_json_lines, paths))
        courses[POSITION] = np.array([np.mean(x) if x else np.nan for x in starts])
    return courses


# --- Files that keep them -------------------------------------------------------------


def kept(study: Study, cell: Cell, seed: int) -> Outcome | None:
    """What is kept of a run, if it is.

    Raises:
      ValueError: it was made with other settings.
    """
    record = records(study, seed).get(cell.name)
    if record is None:
        return None
    for name, now in _settings(study, cell, seed).items():
        was = record["settings"].get(name, now)  # a field of today alone is new
        if was != now:
            raise ValueError(
                f"{study.kept(seed)}: {cell.name} seed {seed} was made with "
                f"{name}={was}, which is {now} now; remove its line to run it again"
            )
    problems, courses = (
        {name: unpack(values) for name, values in record[kind].items()}
        for kind in ("problems", "courses")
    )
    return Outcome(record["questions"], problems, courses, record["switch"])


def keep(
    study: Study,
    cell: Cell,
    seed: int,
    *,
    seconds: float | None,
    made: Mapping[str, str],
) -> list[str]:
    """Keeps what a finished run came to; names of what was kept, and differs."""
    outcome, before = of_run(study.workdir(cell, seed), cell), kept(study, cell, seed)
    known = records(study, seed)
    known[cell.name] = {
        "made": dict(made),
        "settings": _settings(study, cell, seed),
        "seconds": seconds,
        "questions": outcome.questions,
        "problems": {n: pack(x) for n, x in outcome.problems.items()},
        "courses": {n: pack(x) for n, x in outcome.courses.items()},
        "switch": outcome.switch,
    }
    in_order = {name: known[name] for name in cells.CELLS if name in known}
    files.write_json_by_key(study.kept(seed), in_order)
    return differences(before, outcome) if before else []


def keep_finished(study: Study, seconds: Mapping[str, float]) -> None:
    """Keeps what is finished and is not kept yet, whatever commit made it.

    Args:
      seconds: that runs took, by `cell/seedK`.
    """
    for seed in study.seeds:
        known = records(study, seed)
        for name, cell in cells.CELLS.items():
            if name not in known and folder.is_finished(study.workdir(cell, seed)):
                took = seconds.get(f"{name}/seed{seed}")
                keep(study, cell, seed, seconds=took, made=UNKNOWN)


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
    """All that is kept of a seed, by cell, as JSON."""
    return files.read_json(study.kept(seed), {})


def pack(values: np.ndarray) -> str:
    """Floats [N] as short text that reads as the same bits."""
    shuffled = values.astype("<f8").view(np.uint8).reshape(-1, 8).T  # like by like
    return base64.b85encode(zlib.compress(shuffled.tobytes(), 9)).decode()


def unpack(text: str) -> np.ndarray:
    """The floats [N] that `pack` was given."""
    shuffled = np.frombuffer(zlib.decompress(base64.b85decode(text)), np.uint8)
    return np.ascontiguousarray(shuffled.reshape(8, -1).T).view("<f8").ravel()


# --- What they were made with ---------------------------------------------------------


def _settings(study: Study, cell: Cell, seed: int) -> dict[str, Any]:
    """What a run of the cell is made with today, as JSON; fields of its config by name."""
    return {
        "size": study.size,
        "overrides": list(study.overrides),
        "config file": cells.config_argument(cell, study.size),
        "start": cells.start_of(cell, study.size),
        **files.plain(cells.changes(cell, study.size, seed)),
    }


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
    then = records(study, seed).get(cell.name, {}).get("made", {})
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
