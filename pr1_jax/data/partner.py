"""The task made by code that is the default: search a list for a number with a partner.

A problem is a list of 20 numbers (the easy ones: 16 or 20) in two rows. Exactly one
number has a partner that is a given gap larger, and that number is the answer:

    Which number has a partner 4 larger? A 41 12 7 30 … B 18 34 16 … 3

A search begins at one of the rows and goes on with the other. Of each number it says what
the partner would be and whether the list has it, until it has found it:

    A 41>45 no 12>16 yes 12

A cold-start trace is one such search, or a block whose paths search a row each, of their
own choice:

    <Parallel><Path> B 18>22 no …</Path><Path> A 41>45 no 12>16 yes 12</Path></Parallel>
    <Summary> 12</Summary>
    Final Answer: 12

Rows are drawn at random, but for a slight habit, which teachers have too: a tenth of the
paths (`own_row_share`) begin with the row of their own number whatever is drawn, so that
55 % of two paths' do. Both habits of searching
are patient: a search in the main stream goes on until it finds, a path until it finds or
its row ends. A block whose paths do not find it
ends with the answer 0, which is wrong, and is kept: traces that are filtered for success
make paths look better than they are. For four paths there are four rows of half the length.

Where blocks are planned (`planned`), there are from two plans to as many as the list has
rows, each naming another row at random, and a path searches from the row of its plan until
it finds or comes to the row of another plan:

    <Parallel><Plan> C</Plan><Plan> A</Plan><Path> C 18>22 no …</Path><Path> A 41>45 no …

So a block always finds; how long that takes depends on which rows the plans name, and how
many they are is what RL has to decide: more paths are shorter ones, but each costs the
main stream a plan, and all of them a share of the tokens.

Why this task: a search costs 3 tokens a number and cannot be cut short, so that a deadline
of so many sequential steps says how much of the list a response can see. Blocks pay
exactly where two paths see more of it than one search. For every deadline, number of
paths and labelling the best accuracy is known (`pr1_jax.study.optimum`). Paths that begin
at the same row do the same work; with labels they can learn to divide the rows among
them. The habit starts that: after SFT about half of the work is done twice, with or
without it, but without it labels say nothing of rows at first, and how long it takes
until they do differs from seed to seed (`pr1_jax.study`, experiment `division`). Sums of two small numbers are learned by a million parameters within minutes, and
there are more lists than can be seen. Numbers begin with 1 so that the labels ` 1`
and ` 2` are words that the model knows: labels that stand nowhere else had less influence
on a path after SFT, and RL took longer to tell paths apart by them (two seeds each).
"""

import dataclasses
import re
from collections.abc import Iterator

import numpy as np

from pr1_jax import tags
from pr1_jax.data import endless, tokenizer, tokenizer_files

