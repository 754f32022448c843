"""Questions and answers in a terminal, or through a pipe."""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import rich.console

from pr1_jax.chat import view
from pr1_jax.chat.session import Chat
from pr1_jax.trajectory import Trajectory

_HELP = """\
Enter alone      asks an example
/again           asks the last question again, with new draws
/ban             bans <Parallel>, or allows it again
/paths N         paths of a block, 2 to 8
/steps N         deadline: sequential steps of a response, 0 = none
/labels          leaves labels of paths away, or takes them again
/temperature X   of the draws, 0 = greedy
/seed N          of the draws; begins anew
/help, /quit     this list; the end (also Ctrl-D)
Ctrl-C stops a response."""


# Commands with a number: the field of the settings, "" = none, and its type.
_NUMBERS = {
    "/paths": ("num_paths", int),
    "/steps": ("max_sequential_steps", int),
    "/temperature": ("temperature", float),
    "/seed": ("", int),
}


class Stopped(Exception):
    """A response was stopped by Ctrl-C."""


def _console() -> rich.console.Console:
    # An explicit `force_terminal` keeps FORCE_COLOR from colouring a pipe.
    return rich.console.Console(
        force_terminal=sys.stdout.isatty(), highlight=False, markup=False, emoji=False
    )


def can_draw() -> bool:
    """Whether standard output is a terminal in which lines can be drawn anew."""
    return sys.stdout.isatty() and not _console().is_dumb_terminal


def run(
    chat: Chat, question: str | None, *, drawn: bool, as_json: bool, pace: float
) -> int:
    """Asks one question, or those that are typed or piped in; the exit code."""
    sys.stdin.reconfigure(errors="replace")
    sys.stdout.reconfigure(errors="replace")
    try:
        if drawn:
            terminal = Terminal(chat, _console(), pace=pace)
            if question is not None:
                return terminal.answer(question)
            if sys.stdin.isatty():
                return terminal.converse()
            return terminal.answer_lines(sys.stdin)
        lines = sys.stdin if question is None else [question]
        return answer_plainly(chat, lines, as_json=as_json)
    except BrokenPipeError:  # as with `| head`; nothing is left to flush into it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130


def _questions(lines) -> Iterator[tuple[int, str]]:
    """Lines that are not empty, with their numbers from 1."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield number, line.rstrip("\r\n")


def answer_plainly(chat: Chat, lines, *, as_json: bool) -> int:
    """Answers every line on standard output, and nothing else; the exit code.

    A question that cannot be asked is a line on standard error (and with `as_json` an
    object with `question` and `error`), and exit code 2 at the end. Text is printed as
    it is into a pipe, and safe to print into a terminal.
    """
    wrong, in_terminal = 0, sys.stdout.isatty()
    for before, (number, question) in enumerate(_questions(lines)):
        try:
            record = chat.ask(question)
        except ValueError as error:
            print(f"error: line {number}: {error}", file=sys.stderr, flush=True)
            record, wrong = {"question": question, "error": str(error)}, 2
        if as_json:
            print(json.dumps(record), flush=True)
        elif "response" in record:
            blank = "\n" if before else ""
            text = record["response"].strip("\n")
            print(blank + (view.printable(text) if in_terminal else text), flush=True)
    return wrong


class Terminal:
    """Questions and answers in a terminal."""

    def __init__(self, chat: Chat, console: rich.console.Console, *, pace: float = 0.0):
        """`pace`: steps a second that are shown, at most; 0 = no limit."""
        self._chat, self._console, self._pace = chat, console, pace
        self._last = ""

    def _say(self, text: str, style: str = "dim") -> None:
        self._console.print(view.printable(text), style=style, soft_wrap=True)

    def answer(self, question: str) -> int:
        """Shows a response while it is sampled, then what it took; the exit code."""
        self._last = question
        seen: list[Trajectory] = []
        began = time.monotonic()
        try:
            with (
                _interrupts() as is_pressed,
                view.Screen(self._console, self._chat.tokenizer) as screen,
            ):

                def watch(trajectory: Trajectory) -> None:
                    seen[:] = [trajectory]
                    screen.show(trajectory)
                    if self._pace:
                        due = began + trajectory.sequential_steps / self._pace
                        _wait_until(due, is_pressed)
                    if is_pressed():
                        raise Stopped

                try:
                    # Compiles before the clock of the pace starts.
                    self._chat.warm_up(len(self._chat.prompt(question)))
                    began = time.monotonic()
                    record = self._chat.ask(question, watch=watch)
                except Stopped:
                    record = self._chat.record(question, seen[0], 0.0)
                    record["stopped"] = not record["finished"]
                screen.finish(seen[0])
        except ValueError as error:
            self._say(f"error: {error}", style="red")
            return 2
        figures = view.figures(record, self._console)
        self._say(f"\n{figures}\n")
        return 0

    def answer_lines(self, lines) -> int:
        """Shows the response to every line; the exit code."""
        codes = [0]
        for _, question in _questions(lines):
            self._say(f"> {question}", style="bold")
            codes.append(self.answer(question))
        return max(codes)

    def converse(self) -> int:
        """Asks what is typed until Ctrl-D."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (gives `input` its history)
        self._say("Enter alone asks an example, /help lists what else there is.\n")
        while True:
            try:
                line = input("> ").strip()
            except EOFError:
                self._console.print()
                return 0
            except KeyboardInterrupt:
                self._say("\nCtrl-D leaves")
                continue
            if line in ("/quit", "/exit"):
                return 0
            if line == "/again":
                line = self._last
            if line.startswith("/"):
                self._say(command(self._chat, line) + "\n")
                continue
            if not line:
                line = self._chat.example()
                self._say(f"> {line}", style="bold")
            self.answer(line)


def command(chat: Chat, line: str) -> str:
    """Does what a line with a slash says; returns what to say to it."""
    name, *given = line.split()
    if name == "/ban" and not given:
        chat.parallel = not chat.parallel
        return f"<Parallel> is {'allowed' if chat.parallel else 'banned'}"
    if name == "/labels" and not given:
        try:
            chat.switch_labels()
        except ValueError as error:
            return str(error)
        return f"paths have {'their' if chat.settings.path_labels else 'no'} labels"
    if name not in _NUMBERS:
        return _HELP if name == "/help" else f"{name}: no such command\n{_HELP}"
    field, kind = _NUMBERS[name]
    try:
        (value,) = map(kind, given)
        if field:
            chat.change(**{field: value})
        elif not 0 <= value < 2**31:
            raise ValueError(f"--seed={value} must be from 0 to 2^31 - 1")
        else:
            chat.seed, chat.asked = value, 0
    except ValueError as error:
        one = len(given) == 1 and "--" in str(error)
        return str(error) if one else f"{line}: needs one number"
    return f"{name[1:]} is {value}{chat.too_few if name == '/steps' else ''}"


def _wait_until(due: float, is_over: Callable[[], bool]) -> None:
    while (left := due - time.monotonic()) > 0 and not is_over():
        time.sleep(min(left, 0.05))


@contextlib.contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Notes Ctrl-C in place of raising it; the second one is raised."""
    pressed: list[Any] = []

    def note(*_) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(True)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)
