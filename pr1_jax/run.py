"""One run in its workdir: metrics, checkpoints, summary, progress, and resuming."""

import os
import pathlib
import sys
from collections.abc import Mapping
from typing import Any, Self

import jax
import ml_collections
import orbax.checkpoint as ocp
import rich.console
from absl import logging

from pr1_jax import checkpoint, curves, metrics, processes, progress, train_state
from pr1_jax.experiment import Experiment

TRAINING = ("sft", "rl")  # the stages that change parameters


class Run:
    """Everything that a run writes. Process 0 writes; all processes make one alike."""

    def __init__(self, experiment: Experiment, workdir: str):
        """Opens a workdir, new or left by an earlier run of the same config.

        Raises:
          ValueError: the workdir belongs to another config; names a field that differs.
        """
        self.experiment = experiment
        self._stages = experiment.config.stages
        self._main = jax.process_index() == 0
        self.workdir = open_workdir(workdir, experiment.config)
        if self._main:
            metrics.write_json(
                self.workdir / "config.json", experiment.config.to_dict()
            )
        self.summary = metrics.read_json(self.workdir / "summary.json", {})
        self.summary.setdefault("evaluations", {})
        config = experiment.config
        self._compilations = metrics.CompilationCounter().start()
        self._checkpoints = checkpoint.Checkpoints(
            self.workdir, keep=config.checkpoint.keep
        )
        self._writer = metrics.MetricWriter(self.workdir, enabled=self._main)
        self.place = self._checkpoints.latest()
        self.params = self._first_params()
        self._resume_metrics()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info) -> None:
        self._checkpoints.close()
        self._writer.close()

    @property
    def names(self) -> list[str]:
        """Names of evaluations and stages, in the order of the curriculum."""
        c = self.experiment.config
        names = ["eval_0_base"]
        for i, stage in enumerate(c.stages):
            names.append(stage)
            if stage in TRAINING:
                names.append(f"eval_{i + 1}_{stage}")
            if stage == "benchmark":
                names += [
                    evaluation_name(benchmark, mode)
                    for mode in c.eval.modes
                    for benchmark in c.eval.benchmarks
                ]
        return names

    def _first_params(self) -> Any:
        """Parameters at the newest checkpoint, or those that the run starts from."""
        experiment = self.experiment
        if self.place is None:
            return experiment.initial_params()
        stage = experiment.config.stages[self.place.stage]
        self.say(f"resuming {stage} after step {self.place.step}")
        optimizer, _ = experiment.optimizer(stage)
        abstract = train_state.abstract_state(
            experiment.abstract_params(), optimizer, experiment.mesh
        )
        return self._checkpoints.restore(self.place, abstract).params

    def _resume_metrics(self) -> None:
        """Drops metrics that the checkpoint does not hold; nothing is doubled."""
        names, stages = self.names, self.experiment.config.stages
        if self.place is None:
            name, step = names[0], -1
        else:
            name, step = stages[self.place.stage], self.place.step
        self._writer.resume(names, name, step)
        for later in names[names.index(name) + (self.place is not None) :]:
            if later in self.summary["evaluations"]:
                self._writer.write(later, 0, self.summary["evaluations"][later])

    def say(self, text: Any) -> None:
        """Prints a line, or a table, on process 0."""
        # An explicit `force_terminal` keeps FORCE_COLOR from colouring a pipe.
        terminal = sys.stdout.isatty()
        rich.console.Console(
            force_terminal=terminal,
            quiet=not self._main,
            width=None if terminal else 100,
        ).print(text, soft_wrap=isinstance(text, str))

    def begin(self, stage: int, optimizer: Any, stream: Any) -> tuple[Any, int]:
        """State at the start of a stage, or where it was left; moves `stream` there.

        Returns:
          The training state and the number of steps already done.
        """
        mesh = self.experiment.mesh
        if self.place is None or self.place.stage != stage:
            return train_state.from_params(self.params, optimizer, mesh), 0
        abstract = train_state.abstract_state(
            self.experiment.abstract_params(), optimizer, mesh
        )
        self.params = None
        state = self._checkpoints.restore(self.place, abstract, stream)
        if self.place.step == self.experiment.config[self._stages[stage]].steps:
            self.params = state.params
        return state, self.place.step

    def save(
        self, stage: int, step: int, total_steps: int, state: Any, stream: Any
    ) -> None:
        """Saves every so many steps, and after a stage's last one."""
        if step % self.experiment.config.checkpoint.every_steps and step < total_steps:
            return
        self._checkpoints.save(checkpoint.Place(stage, step), state, stream)
        if step == total_steps:
            self.params = state.params

    def reference(self, params: Any) -> Any:
        """The policy at the start of the stage, kept on disk for the KL term."""
        path = self.workdir / "checkpoints_reference"
        with ocp.StandardCheckpointer() as checkpointer:
            if not processes.agree(path.exists()):
                checkpointer.save(path, params)
                checkpointer.wait_until_finished()
            return checkpointer.restore(path, self.experiment.abstract_params())

    def display(self, stage: str, total_steps: int) -> progress.Progress:
        """A progress display; quiet on all processes but the first."""
        return progress.Progress(stage, total_steps, enabled=self._main)

    def log(
        self,
        stage: str,
        step: int,
        found: Mapping[str, float],
        display: progress.Progress | None = None,
    ) -> None:
        """Writes a step's metrics and shows them."""
        found = {**found, "perf/compilations": float(self._compilations.count)}
        self._writer.write(stage, step, found)
        if display is not None:
            display.update(step, found)
        if found.get("optim/skipped"):
            logging.warning("%s step %d: non-finite gradient, skipped", stage, step)

    def record_evaluation(self, name: str, found: Mapping[str, float]) -> None:
        """Writes an evaluation to metrics and summary, and draws the curves anew."""
        self.log(name, 0, found)
        self.summary["evaluations"][name] = dict(found)
        self._save_summary()
        if self._main:
            curves.plot_curves(self.workdir)

    def finish(self) -> None:
        """Marks the run as finished."""
        self.summary["finished"] = True
        self._save_summary()

    def _save_summary(self) -> None:
        if self._main:
            metrics.write_json(self.workdir / "summary.json", self.summary)