ROWS, NUM_ROWS = "ABCD", (2, 4)
# What a summary says where no path has found it, and the answer then.
NONE, WRONG = "none", "0"


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of problems.

    Attributes:
      lengths: of the list. gaps: asked for.
      numbers: least and greatest of a number and of what its partner would be, so that no
        number is known to have none before it is looked up.
    """

    lengths: tuple[int, ...]
    numbers: tuple[int, int] = (1, 60)
    gaps: tuple[int, int] = (2, 9)


FAMILIES = {"easy": Family((16, 20)), "hard": Family((20,))}

_QUESTION, _LARGER = "Which number has a partner", " larger?"
# "yes" and the number are one token, so that who reads it later need not look back.
_ANSWER, _NO, _YES = "\nFinal Answer:", " no", " yes "
_NUMBERS = range(100)
_WORDS = (_QUESTION, _LARGER, _ANSWER, _NO, f" {NONE}", "\n", " ")
_WORDS += (*(f" {row}" for row in ROWS), *(f" {n}" for n in _NUMBERS))
_WORDS += tuple(sign + str(n) for sign in (">", _YES) for n in _NUMBERS)
_PATTERN = "|".join((_QUESTION, re.escape(_LARGER), _ANSWER, f" {NONE}", _NO))
_PATTERN += rf"|{_YES}\d+| [{ROWS}]| \d+|>\d+|\n|."

_ASKED = re.compile(rf"{_QUESTION} (\d+){re.escape(_LARGER)}(?: [{ROWS}]| \d+)+\s*")
_STEP = re.compile(rf" (\d+)>(\d+)({_NO}|{_YES}\d+)?")
_SEARCH = re.compile(rf"(?: ?[{ROWS}]| \d+(?:>\d+)?|{_NO}|{_YES}\d+)+")
_BARE = re.compile(rf"(?: ?[{ROWS}]| \d+)*")
_SUMMARY = re.compile(rf" (\d+|{NONE})\s*")


@dataclasses.dataclass(frozen=True)
class Problem:
    """Numbers in rows of one length, of which one, the answer, has a partner."""

    numbers: tuple[int, ...]
    gap: int
    answer: int
    rows: int

    @property
    def row_length(self) -> int:
        """Numbers in a row."""
        return len(self.numbers) // self.rows

    @property
    def question(self) -> str:
        """Text of the prompt."""
        text, n = f"{_QUESTION} {self.gap}{_LARGER}", self.row_length
        for i, row in enumerate(ROWS[: self.rows]):
            text += f" {row} {' '.join(map(str, self.numbers[i * n : (i + 1) * n]))}"
        return text + "\n"

    @property
    def split(self) -> str:
        """As `endless.split_of`."""
        return endless.split_of(self.gap, self.numbers)


def make_problem(family: Family, rows: int, rng: np.random.Generator) -> Problem:
    """A random problem with exactly one number that has a partner."""
    low, high = family.numbers
    length = int(rng.choice(family.lengths))
    gap = int(rng.integers(family.gaps[0], family.gaps[1] + 1))
    high -= gap
    answer = int(rng.integers(low, high - gap + 1))
    while True:
        chosen = {answer, answer + gap}
        for number in (rng.permutation(high - low + 1) + low).tolist():
            if not {number - gap, number, number + gap} & chosen:
                chosen.add(number)
            if len(chosen) == length:
                numbers = rng.permutation(sorted(chosen)).tolist()
                return Problem(tuple(numbers), gap, answer, rows)


def search(problem: Problem, row: int, limit: int) -> tuple[str, bool]:
    """A search from a row of the list, after the last one going on with the first.

    Args:
      row: from 0. limit: numbers after which it gives up.

    Returns:
      Its text, and whether it found the answer.
    """
    numbers, n, text = problem.numbers, problem.row_length, ""
    for i in range(limit):
        index = (row * n + i) % len(numbers)
        if index % n == 0:
            text += f" {ROWS[index // n]}"
        number = numbers[index]
        text += f" {number}>{number + problem.gap}"
        if number == problem.answer:
            return f"{text}{_YES}{number}", True
        text += _NO
    return text, False


def _make_plans(
    rows: int, rng: np.random.Generator
) -> tuple[str, list[tuple[int, int]]]:
    """Random plans as text, and the first row of each path with how many it has."""
    starts = rng.permutation(rows)[: rng.integers(2, rows + 1)].tolist()
    text = "".join(f"{tags.PLAN} {ROWS[row]}{tags.END_PLAN}" for row in starts)
    until = lambda row: min((other - row - 1) % rows + 1 for other in starts)
    return text, [(row, until(row)) for row in starts]


def make_trace(
    problem: Problem,
    rng: np.random.Generator,
    block_share: float,
    late_share: float = 0.0,
    own_row_share: float = 0.0,
    planned: bool = False,
) -> str:
    """A response in canonical text, without labels; a share of them uses a block.

    Of the blocks `late_share` come after a search of one to three numbers, which may have
    found the answer by then. A block has as many paths as there are rows, and of its paths
    `own_row_share` begin with the row of their own number, the others with any; but as
    many as it has plans, where it is planned.
    """
    draw = lambda: int(rng.integers(problem.rows))
    answer = f"{_ANSWER} {problem.answer}"
    if rng.random() >= block_share:
        return search(problem, draw(), len(problem.numbers))[0] + answer
    before = ""
    if rng.random() < late_share:
        before, found = search(problem, draw(), int(rng.integers(1, 4)))
        if found:
            return before + answer
    if planned:
        text, starts = _make_plans(problem.rows, rng)
    else:
        own = lambda path: rng.random() < own_row_share
        rows = range(problem.rows)
        text, starts = "", [(path if own(path) else draw(), 1) for path in rows]
    found = False
    for row, length in starts:
        said, success = search(problem, row, length * problem.row_length)
        text += tags.PATH + said + tags.END_PATH
        found |= success
    summary, result = (problem.answer,) * 2 if found else (NONE, WRONG)
    return (
        f"{before}{tags.PARALLEL}{text}{tags.END_PARALLEL}\n"
        f"{tags.SUMMARY} {summary}{tags.END_SUMMARY}{_ANSWER} {result}"
    )


@dataclasses.dataclass(frozen=True)
class Partner:
    """The task, and what its traces are like (`pr1_jax.data.tasks.Task`).

    Attributes:
      block_share: share of traces with a block.
      late_share: share of blocks that come after some searching.
      own_row_share: share of paths without plans that begin with the row of their own
        number (the first with A), the others with any.
      paths: paths of a block, and rows of a list: 2 or 4.
      planned: 1 = blocks are planned (`rollout.planned`), and `paths` is the most that
        they have; 0 = they are not.
    """

    block_share: float = 0.5
    late_share: float = 0.0
    own_row_share: float = 0.1
    paths: float = 2
    planned: float = 0

    def __post_init__(self):
        for name in ("block_share", "late_share", "own_row_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be from 0 to 1")
        if self.paths not in NUM_ROWS:
            raise ValueError(f"paths={self.paths} must be 2 or 4")
        if self.planned not in (0, 1):
            raise ValueError(f"planned={self.planned} must be 0 or 1")

    def tokenizer(self) -> tokenizer.Tokenizer:
        """The word-level tokenizer of the task."""
        return tokenizer_files.from_words(_WORDS, pattern=_PATTERN)

    def records(
        self, family: str, split: str, *, seed: int, traces: bool = False
    ) -> endless.Records:
        """As `Task.records`."""
        shares = self.block_share, self.late_share, self.own_row_share
        trace = lambda problem, rng: make_trace(
            problem, rng, *shares, planned=bool(self.planned)
        )

        def draw(rng: np.random.Generator) -> Iterator[Problem]:
            while True:
                yield make_problem(FAMILIES[family], int(self.paths), rng)

        return endless.Records(
            "Partner",
            FAMILIES,
            family,
            split,
            seed=seed,
            draw=draw,
            trace=trace if traces else None,
        )

    def as_asked(self, question: str) -> str:
        """As `Task.as_asked`."""
        return question.strip() + "\n"

    def asked(self, question: str) -> str | None:
        """As `Task.asked`."""
        if not (match := _ASKED.fullmatch(question)):
            return None
        *rows, last = [row for row in ROWS if f" {row} " in question]
        return (
            f"One number in rows {', '.join(rows)} and {last} has a partner there that "
            f"is {match[1]} larger. The answer is that number."
        )

    def conclusion(self, text: str, *, summary: bool = False) -> str | None:
        """The number that a search or a summary names, or "no"."""
        if summary:
            match = _SUMMARY.fullmatch(text)
            return match and ("no" if match[1] == NONE else match[1])
        *_, last = (None, *_STEP.finditer(text))
        if last is None or not _SEARCH.fullmatch(text):
            return None
        done = (last[3] or "").startswith(_YES) and last.end() == len(text)
        return last[3].removeprefix(_YES) if done else "no"

    def work(self, text: str) -> tuple[str, ...] | None:
        """The distinct numbers that a search looked at, each with its partner: `51>55`.

        Letters and numbers alone may be a text of any language.
        """
        if not _SEARCH.fullmatch(text) or _BARE.fullmatch(text):
            return None
        steps = (f"{step[1]}>{step[2]}" for step in _STEP.finditer(text))
        return tuple(dict.fromkeys(steps))
