"""Tests of pr1_jax.chat.view: what is drawn of a response while it grows."""

import dataclasses
import io
import re

import numpy as np
import pyte
import pytest
import rich.console

from pr1_jax import tags
from pr1_jax.chat import view
from pr1_jax.data.tokenizer import Tokenizer
from tests.helpers import growing
from tests.helpers.growing import LEFT, RIGHT, THIRD


@pytest.fixture(scope="module")
def two(by_bytes):
    """A response with two paths as it grows."""
    return growing.steps(by_bytes, "2+2?", growing.text_of(LEFT, RIGHT))


@pytest.fixture(scope="module")
def three(by_bytes):
    """The same with three paths, and much before them."""
    response = growing.text_of(LEFT, RIGHT, THIRD, before=f"{THIRD}\n\n{LEFT} ")
    return growing.steps(by_bytes, "2+2?", response)


class Terminal:
    """A console, and what stands on the screen of the terminal behind it."""

    def __init__(self, width=80, height=24, **environ):
        self.file = io.StringIO()
        self.console = rich.console.Console(
            file=self.file,
            force_terminal=True,
            width=width,
            height=height,
            _environ={"TERM": "xterm-256color"} | environ,
        )
        self._screen = pyte.HistoryScreen(width, height, history=10_000)
        self._stream, self._fed = pyte.Stream(self._screen), 0

    @property
    def lines(self):
        """All lines, those scrolled out of sight included."""
        new = self.file.getvalue()[self._fed :]
        self._fed += len(new)
        self._stream.feed(new.replace("\n", "\r\n"))
        width = range(self._screen.columns)
        rows = [*self._screen.history.top]
        rows += [self._screen.buffer[i] for i in range(self._screen.lines)]
        text = ["".join(row[x].data for x in width).rstrip() for row in rows]
        return "\n".join(text).rstrip().split("\n")


def drawn(tokenizer, seen, terminal, every=1):
    """Lines at the end, and those after each drawing."""
    between = []
    with view.Screen(terminal.console, tokenizer, every_sec=0) as screen:
        for part in seen[::every]:
            screen.show(part)
            between.append(terminal.lines)
        screen.finish(seen[-1])
    return terminal.lines, between


@pytest.mark.parametrize("width, height", [(80, 24), (140, 9), (60, 40), (30, 12)])
def test_the_course_of_drawing_leaves_no_trace(by_bytes, three, width, height):
    """However often a response is drawn, the scrollback is the same in the end."""
    draw = lambda every: drawn(by_bytes, three, Terminal(width, height), every)[0]
    whole = Terminal(width, height)
    with view.Screen(whole.console, by_bytes) as screen:
        screen.finish(three[-1])
    assert draw(1) == draw(13) == draw(len(three)) == whole.lines
    words = " ".join(whole.lines)
    for text in ("naïvely", "found.", "数学.", "summary", "Final Answer: 6"):
        assert text in words
    _, between = drawn(by_bytes, three, Terminal(width, height))
    assert not any("\ufffd" in line for lines in between for line in lines)


def test_paths_stand_side_by_side_while_they_are_sampled(by_bytes, two):
    half = re.compile(r"On the left s▌? +│ Right to left▌? ")
    for width, beside in ((80, True), (140, True), (30, False)):
        _, between = drawn(by_bytes, two, Terminal(width))
        found = [lines for lines in between if half.search("\n".join(lines))]
        assert bool(found) == beside, width
        names = lambda line: [*re.findall(r"path \d", line)]
        in_one_line = ["path 1", "path 2"] in map(names, between[-1])
        assert in_one_line == beside
    # Both grow by a token a step.
    counts = [
        tuple(map(int, found.groups()))
        for lines in drawn(by_bytes, two, Terminal(80))[1]
        if (
            found := re.search(
                r"╰─ (\d+) tokens ─.*┴─ (\d+) tokens ─", "\n".join(lines)
            )
        )
    ]
    assert len(counts) > 15
    assert all(a == b for a, b in counts)


def test_colors_leave_the_background_alone_and_can_be_off(by_bytes, two):
    colors = {}
    for name, environ in (("on", {}), ("off", {"NO_COLOR": "1"})):
        terminal = Terminal(**environ)
        drawn(by_bytes, two, terminal, every=9)
        codes = re.findall(r"\x1b\[([\d;]*)m", terminal.file.getvalue())
        colors[name] = {int(n) for code in codes for n in code.split(";") if n}
    assert not colors["on"] & {*range(40, 49), *range(100, 108)}
    assert colors["on"] & {*range(30, 38)}
    assert not colors["off"] & {*range(30, 49), *range(90, 108)}


def test_a_response_cannot_steer_the_terminal(by_bytes):
    evil = "\x1b[2J\x1b]0;title\x07 \x9b5A\u202eb\ttab"
    response = growing.text_of(evil, evil, before=evil)
    *_, whole = growing.steps(by_bytes, "2+2?", response)
    terminal = Terminal()
    lines, _ = drawn(by_bytes, [whole], terminal)
    written = terminal.file.getvalue()
    for code in ("\x1b[2J", "\x1b]", "\x9b", "\u202e"):
        assert code not in written
    assert sum(line.count("␛[2J␛]0;title␇") for line in lines) == 3