def evaluation_name(benchmark: str, mode: str) -> str:
    """Under which a benchmark in one decoding mode stands in metrics and summary."""
    return f"benchmark_{benchmark}_{mode}"


def open_workdir(workdir: str, config: ml_collections.ConfigDict) -> pathlib.Path:
    """Makes a run's folder, or checks that the one there is of the same config.

    Raises:
      ValueError: it is of another config; names a field that differs.
      OSError: it is not a folder, or cannot be made.
    """
    path = pathlib.Path(workdir).absolute()
    mine = flat(metrics.plain(config.to_dict()))
    path.mkdir(parents=True, exist_ok=True)
    theirs = flat(metrics.read_json(path / "config.json", {})) or mine
    for name in sorted({*mine, *theirs}):
        if name.split(".")[0] in ("checkpoint", "mesh"):
            continue
        if mine.get(name) != theirs.get(name):
            raise ValueError(
                f"{name}={mine.get(name)!r}, but the run in {path} has "
                f"{theirs.get(name)!r}; take another --workdir"
            )
    return path


def read_config(workdir: str | os.PathLike[str]) -> ml_collections.ConfigDict:
    """The config of a run.

    Raises:
      FileNotFoundError: there is none in this folder.
    """
    found = metrics.read_json(pathlib.Path(workdir) / "config.json", None)
    if found is None:
        raise FileNotFoundError(
            f"{workdir} has no config.json: not the workdir of a run"
        )
    return ml_collections.ConfigDict(found)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping with dotted names."""
    out: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            out |= flat(value, f"{prefix}{name}.")
        else:
            out[prefix + name] = value
    return out
