"""Figures of a run on disk: `metrics.jsonl`, TensorBoard events, JSON files.

One line of `metrics.jsonl` holds one step of one stage:

    {"stage": "rl", "step": 12, "reward/mean": 0.25, "perf/step_sec": 1.5}

A line goes out in a single write call, so a crash leaves at most one half line,
at the end. A restart from a checkpoint drops what was logged after that
checkpoint (`MetricWriter.resume`): no step is ever in the file twice.
"""

import contextlib
import io
import math
import os
import pathlib
import shutil
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Self

import jax.monitoring
import tensorboardX
from absl import logging

from pr1_jax.system import files

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


read_metrics = files.read_json_lines  # a figure that was NaN or infinite is None


class Sink(Protocol):
    """Takes the lines of `metrics.jsonl` as well; never raises."""

    def write(
        self, line: int, stage: str, step: int, values: Mapping[str, float]
    ) -> None:
        """Takes line number `line`, from 0; maybe once more after a restart."""

    def close(self) -> None:
        """No more lines will come."""


class MetricWriter(contextlib.AbstractContextManager):
    """Appends metrics to `metrics.jsonl`, to TensorBoard event files and to sinks.

    In a run of many processes all of them make a writer and call it alike, and
    only process 0 does so with `enabled=True`.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        enabled: bool = True,
        sinks: Sequence[Sink] = (),
    ):
        self.path = pathlib.Path(workdir) / "metrics.jsonl"
        self._sinks, self._lines = sinks, 0
        self._events_dir = pathlib.Path(workdir) / "tensorboard"
        self._enabled = enabled
        self._file: io.FileIO | None = None
        self._events: dict[str, tensorboardX.SummaryWriter] = {}
        self._purge_steps: dict[str, int] = {}
        if enabled:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._open()

    def _open(self) -> None:
        """Opens the file for appending, cut after its last whole line."""
        # FileIO has no buffer: one write() is one system call, and the line is out.
        self._file = io.FileIO(self.path, "a")
        data = self.path.read_bytes()
        self._file.truncate(data.rfind(b"\n") + 1)
        self._lines = data.count(b"\n")

    def resume(self, stages: Sequence[str], stage: str, step: int) -> None:
        """Drops what was logged after the checkpoint that a restart begins from.

        Lines of earlier stages, and of names that are not in `stages`, stay.

        Args:
          stages: all stage names of the run in their order, evaluations included.
          stage: the stage in which the checkpoint was taken.
          step: the last step of `stage` that the checkpoint holds; -1 if none.
        """
        if stage not in stages:
            raise ValueError(f"stage {stage!r} is not one of {list(stages)}")
        if not self._enabled:
            return
        later = set(stages[stages.index(stage) + 1 :])

        def keep(record: Mapping[str, Any]) -> bool:
            if record["stage"] == stage:
                return record["step"] <= step
            return record["stage"] not in later

        self._close_files()
        kept = [record for record in read_metrics(self.path) if keep(record)]
        files.write_json_lines(self.path, kept)
        for name in later:
            shutil.rmtree(self._events_dir / name, ignore_errors=True)
        # TensorBoard hides the events of this stage from that step on.
        self._purge_steps = {stage: step + 1}
        self._open()

    def write(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Writes one line of `group/name` figures and their TensorBoard scalars."""
        if not self._enabled:
            return
        values = {name: float(value) for name, value in metrics.items()}
        record: dict[str, Any] = {"stage": stage, "step": int(step)}
        for name, value in values.items():
            assert "/" in name, f"metric {name!r} is not named group/name"
            record[name] = value if math.isfinite(value) else None
            if not math.isfinite(value):
                logging.warning("%s is %s at step %d of %s", name, value, step, stage)
        self._file.write(files.json_line(record))
        events = self._event_writer(stage)
        for name, value in values.items():
            if math.isfinite(value):
                events.add_scalar(name, value, global_step=int(step))
        for sink in self._sinks:
            sink.write(self._lines, stage, int(step), values)
        self._lines += 1

    def _event_writer(self, stage: str) -> tensorboardX.SummaryWriter:
        if stage not in self._events:
            self._events[stage] = tensorboardX.SummaryWriter(
                str(self._events_dir / stage),
                purge_step=self._purge_steps.pop(stage, None),
                flush_secs=10,
            )
        return self._events[stage]

    def close(self) -> None:
        """Closes the files; nothing is lost without it but TensorBoard's tail."""
        self._close_files()
        for sink in self._sinks:
            sink.close()

    def _close_files(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        for events in self._events.values():
            events.close()
        self._events.clear()

    def __exit__(self, *exc_info) -> None:
        self.close()


class CompilationCounter:
    """Counts the programs that XLA has compiled in this process since `start`.

    A program read from the persistent compilation cache counts as well: JAX
    reports the two alike, and either means that a step met a new shape.
    """

    def __init__(self):
        self.count = 0
        self._lock = threading.Lock()  # JAX may compile on several threads

    def start(self) -> Self:
        """Begins to count."""
        jax.monitoring.register_event_duration_secs_listener(self._on_event)
        return self

    def stop(self) -> None:
        """Stops counting; the count stays."""
        jax.monitoring.unregister_event_duration_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **_: Any) -> None:
        del duration_secs
        if event == _COMPILE_EVENT:
            with self._lock:
                self.count += 1
