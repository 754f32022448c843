r"""A task made by code, for comparison: search for a pair of numbers.

It was the default before `pr1_jax.data.partner`. One patient search solves it in as few
steps as two side by side, so that blocks need not pay. It has budgets of its own, and no
deadline or labels:

    python -m pr1_jax.main --config=rl_alternating --config.data.task=search \
        --config.rollout.max_sequential_steps=0 --config.rollout.path_labels="()" \
        --config.rollout.max_prompt_tokens=28 --config.rollout.max_response_tokens=92 \
        --config.rollout.max_path_tokens=36 --config.rollout.max_summary_tokens=8 \
        --config.rollout.summary_reserve=8 --config.rollout.answer_reserve=6 \
        --config.data.sft=embedded:easy

A problem asks which two numbers of a list add up to a target, and is answered with their
difference, which cannot be guessed without the pair:

    Which two add to 25? 12 7 13 9 20 4        Final Answer: 1

A search scans the list from one end, names for each number what it would need, says
whether the list has it. A cold-start block has two of them as its paths, from opposite
ends. Most are impatient: they may give up after any number that fails. Each says whether
it succeeded, and the summary says who did (`left`, `right` or `both`):

    <Parallel><Path>left 12+13 yes</Path><Path>right 4+21 no 20+5 no </Path></Parallel>
    <Summary>left 12+13</Summary>
    Final Answer: 1

Attempts in which neither does are not kept, as with traces of a teacher; traces without
a block scan until they succeed. So SFT on short lists teaches the form, and to give up,
which on long lists is what fails most often; RL finds out that it pays to go on.

The model draws the sides of two paths independently:
both begin with the same token at the same position and cannot see each other, so about
half of its blocks scan from one side only.
"""

import dataclasses
import re
from collections.abc import Iterator

import numpy as np

from pr1_jax import tags
from pr1_jax.data import endless, tokenizer, tokenizer_files

