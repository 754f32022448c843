"""One run in its workdir: metrics, checkpoints, summary, progress, and resuming."""

import collections
import contextlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, Protocol

import jax
import numpy as np
import optax
import rich.console
from absl import logging

from pr1_jax.data.streams import Stream
from pr1_jax.model import adapters
from pr1_jax.stages import policies
from pr1_jax.stages.experiment import Experiment
from pr1_jax.system import files, processes, stopping
from pr1_jax.system.mesh import local_batch
from pr1_jax.training.state import TrainState, abstract_state, from_params
from pr1_jax.workdir import alarms, checkpoint, identity, progress, sinks
from pr1_jax.workdir.folder import open_workdir
from pr1_jax.workdir.metrics import CompilationCounter, MetricWriter

TRAINING = ("sft", "rl")  # the stages that change parameters


class Watcher(Protocol):
    """Is told when there is something new in the workdir of a run; never raises."""

    def after_step(self) -> None:
        """The metrics of a step have been written."""

    def after_evaluation(self) -> None:
        """An evaluation has been written."""

    def close(self) -> None:
        """The run has ended, finished or not; nothing more will be written."""


class Run(contextlib.AbstractContextManager):
    """Everything that a run writes. Process 0 writes; all processes make one alike."""

    def __init__(
        self, experiment: Experiment, workdir: str, watchers: Sequence[Watcher] = ()
    ):
        """Opens a workdir, new or left by an earlier run of the same config.

        Args:
          watchers: on process 0 alone; closed with the run.

        Raises:
          ValueError: the workdir belongs to another config, or began with other
            weights; `checkpoint.folder` belongs to another run. Names what differs.
        """
        self.experiment = experiment
        config = experiment.config
        self._stages = config.stages
        self._main = jax.process_index() == 0
        self.workdir = open_workdir(workdir, config)
        texts = experiment.own.texts
        ours = identity.check(self.workdir, config, experiment.origin, texts)
        if self._main:
            files.write_json(self.workdir / "config.json", config.to_dict())
        self.summary = files.read_json(self.workdir / "summary.json", {})
        self.summary.setdefault("evaluations", {})
        self._compilations = CompilationCounter().start()
        model = experiment.model
        gap = alarms.largest_logp_gap(config.variant, model.dtype, model.num_layers)
        limits = alarms.Limits(gap, **config.alarms)
        self._alarms = {stage: alarms.Alarms(limits) for stage in TRAINING}
        self.frozen, about = policies.read_frozen(experiment)
        self._checkpoints = checkpoint.Checkpoints(
            config.checkpoint.folder or self.workdir,
            keep=config.checkpoint.keep,
            keep_best=config.checkpoint.keep_best,
            best_metric=config.checkpoint.best_metric,
            about=about,
        )
        self._writer = MetricWriter(
            self.workdir,
            enabled=self._main,
            sinks=sinks.open_all(
                config.metrics.sinks,
                self.workdir,
                config.to_dict(),
                enabled=self._main,
            ),
        )
        self._watchers = watchers if self._main else ()
        self._left: tuple[Any, Any] | None = None  # states of training and data
        self.position = self._newest()
        if self.position is None:
            self.trained = policies.first_trained(experiment)
        else:
            self.say(
                f"resuming {self._stages[self.position.stage]} after step "
                f"{self.position.step}"
            )
            self.trained = self._left[0].params
        ours.keep()  # weights that could not be read are not what it began with
        self._resume_metrics()

    def __exit__(self, *exc_info) -> None:
        self._checkpoints.close()
        self._writer.close()
        for watcher in self._watchers:
            watcher.close()

    def policy(self, trained: Any) -> Any:
        """All parameters of the policy in which these are trained."""
        return adapters.policy_params(self.frozen, trained)

    @property
    def params(self) -> Any:
        """All parameters as they are before the first stage, or after the last one."""
        return self.policy(self.trained)

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
                    for benchmark in self.experiment.benchmarks
                ]
        return names

    def _newest(self) -> checkpoint.Position | None:
        """Position of the newest checkpoint that can be read; sets others aside."""
        while (position := self._checkpoints.latest()) is not None:
            optimizer, _ = self.experiment.optimizer(self._stages[position.stage])
            abstract = abstract_state(
                self.experiment.abstract_trained(), optimizer, self.experiment.mesh
            )
            try:
                self._left = self._checkpoints.restore(position, abstract)
            except checkpoint.DamagedError as error:
                aside = self._checkpoints.set_aside(position)
                logging.warning(
                    "a damaged checkpoint: %s; it is now %s, and the run goes on from "
                    "the one before",
                    error,
                    aside,
                )
            else:
                return position
        return None

    def _resume_metrics(self) -> None:
        """Drops metrics that the checkpoint does not hold; nothing is doubled."""
        names, stages = self.names, self.experiment.config.stages
        if self.position is None:
            name, step = names[0], -1
        else:
            name, step = stages[self.position.stage], self.position.step
        self._writer.resume(names, name, step)
        if self._main and name in self._alarms:
            lines = files.read_json_lines(self._writer.path)
            self._alarms[name].recall(line for line in lines if line["stage"] == name)
        for later in names[names.index(name) + (self.position is not None) :]:
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
            markup=False,  # a path may look like it
            emoji=False,
        ).print(text, soft_wrap=isinstance(text, str))

    def begin(
        self, stage: int, optimizer: optax.GradientTransformation, stream: Stream
    ) -> tuple[TrainState, int]:
        """State at the start of a stage, or where it was left; moves `stream` there.

        Returns:
          The training state and the number of steps already done.
        """
        if self.position is None or self.position.stage != stage:
            mesh = self.experiment.mesh
            return from_params(self.trained, optimizer, mesh), 0
        (state, data_state), self._left = self._left, None
        stream.set_state(data_state)
        self.trained, name = None, self._stages[stage]
        self._alarms[name].skipped = int(state.opt_state.notfinite_count)
        if self.position.step == self.experiment.config[name].steps:
            self._end(name, state)
        return state, self.position.step

    def _end(self, stage: str, state: TrainState) -> None:
        """Takes the parameters at the end of a stage, if it has trained them.

        Raises:
          FloatingPointError: all updates were skipped, or too many in a row at the end.
        """
        self.trained = state.params
        skipped = int(state.opt_state.total_notfinite)
        if skipped == int(state.step):
            raise FloatingPointError(
                f"{stage}: all {skipped} updates were skipped, because no gradient was "
                f"finite, and nothing was learned; the last batch is in {self.workdir}/"
                f"non_finite_{stage}.npz. Look at the first parameters, try a lower "
                f"{stage}.lr or model.dtype=float32, and take another --workdir"
            )
        self._go_on(stage, self.experiment.config[stage].steps)

    def _go_on(self, stage: str, step: int) -> None:
        """Raises FloatingPointError after too many skipped updates in a row."""
        if self._alarms[stage].is_lost:
            raise FloatingPointError(
                f"{stage} step {step}: {self._alarms[stage].skipped} updates "
                f"in a row had a non-finite gradient (alarms.max_skipped="
                f"{self.experiment.config.alarms.max_skipped}); the last batch is in "
                f"{self.workdir}/non_finite_{stage}.npz"
            )

    def skipped(self) -> dict[str, int]:
        """Updates that were skipped by stage, where there are some; on process 0."""
        counts = collections.Counter()
        for line in files.read_json_lines(self._writer.path) if self._main else ():
            counts[line["stage"]] += int(line.get("optim/skipped") or 0)
        return {stage: count for stage, count in counts.items() if count}

    def save(
        self,
        position: checkpoint.Position,
        state: TrainState,
        data_state: Mapping[str, Any],
        metrics: Mapping[str, float],
    ) -> None:
        """Saves every so many steps, after a stage's last one, and when told to stop.

        Args:
          data_state: of the stage's stream. metrics: of the step.

        Raises:
          stopping.Stopped: the run was told to stop; all is saved.
          FloatingPointError: too many updates in a row were skipped, or all of a stage.
        """
        config = self.experiment.config
        stage = self._stages[position.stage]
        is_last = position.step == config[stage].steps
        is_asked = stopping.is_asked()
        if is_asked or is_last or position.step % config.checkpoint.every_steps == 0:
            self._checkpoints.save(position, state, data_state, metrics)
        if is_asked:
            self.leave(position, state, data_state)
        if is_last:
            self._end(stage, state)
        self._go_on(stage, position.step)

    def leave(
        self,
        position: checkpoint.Position,
        state: TrainState,
        data_state: Mapping[str, Any],
    ) -> NoReturn:
        """Saves what there is at a position, and ends the run."""
        self.keep(position, state, data_state)
        raise stopping.Stopped

    def keep(
        self,
        position: checkpoint.Position,
        state: TrainState,
        data_state: Mapping[str, Any],
    ) -> None:
        """Saves what there is at a position, unless it was saved."""
        if position.step and not self._checkpoints.has(position):
            self._checkpoints.save(position, state, data_state)
        self._checkpoints.wait()

    def keep_batch(self, stage: str, batch: Any) -> None:
        """Writes a batch whose gradient was not finite, for inspection."""
        path = processes.own_path(self.workdir / f"non_finite_{stage}.npz")
        arrays = {name: x for name, x in vars(batch).items() if x is not None}
        np.savez(path, **{name: local_batch(x) for name, x in arrays.items()})

    def reference(self, trained: Any) -> Any:
        """What is trained, at the start of the stage: kept on disk for the KL term.

        Args:
          trained: of the state that the stage begins or goes on with.

        Raises:
          RefusedError: it cannot be read, or is gone where the stage goes on.
        """
        went_on = self.position is not None and self.position.step > 0
        went_on = went_on and self._stages[self.position.stage] == "rl"
        return checkpoint.kept_tree(
            self.workdir / "checkpoints_reference",
            None if went_on else trained,
            self.experiment.abstract_trained(),
        )

    def display(self, stage: str, total_steps: int) -> progress.Progress:
        """A progress display; quiet on all processes but the first."""
        return progress.Progress(stage, total_steps, enabled=self._main)

    @staticmethod
    def count_records(stream: Stream) -> dict[str, float]:
        """Metrics `data/…`: records that a stage has kept and dropped so far."""
        named = {
            n if n == "kept" else f"dropped_{n}": x for n, x in stream.counts.items()
        }
        return {f"data/{name}": float(count) for name, count in named.items()}

    def log(
        self,
        stage: str,
        step: int,
        metrics: Mapping[str, float],
        display: progress.Progress | None = None,
    ) -> None:
        """Writes a step's metrics and shows them."""
        metrics = {**metrics, "perf/compilations": float(self._compilations.count)}
        if stage in self._alarms:
            metrics |= self._alarms[stage].check(stage, step, metrics)
        self._writer.write(stage, step, metrics)
        for watcher in self._watchers:
            watcher.after_step()
        if display is not None:
            display.update(step, metrics)

    def record_evaluation(self, name: str, metrics: Mapping[str, float]) -> None:
        """Writes an evaluation to metrics and summary."""
        self.log(name, 0, metrics)
        self.summary["evaluations"][name] = dict(metrics)
        self._save_summary()
        for watcher in self._watchers:
            watcher.after_evaluation()

    def finish(self) -> None:
        """Marks the run as finished."""
        self.summary["finished"] = True
        self._save_summary()

    def _save_summary(self) -> None:
        if self._main:
            files.write_json(self.workdir / "summary.json", self.summary)


def evaluation_name(benchmark: str, mode: str) -> str:
    """The name of a benchmark in one decoding mode, in metrics and summary."""
    return f"benchmark_{benchmark}_{mode}"
