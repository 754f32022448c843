"""Reads a run's workdir for its report. Nothing here needs a device."""

import dataclasses
import functools
import itertools
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pr1_jax.system import files
from pr1_jax.tags import Grammar

_PART = re.compile(r"(.+?)(-\d{5}-of-\d{5})?\.jsonl")
_STEP = re.compile(r"(.+)_(\d{6,})")
_WEIGHT = "reward/weight_"


@dataclasses.dataclass(frozen=True)
class Source:
    """The files that hold the responses of a step or of an evaluation.

    Attributes:
      name: that of the files, without ending and process.
      stage, step: those of training; an evaluation has its name and None.
      paths: one file of each process.
    """

    name: str
    stage: str
    step: int | None
    paths: tuple[pathlib.Path, ...]


@dataclasses.dataclass(frozen=True)
class Window:
    """A stretch of steps of one stage, first and last included, with one reward."""

    stage: str
    first: int
    last: int
    reward: str


@dataclasses.dataclass(frozen=True)
class Run:
    """What a workdir holds.

    Attributes:
      name: what the page calls the run.
      config, summary, benchmarks: the JSON files of these names; {} where one is missing.
      rows: the lines of training steps, in order.
      evaluations: name, number of rows before it, and its line, in order.
      sources: all responses, in the order in which they were sampled.
    """

    path: pathlib.Path
    name: str
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    evaluations: Sequence[tuple[str, int, Mapping[str, Any]]]
    benchmarks: Mapping[str, Any]
    sources: Sequence[Source]

    @functools.cached_property
    def stages(self) -> list[tuple[str, int, int]]:
        """Name, first row and number of rows of each stage, in order."""
        stages: dict[str, list[int]] = {}
        for i, row in enumerate(self.rows):
            stages.setdefault(row["stage"], []).append(i)
        return [(name, rows[0], len(rows)) for name, rows in stages.items()]

    @property
    def grammar(self) -> Grammar:
        """The grammar of its responses."""
        rollout = self.config.get("rollout", {})
        labels = tuple(rollout.get("path_labels", ()))
        return Grammar(labels, bool(rollout.get("planned")))

    @functools.cached_property
    def reward_names(self) -> list[str]:
        """The rewards that have a weight at each row, "a + b"; "" outside RL."""
        weights = {
            name.removeprefix(_WEIGHT): values
            for name, values in self.columns.items()
            if name.startswith(_WEIGHT)
        }
        weighed = [
            " + ".join(name for name, values in weights.items() if values[i] > 0)
            for i in range(len(self.rows))
        ]
        return [name or self._unweighed(row) for name, row in zip(weighed, self.rows)]

    def _unweighed(self, row: Mapping[str, Any]) -> str:
        """The reward of a row written when only `reward/tiered` was logged."""
        if "reward/tiered" not in row:
            return ""
        if row["reward/tiered"]:
            return "tiered"
        settings, both = self.config.get("reward", {}), "parallel_and_accuracy"
        return both if settings.get("schedule") == both else "accuracy"

    @functools.cached_property
    def windows(self) -> list[Window]:
        """Stretches of RL steps whose reward is not accuracy alone."""
        rows = zip(self.rows, self.reward_names)
        at = [(row["stage"], row["step"], name) for row, name in rows]
        windows = []
        for (stage, name), stretch in itertools.groupby(at, key=lambda x: (x[0], x[2])):
            steps = [step for _, step, _ in stretch]
            if name not in ("", "accuracy"):
                windows.append(Window(stage, steps[0], steps[-1], name))
        return windows

    @functools.cached_property
    def columns(self) -> dict[str, np.ndarray]:
        """Each metric as float [rows], NaN where a row lacks it."""
        names = dict.fromkeys(n for row in self.rows for n in row if "/" in n)
        get = lambda row, name: np.nan if row.get(name) is None else row[name]
        return {n: np.array([get(row, n) for row in self.rows], float) for n in names}


