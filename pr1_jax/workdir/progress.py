"""Progress of one stage on the terminal.

In a terminal: a live bar, and under it the figures of the last step, each with
its course so far as a sparkline. In a pipe or a log: plain lines, at most one
every two seconds.
"""

import contextlib
import itertools
import math
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Self

import rich.console
import rich.live
import rich.progress_bar
import rich.table
import rich.text
from absl import logging

from pr1_jax.workdir import metric_table

_PLAIN_INTERVAL_SEC = 2.0
_STEP_TIMES = 31  # step times of which the median gives the time left
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
    "coldstart/kept",
    "coldstart/traces",
    "policy/entropy",
    "rollout/logp_gap_max",
    "perf/tokens_per_sec",
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
        unit: str = "step",
        enabled: bool = True,
    ):
        # An explicit `force_terminal` keeps FORCE_COLOR, common in CI, from
        # turning a pipe into a terminal.
        self._console = console or rich.console.Console(
            force_terminal=sys.stdout.isatty(), quiet=not enabled
        )
        self._stage = stage
        self._total_steps = total_steps
        self._unit = unit
        self._step: int | None = None
        self._history: dict[str, list[float]] = {name: [] for name in _SHOWN}
        self._step_times_sec: deque[float] = deque(maxlen=_STEP_TIMES)
        self._start_sec = self._update_sec = time.monotonic()
        self._printed_sec = -math.inf
        self._printed_step: int | None = None
        self._cleanup = contextlib.ExitStack()
        self._live: rich.live.Live | None = None

    def __enter__(self) -> Self:
        self._start_sec = self._update_sec = time.monotonic()
        if self._console.is_interactive and not self._console.quiet:
            self._live = self._cleanup.enter_context(
                rich.live.Live(
                    get_renderable=self._render,
                    console=self._console,
                    refresh_per_second=4,
                )
            )
            self._move_log()
        return self

    def __exit__(self, *exc_info) -> None:
        if self._live is None and self._step not in (None, self._printed_step):
            self._print_line()
        self._cleanup.close()
        self._live = None

    def _move_log(self) -> None:
        """Sends absl's log above the bar: it keeps the stderr it was made with."""
        handler = logging.get_absl_handler().python_handler
        if handler.stream is sys.__stderr__:
            handler.setStream(sys.stderr)  # the proxy that Live has put in
            self._cleanup.callback(handler.setStream, sys.__stderr__)

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows `step`, the number of steps done, and the known ones of `metrics`."""
        now = time.monotonic()
        # The first update says nothing about speed: it holds the compilation,
        # and a resumed stage does not begin at step 1.
        if self._step is not None and step > self._step:
            self._step_times_sec.append((now - self._update_sec) / (step - self._step))
        self._step, self._update_sec = step, now
        for name, history in self._history.items():
            if metrics.get(name) is not None:
                history.append(float(metrics[name]))
        due = now - self._printed_sec >= _PLAIN_INTERVAL_SEC
        if self._live is None and (due or step >= self._total_steps):
            self._print_line()

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    @property
    def time_left_sec(self) -> float | None:
        """Seconds to the last step by the median of recent steps; None at first."""
        if self._step is None or not self._step_times_sec:
            return None
        step_time_sec = statistics.median(self._step_times_sec)
        since_update = min(time.monotonic() - self._update_sec, step_time_sec)
        steps_left = max(self._total_steps - self._step, 0)
        return max(steps_left * step_time_sec - since_update, 0.0)

    def _clocks(self) -> str:
        text = f"{_clock(time.monotonic() - self._start_sec)} elapsed"
        left = self.time_left_sec
        if left is None or self._step >= self._total_steps:
            return text
        return f"{text}  {_clock(left)} left"

    def _figures(self) -> Iterator[tuple[str, str, list[float]]]:
        """Words, last value as text, and history of each metric that there is."""
        for name in _SHOWN:
            if history := list(self._history[name]):
                metric = metric_table.describe(name)
                yield metric.short, metric.write(history[-1]), history

    def _print_line(self) -> None:
        parts = [f"{self._stage}  {self._unit} {self._step}/{self._total_steps}"]
        parts += [f"{words} {text}" for words, text, _ in self._figures()]
        self.say("  ".join([*parts, self._clocks()]))
        self._printed_sec, self._printed_step = time.monotonic(), self._step

    def _render(self) -> rich.console.RenderableType:
        """Draws the bar and the figures; called by Live's own thread."""
        step = self._step or 0
        bar = rich.table.Table.grid(padding=(0, 2))
        bar.add_row(
            rich.text.Text(self._stage, style="bold"),
            rich.progress_bar.ProgressBar(
                total=max(self._total_steps, 1), completed=step, width=32
            ),
            f"{self._unit} {step}/{self._total_steps}",
            rich.text.Text(self._clocks(), style="cyan"),
        )
        figures = rich.table.Table.grid(padding=(0, 2))
        figures.add_column(style="dim")
        figures.add_column(justify="right", min_width=8)
        figures.add_column(style="green")
        blocks = self._console.encoding.startswith("utf")
        for words, text, history in self._figures():
            figures.add_row(f"  {words}", text, _sparkline(history) if blocks else "")
        return rich.console.Group(bar, figures)