def labelled(tokenizer, *paths, count):
    """A whole response whose paths begin with labels of so many tokens."""
    *_, whole = growing.steps(tokenizer, "2+2?", growing.text_of(*paths))
    behind, forced = 0, whole.forced.copy()
    for i, token in enumerate(whole.tokens.tolist()):
        forced[i] = behind > 0
        behind = count if token == tokenizer.tag_ids["<Path>"] else behind - 1
    return dataclasses.replace(whole, forced=forced)


@pytest.mark.parametrize("width", [80, 30])
def test_labels_stand_in_headings_and_not_in_paths(by_bytes, width):
    whole = labelled(by_bytes, " 1 east", " 2 west", count=2)
    shown = "\n".join(drawn(by_bytes, [whole], Terminal(width))[0])
    assert re.search(r"path 1 ", shown) and re.search(r"path 2 ", shown)
    assert re.search("│ east", shown) and re.search("│ west", shown)
    assert "1 east" not in shown and "(" not in shown
    named = labelled(by_bytes, "left east", "left west", count=4)
    shown = "\n".join(drawn(by_bytes, [named], Terminal(width))[0])
    assert re.search(r"path 1 \(left\)", shown) and re.search(r"path 2 \(left\)", shown)
    assert re.search("│ east", shown) and "left east" not in shown
    unforced = dataclasses.replace(named, forced=np.zeros_like(named.forced))
    assert "left east" in "\n".join(drawn(by_bytes, [unforced], Terminal(width))[0])


PLANS = (
    "from the left, number by number and without a pause, 数学",
    "from\nthe right",
    "x",
)


@pytest.fixture(scope="module")
def planned(by_bytes):
    """A tokenizer with tags of plans, and a response with three planned paths as it grows."""
    tokenizer = Tokenizer(by_bytes.hf_tokenizer)
    tokenizer.use_plans()
    text = growing.text_of(LEFT, RIGHT, THIRD, plans=PLANS)
    return tokenizer, growing.steps(tokenizer, "2+2?", text, tags.Grammar(planned=True))


@pytest.mark.parametrize("width, height", [(80, 24), (140, 9), (40, 30)])
def test_plans_stand_above_the_paths_and_in_their_headings(planned, width, height):
    tokenizer, seen = planned
    lines, between = drawn(tokenizer, seen, Terminal(width, height))
    assert lines == drawn(tokenizer, seen[-1:], Terminal(width, height))[0]
    shown = "\n".join(lines)
    above, _, below = shown.partition("path 1")
    for number, plan in enumerate(PLANS, start=1):
        words = plan.split()
        assert re.search(rf"plan {number} +{words[0]}", above) and words[-1] in above
        assert re.search(rf"path {number}: {words[0]}", f"path 1{below}")
    assert "Plan>" not in shown and all(len(line) < width for line in lines)
    # The list grows before there are paths.
    first = next(x for x in between if any("plan 3" in line for line in x))
    assert not any("path" in line for line in first)
    stopped, _ = drawn(tokenizer, seen[: len("Let me see: ") + 10], Terminal(width))
    assert any(re.search("plan 1 +from", line) for line in stopped)


def test_a_long_label_leaves_the_columns_straight(by_bytes):
    whole = labelled(by_bytes, "x" * 60 + " a", "x" * 60 + " b", count=60)
    lines = [
        x for x in drawn(by_bytes, [whole], Terminal(80))[0] if x and x[0] in "╭│├"
    ]
    assert len({len(line) for line in lines}) == 1


FIGURES = {"total_tokens": 60, "sequential_steps": 40, "seconds": 0.0, "finished": True}
APART = {"num_blocks": 1, "work_division": [0.375], "identical_paths": [False]}


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"num_blocks": 0}, "no block"),
        ({"num_blocks": 1}, "1 block"),  # older, or malformed
        (APART, "1 block, 38% of the paths' work distinct"),
        (
            {**APART, "work_division": [0.0], "identical_paths": [True]},
            "1 block, 0% of the paths' work distinct, paths identical",
        ),
        (
            APART | {"num_paths": [3]},
            "1 block of 3 paths, 38% of the paths' work distinct",
        ),
        ({"num_blocks": 2, "num_paths": [4, 2]}, "2 blocks of 4 and 2 paths"),
        (
            {
                "num_blocks": 2,
                "work_division": [0.0, 1.0],
                "identical_paths": [True, False],
            },
            "2 blocks, 50% of the paths' work distinct, paths identical in 1",
        ),
    ],
)
def test_what_a_response_took_claims_no_speed_up(record, said):
    """Tokens, steps, and what share of the work was done once; no ratio of the two."""
    shown = view.figures(FIGURES | record, Terminal().console)
    assert shown == f"60 tokens in 40 steps · {said}"
