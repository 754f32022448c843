"""What one run came to: read from its folder, or from the small file that keeps it.

A run is tens of MB, most of them checkpoints. `OUT/found/seed<k>.json` keeps of each cell
that is finished at a seed all that is read of its run, a line a cell, every number as
exact as it was: with these files a study goes on where its runs are not. A line also has
the commit and versions that made it, and the settings of its run as its own config.json
has them; one of other settings than today's is refused.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import pathlib
import platform
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pr1_jax.report import analysis
from pr1_jax.study import cells, places
from pr1_jax.study.cells import Cell
from pr1_jax.study.places import Study
from pr1_jax.system import files, processor
from pr1_jax.workdir import metrics

# Figures of a response, by the field of its record.
_OF_RESPONSES = {
    "accuracy": lambda r: r["verdict"] == "correct",
    "parallel_ratio": lambda r: r["num_blocks"] > 0,
    "total_tokens": lambda r: r["total_tokens"],
    "sequential_steps": lambda r: r["sequential_steps"],
}
METRICS = tuple(_OF_RESPONSES)

# Figures of an RL step.
_OF_STEPS = {
    "accuracy": "rollout/accuracy",
    "parallel_ratio": "rollout/parallel_ratio",
    "gap_max": "rollout/logp_gap_max",
    "gap_mean": "rollout/logp_gap_mean",
}
POSITION = "position"  # and this one, of its responses

# Fields that configs did not always have: what runs did before.
_BEFORE = {
    "kernels": "xla",
    "rl.shared_prompt_tokens": [],
}
# Fields that have another name today.
_RENAMED = {"model.kernels": "kernels", "rollout.kernels": "kernels"}
_OWN = ("size", "overrides", "config file", "start")  # settings that no config has
_NOT_SET = "not set"
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
    """Names of what two outcomes do not agree in to the last bit."""
    found = [] if first.questions == second.questions else ["questions"]
    for kind in ("problems", "courses"):
        one, other = getattr(first, kind), getattr(second, kind)
        for name in dict.fromkeys([*one, *other]):
            both = name in one and name in other
            if not both or not np.array_equal(one[name], other[name], equal_nan=True):
                found.append(f"{name} of {kind}")
    return found


def of_seed(study: Study, seed: int) -> dict[str, Outcome]:
    """All cells that are finished at a seed: their runs, else what is kept of them.

    Raises:
      ValueError: what is kept was made with other settings.
    """
    records, found = _records(study, seed), {}
    for name, cell in cells.CELLS.items():
        workdir = study.workdir(cell, seed)
        if places.is_finished(workdir):
            found[name] = of_run(workdir, cell)
        elif name in records:
            _check(study, cell, seed, records[name])
            found[name] = _unpacked(records[name])
    return found


# --- Runs -----------------------------------------------------------------------------


def of_run(workdir: pathlib.Path, cell: Cell) -> Outcome:
    """What a finished run came to."""
    if cell.kind == "evaluate":
        (mode,) = cell.changes["eval.modes"]
        path = workdir / "samples" / f"hard_{mode}.jsonl"
    else:
        path = workdir / "rollouts" / f"eval_1_{cell.kind}.jsonl"
    records = metrics.read_metrics(path)
    config = files.read_json(workdir / "config.json", {})
    samples = config["eval"]["samples"]
    mean = lambda f: (
        np.array([f(r) for r in records], float).reshape(-1, samples).mean(1)
    )
    questions = json.dumps([r["question"] for r in records[::samples]])
    in_position = cell.name in cells.MEMBERS["position"]
    return Outcome(
        hashlib.sha256(questions.encode()).hexdigest(),
        {name: mean(figure) for name, figure in _OF_RESPONSES.items()},
        _course(workdir, in_position) if cell.kind == "rl" else {},
        config.get("reward", {}).get("scaffold_steps", 0),
    )


def _course(workdir: pathlib.Path, positions: bool) -> dict[str, np.ndarray]:
    """Figures of all RL steps, [steps] each."""
    lines = metrics.read_metrics(workdir / "metrics.jsonl")
    lines = [line for line in lines if line["stage"] == "rl"]
    found = {
        name: _array([line.get(key) for line in lines])
        for name, key in _OF_STEPS.items()
    }
    if positions:
        steps = [
            analysis.relative_positions(
                metrics.read_metrics(
                    workdir / "rollouts" / f"rl_{line['step']:06d}.jsonl"
                )
            )
            for line in lines
        ]
        found[POSITION] = np.array([np.mean(x) if x else np.nan for x in steps])
    return found


# --- Files that keep them -------------------------------------------------------------


def kept(study: Study, cell: Cell, seed: int) -> Outcome | None:
    """What is kept of a run, if it is.

    Raises:
      ValueError: it was made with other settings.
    """
    record = _records(study, seed).get(cell.name)
    if record is None:
        return None
    _check(study, cell, seed, record)
    return _unpacked(record)


def keep(
    study: Study,
    cell: Cell,
    seed: int,
    *,
    seconds: float | None,
    made: Mapping[str, str],
) -> list[str]:
    """Keeps what a finished run came to; names of what was kept, and differs."""
    workdir = study.workdir(cell, seed)
    outcome = of_run(workdir, cell)
    config = files.read_json(workdir / "config.json", {})
    settings = {
        name: value if name in _OWN else _field(config, name)
        for name, value in _settings(study, cell, seed).items()
    }
    records = _records(study, seed)
    before = records.get(cell.name)
    records[cell.name] = {
        "made": dict(made),
        "settings": {n: value for n, value in settings.items() if value != _NOT_SET},
        "seconds": seconds,
        "questions": outcome.questions,
        "problems": {n: _packed(x) for n, x in outcome.problems.items()},
        "courses": {n: _packed(x) for n, x in outcome.courses.items()},
        "switch": outcome.switch,
    }
    lines = [
        f"{json.dumps(name)}: {json.dumps(records[name], separators=(',', ':'))}"
        for name in cells.CELLS
        if name in records
    ]
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    files.replace_file(study.kept(seed), text.encode())
    return differences(_unpacked(before), outcome) if before else []


def keep_finished(study: Study, seconds: Mapping[str, float]) -> None:
    """Keeps what is finished and is not kept yet, whatever commit made it.

    Args:
      seconds: that runs took, by `cell/seedK`.
    """
    for seed in study.seeds:
        records = _records(study, seed)
        for name, cell in cells.CELLS.items():
            if name not in records and places.is_finished(study.workdir(cell, seed)):
                took = seconds.get(f"{name}/seed{seed}")
                keep(study, cell, seed, seconds=took, made=UNKNOWN)
    if study.dense.exists() and not study.kept_dense.exists():
        keep_dense(study)


def kept_seconds(study: Study) -> dict[str, float]:
    """What runs took that are kept, by `cell/seedK`."""
    return {
        f"{name}/seed{seed}": record["seconds"]
        for seed in study.seeds
        for name, record in _records(study, seed).items()
        if record["seconds"] is not None
    }


def commits(study: Study) -> dict[str, list[str]]:
    """By seed, the commits that made what is kept."""
    return {
        str(seed): sorted({record["made"]["commit"] for record in records.values()})
        for seed in study.seeds
        if (records := _records(study, seed))
    }


def keep_dense(study: Study) -> None:
    """Keeps what `pr1_jax.study.dense` wrote."""
    files.replace_file(study.kept_dense, study.dense.read_bytes())


def of_dense(study: Study) -> list[dict[str, float]]:
    """What `pr1_jax.study.dense` found, by length; else what is kept of it, or nothing.

    Raises:
      ValueError: what is kept is of other lengths.
    """
    if study.dense.exists():
        return files.read_json(study.dense, [])
    found = files.read_json(study.kept_dense, [])
    if found and found[-1]["tokens"] != study.dense_tokens:
        raise ValueError(
            f"{study.kept_dense} was made with --max={found[-1]['tokens']}, "
            f"and --size={study.size} asks for {study.dense_tokens}"
        )
    return found


def _records(study: Study, seed: int) -> dict[str, Any]:
    return files.read_json(study.kept(seed), {})


def _packed(values: np.ndarray) -> list[float | int | None]:
    """As JSON that reads as the same floats: whole ones in few characters, NaN as null."""
    known = [None if np.isnan(x) else x for x in values.tolist()]
    return [int(x) if x is not None and x.is_integer() else x for x in known]


def _array(values: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if x is None else x for x in values], float)


def _unpacked(record: Mapping[str, Any]) -> Outcome:
    problems, courses = (
        {name: _array(values) for name, values in record[kind].items()}
        for kind in ("problems", "courses")
    )
    return Outcome(record["questions"], problems, courses, record["switch"])


# --- What they were made with ---------------------------------------------------------


def _settings(study: Study, cell: Cell, seed: int) -> dict[str, Any]:
    """What a run of the cell is made with today, as JSON; fields of its config by name."""
    overridden = {override.partition("=")[0] for override in study.overrides}
    changes = cells.changes(cell, study.size, seed)
    changes = {n: value for n, value in changes.items() if n not in overridden}
    return {
        "size": study.size,
        "overrides": list(study.overrides),
        "config file": cells.config_argument(cell, study.size),
        "start": cells.start_of(cell, study.size),
        **files.plain(changes),
    }


def _field(config: Mapping[str, Any], name: str) -> Any:
    for part in name.split("."):
        if not isinstance(config, Mapping) or part not in config:
            return _NOT_SET
        config = config[part]
    return config


def _check(study: Study, cell: Cell, seed: int, record: Mapping[str, Any]) -> None:
    """Refuses what was made with other settings than today's."""
    today = _settings(study, cell, seed)
    then = {_RENAMED.get(n, n): value for n, value in record["settings"].items()}
    for name in dict.fromkeys([*today, *then]):
        was = then.get(name, _BEFORE.get(name, _NOT_SET))
        now = today.get(name, _NOT_SET)
        if was != now:
            raise ValueError(
                f"{study.kept(seed)}: {cell.name} seed {seed} was made with "
                f"{name}={was}, which is {now} now; remove its line to run it again"
            )


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
    """What of the processor and versions that made a kept run is another here."""
    then = _records(study, seed).get(cell.name, {}).get("made", {})
    return [
        f"{name} {then[name]}, not {here}"
        for name, here in made().items()
        if name != "commit" and then.get(name, here) != here
    ]


def _commit() -> str:
    """The commit that the working tree is at; `+ changes` where its code differs."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        done = subprocess.run(
            command, cwd=places.ROOT, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        code = ("--", "pr1_jax", "configs")  # a study may be in the working tree
        changed = git("status", "--porcelain", "--untracked-files=no", *code)
        return git("rev-parse", "--short=12", "HEAD") + (
            " + changes" if changed else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