def read(workdir: str | os.PathLike[str]) -> Run:
    """Reads a run, finished or not.

    Raises:
      FileNotFoundError: no such folder, or no metrics in it.
      ValueError: a file in it is not what it should be; names it.
    """
    path = pathlib.Path(workdir)
    if not path.is_dir():
        raise FileNotFoundError(f"{workdir} is not a folder: name the workdir of a run")
    if not (path / "metrics.jsonl").exists():
        raise FileNotFoundError(
            f"{workdir} has no metrics.jsonl: not the workdir of a run that has begun"
        )
    rows, evaluations = _lines(path / "metrics.jsonl")
    return Run(
        path=path,
        name=path.absolute().name,
        config=_object(path / "config.json"),
        summary=_object(path / "summary.json"),
        rows=rows,
        evaluations=evaluations,
        benchmarks=_object(path / "benchmarks.json"),
        sources=_sources(path, rows, evaluations),
    )


def _lines(path: pathlib.Path) -> tuple[list, list]:
    """Training rows and evaluations; of two lines of one step the later counts."""
    stages: dict[str, dict[int, dict[str, Any]]] = {}
    evaluated: dict[str, tuple[tuple[str, int] | None, dict[str, Any]]] = {}
    before = None
    for line in files.read_json_lines(path):
        if not isinstance(line, dict) or not {"stage", "step"} <= line.keys():
            raise ValueError(f"{path}: a line without stage and step: {line!r:.80}")
        if any(name.startswith("eval/") for name in line):
            evaluated[line["stage"]] = before, line
        else:
            before = line["stage"], line["step"]
            stages.setdefault(before[0], {})[before[1]] = line
    rows = [of[step] for of in stages.values() for step in sorted(of)]
    index = {(row["stage"], row["step"]): i + 1 for i, row in enumerate(rows)}
    evaluations = [
        (name, index.get(at, 0), line) for name, (at, line) in evaluated.items()
    ]
    return rows, evaluations


def _object(path: pathlib.Path) -> dict[str, Any]:
    return files.read_object(path) if path.exists() else {}


def _sources(
    workdir: pathlib.Path,
    rows: Sequence[Mapping[str, Any]],
    evaluations: Sequence[tuple[str, int, Mapping[str, Any]]],
) -> list[Source]:
    parts: dict[str, list[pathlib.Path]] = {}
    folders = (workdir / "rollouts", workdir / "samples")
    for path in sorted(p for folder in folders for p in folder.glob("*.jsonl")):
        match = _PART.fullmatch(path.name)
        parts.setdefault(match[1] if match else path.stem, []).append(path)
    sources = []
    for name, paths in parts.items():
        match = _STEP.fullmatch(name)
        stage, step = (match[1], int(match[2])) if match else (name, None)
        sources.append(Source(name, stage, step, tuple(paths)))
    # An evaluation comes before the row with the number of the rows before it.
    when: dict[Any, tuple[int, int]] = {}
    for i, row in enumerate(rows):
        when[row["stage"]] = when[row["stage"], row["step"]] = (i, 1)
    when |= {name.removeprefix("benchmark_"): (at, 0) for name, at, _ in evaluations}

    def order(source: Source) -> tuple:
        key = (source.stage, source.step) if source.step else source.name
        not_logged_yet = (len(rows), 1)
        return (*when.get(key, not_logged_yet), source.stage, source.step or 0)

    return sorted(sources, key=order)


def read_records(source: Source, limit: int | None = None) -> list[dict[str, Any]]:
    """The first records of a source, `limit` of each file; a torn line is passed over.

    Text that is no Unicode is kept as it was written.
    """
    records = []
    for path in source.paths:
        with path.open("rb") as file:
            for number, line in enumerate(file):
                if number == limit:
                    break
                try:
                    record = json.loads(line.decode("utf-8", "surrogatepass"))
                except ValueError:
                    continue
                if isinstance(record, dict):
                    records.append(record)
    return records
