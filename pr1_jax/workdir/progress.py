"""Progress of one stage on the terminal.

In a terminal: a live bar (`rich.progress`), and under it the figures of the last step,
each with its course so far as a sparkline. In a pipe or a log: plain lines, at most one
every two seconds.
"""

import contextlib
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Self

import rich.console
import rich.progress
import rich.table
from absl import logging

from pr1_jax.workdir import metric_table

_PLAIN_INTERVAL_SEC = 2.0
_SPARK_WIDTH = 32
_SPARKS = "▁▂▃▄▅▆▇█"
# In the order of display. Of two metrics with the same words a stage has one.
_SHOWN = (
    "loss/sft",
    "reward/mean",
    "rollout/accuracy",
    "eval/accuracy",
    "rollout/parallel_ratio",
    "eval/parallel_ratio",
    "rollout/work_division",
    "eval/work_division",
    "coldstart/kept",
    "coldstart/traces",
    "policy/entropy",
    "rollout/logp_gap_max",
    "perf/tokens_per_sec",
    "perf/mfu",
)


def _clock(seconds: float) -> str:
    """75.0 -> '1:15'; 3675.0 -> '1:01:15'."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def _sparkline(history: list[float]) -> str:
    """Draws a history as at most `_SPARK_WIDTH` blocks, averaged where longer."""
    values = [value for value in history if math.isfinite(value)]
    if len(values) < 2:
        return ""
    width = min(len(values), _SPARK_WIDTH)
    edges = [len(values) * i // width for i in range(width + 1)]
    means = [statistics.fmean(values[a:b]) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(_SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_SPARKS[round((mean - low) * scale)] for mean in means)


class _Bar(rich.progress.Progress):
    """A bar with something else under it."""

    def __init__(self, *columns, below: Callable[[], rich.table.Table], **settings):
        self._below = below
        super().__init__(*columns, **settings)

    def get_renderables(self) -> Iterator[rich.console.RenderableType]:
        yield from super().get_renderables()
        yield self._below()


class Progress:
    """Shows how far a stage is and how it fares; a context manager.

    with Progress("rl", 80) as progress:
        for step in range(1, 81):
            ...
            progress.update(step, {"reward/mean": 0.4})
    """

    def __init__(
        self,
        stage: str,
        total_steps: int,
        *,
        console: rich.console.Console | None = None,
        enabled: bool = True,
    ):
        # An explicit `force_terminal` keeps FORCE_COLOR, common in CI, from
        # turning a pipe into a terminal.
        self._console = console or rich.console.Console(
            force_terminal=sys.stdout.isatty(), quiet=not enabled
        )
        self._is_live = self._console.is_interactive and not self._console.quiet
        self._history: dict[str, list[float]] = {name: [] for name in _SHOWN}
        self._printed_sec, self._printed_step = -math.inf, 0
        self._bar = _Bar(
            # A benchmark has the name that the user gives it.
            rich.progress.TextColumn("{task.description}", "bold", markup=False),
            rich.progress.BarColumn(32),
            rich.progress.TextColumn("step {task.completed}/{task.total}"),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TimeRemainingColumn(compact=True),
            below=self._figures_table,
            console=self._console,
            refresh_per_second=4,
            # The time left is by all steps but this process's first, which compiles.
            speed_estimate_period=math.inf,
            get_time=time.monotonic,
            disable=not self._is_live,
        )
        self._task_id = self._bar.add_task(stage, total=total_steps)
        (self._task,) = self._bar.tasks
        self._cleanup = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._cleanup.enter_context(self._bar)
        # absl's handler keeps the stderr it was made with, not what rich has put in.
        handler = logging.get_absl_handler().python_handler
        if self._is_live and handler.stream is sys.__stderr__:
            handler.setStream(sys.stderr)
            self._cleanup.callback(handler.setStream, sys.__stderr__)
        return self

    def __exit__(self, *exc_info) -> None:
        if not self._is_live and self._task.completed != self._printed_step:
            self._print_line()
        self._cleanup.close()

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows `step`, the number of steps done, and the known ones of `metrics`."""
        for name, history in self._history.items():
            if metrics.get(name) is not None:
                history.append(float(metrics[name]))
        self._bar.update(self._task_id, completed=step)
        due = time.monotonic() - self._printed_sec >= _PLAIN_INTERVAL_SEC
        if not self._is_live and (due or self._task.finished):
            self._print_line()

    def _figures(self) -> Iterator[tuple[str, str, list[float]]]:
        """Words, last value as text, and history of each metric that there is."""
        for name in _SHOWN:
            if history := list(self._history[name]):
                metric = metric_table.describe(name)
                yield metric.short, metric.write(history[-1]), history

    def _print_line(self) -> None:
        task = self._task
        parts = [f"{task.description}  step {task.completed}/{task.total}"]
        parts += [f"{words} {text}" for words, text, _ in self._figures()]
        parts.append(f"{_clock(task.elapsed)} elapsed")
        if task.time_remaining:
            parts.append(f"{_clock(task.time_remaining)} left")
        line = "  ".join(parts)
        plain = {"markup": False, "emoji": False, "highlight": False}
        self._console.print(line, soft_wrap=True, **plain)
        self._printed_sec, self._printed_step = time.monotonic(), task.completed

    def _figures_table(self) -> rich.table.Table:
        """What stands under the live bar; rich's own thread asks for it."""
        table = rich.table.Table.grid(padding=(0, 2))
        table.add_column(style="dim")
        table.add_column(justify="right", min_width=8)
        table.add_column(style="green")
        blocks = self._console.encoding.startswith("utf")
        for words, text, history in self._figures():
            table.add_row(f"  {words}", text, _sparkline(history) if blocks else "")
        return table
