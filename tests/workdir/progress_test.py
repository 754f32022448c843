"""Progress on a terminal and in a pipe."""

import io
import types

import pytest
import rich.console
from absl import logging

from pr1_jax.workdir import progress

FIGURES = {
    "reward/mean": 0.25,
    "rollout/accuracy": 0.706,
    "rollout/parallel_ratio": 0.631,
    "perf/tokens_per_sec": 12345.0,
    "other/unknown": 9.0,
}


@pytest.fixture
def clock(monkeypatch):
    """Stands in for the module `time`; the test moves it."""
    clock = types.SimpleNamespace(now=100.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(progress, "time", clock)
    return clock


def _console(*, terminal):
    return rich.console.Console(
        file=io.StringIO(), force_terminal=terminal, width=100, _environ={}
    )


def _lines(clock, total_steps, last_step, step_time_sec):
    """What is written to a pipe."""
    console = _console(terminal=False)
    with progress.Progress("rl", total_steps, console=console) as bar:
        for step in range(1, last_step + 1):
            clock.now += step_time_sec
            bar.update(step, FIGURES)
    return console.file.getvalue().splitlines()


def test_plain_lines_hold_the_figures_and_no_control_codes(clock):
    first, *_, last = _lines(clock, 40, 40, 3.0)
    assert first == (
        "rl  step 1/40  reward 0.250  accuracy 70.6%  parallel 63.1%  "
        "tokens/s 12.3k  0:03 elapsed"
    )
    assert "step 40/40" in last and last.endswith("2:00 elapsed")
    assert last.isascii() and last.isprintable()


@pytest.mark.parametrize(
    "last_step, expected",
    [
        (30, ["1/30", "9/30", "17/30", "25/30", "30/30"]),
        (4, ["1/30", "4/30"]),  # a stage that ends early
    ],
)
def test_plain_lines_come_every_two_seconds_with_the_first_and_the_last(
    clock, last_step, expected
):
    lines = _lines(clock, 30, last_step, 0.25)
    assert [line.split()[2] for line in lines] == expected


def test_time_left_ignores_the_compilation_and_the_steps_before_a_restart(clock):
    console = _console(terminal=False)
    with progress.Progress("rl", 100, console=console) as bar:
        clock.now += 60  # the first step of this process compiles
        bar.update(51, {})
        for step in (52, 54, 56):
            clock.now += 4
            bar.update(step, {})
    first, *_, last = console.file.getvalue().splitlines()
    assert first.endswith("step 51/100  1:00 elapsed")
    seconds = round(44 * 12 / 5)  # five steps took 12 s
    assert last.endswith(f"1:12 elapsed  1:{seconds - 60} left")


def test_the_live_display_holds_bar_figures_and_messages():
    console = _console(terminal=True)
    stream = logging.get_absl_handler().python_handler.stream
    with progress.Progress("rl", 8, console=console) as bar:
        for step in range(1, 5):
            bar.update(step, {**FIGURES, "reward/mean": step / 4})
    shown = console.file.getvalue()
    for text in ("step 4/8", "1.000", "70.6%", "12.3k", "▁▃▆█"):
        assert text in shown
    assert logging.get_absl_handler().python_handler.stream is stream


def test_disabled_progress_is_silent(capsys):
    with progress.Progress("rl", 2, enabled=False) as bar:
        bar.update(2, FIGURES)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("value", [float("nan"), None])
def test_a_missing_figure_breaks_nothing(value):
    for terminal in (True, False):
        console = _console(terminal=terminal)
        with progress.Progress("sft", 2, console=console) as bar:
            bar.update(1, {"loss/sft": 0.5})
            bar.update(2, {"loss/sft": value})
        assert "step 2/2" in console.file.getvalue()


def test_names_are_no_markup_on_a_terminal(clock):
    console = _console(terminal=True)
    with progress.Progress("a[/b]", 2, console=console) as bar:
        bar.update(1, FIGURES)
    assert "a[/b]" in console.file.getvalue()