PATIENT = 0.06  # share of paths in traces that never give up;
GIVING_UP = 0.9  # the others do so after any number with this chance


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of problems: list lengths and the greatest number in a list."""

    min_length: int
    max_length: int
    max_number: int


FAMILIES = {"easy": Family(4, 7, 20), "hard": Family(8, 10, 20)}

_WORDS = ("\n", " ", "+", "? ", " no ", " yes", "left ", "right ", "both ")
_WORDS += ("Which two add to ", "Final Answer: ", *map(str, range(100)))
_PATTERN = r"Which two add to |Final Answer: |left |right |both | no | yes|\? |\d+|."

_QUESTION = re.compile(r"Which two add to ([0-9]+)\?(?: [0-9]+)+\s*")
_SEARCH = re.compile(r"\s*(?:left|right)\b")  # how a search begins
_FOUND = re.compile(r"([0-9]{1,3})\+([0-9]{1,3}) yes\s*")
_STEP = re.compile(r"[0-9]{1,3}\+[0-9]{1,3}")  # of work: a number, and what it needs
_SUMMARY = re.compile(r"(?:left|right|both) ([0-9]{1,3})\+([0-9]{1,3})\s*")


@dataclasses.dataclass(frozen=True)
class Problem:
    """A list of numbers, two of which (the pair) add up to the target."""

    numbers: tuple[int, ...]
    target: int
    pair: tuple[int, int]  # ascending

    @property
    def question(self) -> str:
        """Text of the prompt."""
        numbers = " ".join(map(str, self.numbers))
        return f"Which two add to {self.target}? {numbers}\n"

    @property
    def answer(self) -> str:
        """Reference answer: the difference of the pair."""
        return str(self.pair[1] - self.pair[0])

    @property
    def split(self) -> str:
        """As `endless.split_of`."""
        return endless.split_of(self.target, self.numbers)


def make_problem(family: Family, rng: np.random.Generator) -> Problem:
    """A random problem with exactly one pair that adds up to its target."""
    length = int(rng.integers(family.min_length, family.max_length + 1))
    while True:
        x, y = sorted(rng.choice(family.max_number, 2, replace=False) + 1)
        target = int(x + y)
        others = np.arange(1, min(family.max_number, target - 1) + 1)
        others = rng.permutation(others[(others != x) & (others != y)])
        chosen: list[int] = []
        for number in others.tolist():
            if target - number not in (*chosen, number) and len(chosen) < length - 2:
                chosen.append(number)
        if len(chosen) == length - 2:
            numbers = rng.permutation([int(x), int(y), *chosen])
            return Problem(tuple(numbers.tolist()), target, (int(x), int(y)))


def scan(
    problem: Problem, side: str, limit: int | None = None
) -> tuple[str, tuple[int, int] | None]:
    """A search from one side of the list.

    Args:
      side: `left` or `right`.
      limit: gives up after so many numbers; None = after the last.

    Returns:
      Its text, and the pair in the order in which it was found, or None.
    """
    numbers = problem.numbers if side == "left" else problem.numbers[::-1]
    text = f"{side} "
    for number in numbers[:limit]:
        needed = problem.target - number
        if number in problem.pair:
            return f"{text}{number}+{needed} yes", (number, needed)
        text += f"{number}+{needed} no "
    return text, None


def _draw_limit(rng: np.random.Generator) -> int | None:
    return None if rng.random() < PATIENT else int(rng.geometric(GIVING_UP))


def make_trace(
    problem: Problem,
    rng: np.random.Generator,
    block_share: float,
    late_share: float = 0.0,
) -> str:
    """A correct response in canonical text; a share of them uses a block.

    Without a block it is one search that never gives up. Of the blocks `late_share` come
    after a search of one to three numbers, which may have found the pair by then.
    """
    sides = ["left", "right"] if rng.random() < 0.5 else ["right", "left"]
    answer = f"\nFinal Answer: {problem.answer}"
    if rng.random() >= block_share:
        return scan(problem, sides[0])[0] + answer
    found: list[tuple[str, tuple[int, int]]] = []
    while not found:  # as with a teacher, only attempts that succeed are kept
        searches = [scan(problem, side, _draw_limit(rng)) for side in sides]
        found = [(side, pair) for side, (_, pair) in zip(sides, searches) if pair]
    before = ""
    if late_share and rng.random() < late_share:  # else the draws are what they were
        before = scan(problem, sides[0], int(rng.integers(1, 4)))[0]
    side, pair = found[0]
    paths = "".join(tags.PATH + text + tags.END_PATH for text, _ in searches)
    who = "both" if len(found) == 2 else side
    return (
        f"{before}{tags.PARALLEL}{paths}{tags.END_PARALLEL}\n"
        f"{tags.SUMMARY}{who} {pair[0]}+{pair[1]}{tags.END_SUMMARY}{answer}"
    )


@dataclasses.dataclass(frozen=True)
class Search:
    """The task, and what its traces are like (`pr1_jax.data.tasks.Task`).

    Attributes:
      block_share: share of traces with a block.
      hard_share: share of traces that are of the hard family, whichever was asked for.
      late_share: share of blocks that come after some searching.
    """

    block_share: float = 1.0
    hard_share: float = 0.0
    late_share: float = 0.0

    def __post_init__(self):
        for name, value in vars(self).items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value} must be from 0 to 1")

    def tokenizer(self) -> tokenizer.Tokenizer:
        """The word-level tokenizer of the task: 119 tokens, tags included."""
        return tokenizer_files.from_words(_WORDS, pattern=_PATTERN + r"|\n")

    def records(
        self, family: str, split: str, *, seed: int, traces: bool = False
    ) -> endless.Records:
        """As `Task.records`."""
        trace = lambda problem, rng: make_trace(
            problem, rng, self.block_share, self.late_share
        )

        def draw(rng: np.random.Generator) -> Iterator[Problem]:
            hard = rng.random() < self.hard_share and traces
            while True:
                yield make_problem(FAMILIES["hard" if hard else family], rng)

        return endless.Records(
            "Problems",
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
        if not (match := _QUESTION.fullmatch(question)):
            return None
        return (
            f"Two of the listed numbers add up to {match[1]}. The answer is their "
            "difference."
        )

    def conclusion(self, text: str, *, summary: bool = False) -> str | None:
        """The pair that a search or a summary names, ascending: `12+13`; or "no"."""
        if summary:
            match = _SUMMARY.fullmatch(text)
        elif _SEARCH.match(text):
            *_, match = (None, *_FOUND.finditer(text))
            if match is None or match.end() != len(text):
                return "no"
        else:
            match = None
        return "+".join(sorted(match.groups(), key=int)) if match else None

    def work(self, text: str) -> tuple[str, ...] | None:
        """The numbers that a search looked at, each with what it needs: `12+13`."""
        if not (start := _SEARCH.match(text)):
            return None
        steps = tuple(dict.fromkeys(_STEP.findall(text)))
        return steps if steps or not text[start.end() :].strip() else None
