"""The embedded default: problems, cold-start traces and a tokenizer, made by code.

A stand-in for GSM8K (easy) and DAPO (hard) that needs no download and trains on a CPU
in minutes. A problem asks which two numbers of a list add up to a target, and is
answered with their difference, which cannot be guessed without the pair:

    Which two add to 37? 12 7 25 9 30 4        Final Answer: 13

A way to the answer scans the list, names for each number what it would need, and says
whether the list has it. The two paths of a cold-start block scan from opposite ends:
two different searches of different length, each of which says whether it succeeded; a
path gives up after `MAX_CANDIDATES` numbers, and then only its sibling may have the
answer. As in real traces a path now and then slips and claims a pair that is none; the
summary checks every claim and keeps the right one:

    <Parallel><Path>left 12+25 yes</Path><Path>right 4+33 no 30+9 yes</Path></Parallel>
    <Summary>9+30 no 12+25 yes</Summary>
    Final Answer: 13

Why this and not, say, simultaneous congruences: lists give an endless supply of
problems (two moduli below 100 give a few thousand), a step is one subtraction and one
look-up, so a small model learns it within minutes, and errors add up along a scan, so
that a second, independent search is worth having.
"""

import dataclasses
import zlib

import numpy as np

from pr1_jax import tags, tokenizer

MAX_CANDIDATES = 6  # a path of a trace gives up after so many numbers
SPLITS = ("train", "eval")
_EVAL_SHARE = 8  # one problem in so many belongs to `eval`, by its hash


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of problems: list lengths and the greatest number in a list."""

    min_length: int
    max_length: int
    max_number: int


FAMILIES = {"easy": Family(4, 6, 20), "hard": Family(7, 9, 20)}

_WORDS = ("\n", " ", "+", "? ", " no ", " yes", "left ", "right ")
_WORDS += ("Which two add to ", "Final Answer: ", *map(str, range(100)))
_PATTERN = r"Which two add to |Final Answer: |left |right | no | yes|\? |\d+|."


def make_tokenizer() -> tokenizer.Tokenizer:
    """The word-level tokenizer of the embedded problems: 118 tokens, tags included."""
    return tokenizer.from_words(_WORDS, pattern=_PATTERN + r"|\n")


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
        """`eval` for one problem in eight, by a hash of what is asked."""
        key = repr((self.target, sorted(self.numbers))).encode()
        return "train" if zlib.crc32(key) % _EVAL_SHARE else "eval"


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
    problem: Problem, side: str, *, slip: tuple[int, int] | None = None
) -> tuple[str, tuple[int, int] | None]:
    """A search from one side of the list.

    Args:
      side: `left` or `right`.
      slip: a false claim to end with, instead of the pair; its first number is in the
        list. None = a faultless search of at most `MAX_CANDIDATES` numbers.

    Returns:
      Its text, and the pair that it claims to have found, in the order claimed.
    """
    numbers = problem.numbers if side == "left" else problem.numbers[::-1]
    text = f"{side} "
    for number in numbers[:MAX_CANDIDATES]:
        if slip and number == slip[0]:
            return f"{text}{number}+{slip[1]} yes", slip
        needed = problem.target - number
        if number in problem.pair:
            return f"{text}{number}+{needed} yes", (number, needed)
        text += f"{number}+{needed} no "
    return text, None


def make_slip(
    problem: Problem, side: str, rng: np.random.Generator
) -> tuple[int, int] | None:
    """A false claim at a number that a search passes before it finds the pair.

    Either the second number is right but not in the list, or it is in the list but
    the sum is wrong. None where the search finds the pair at once.
    """
    numbers = problem.numbers if side == "left" else problem.numbers[::-1]
    found = min(numbers.index(number) for number in problem.pair)
    if not found:
        return None
    first = int(rng.choice(numbers[: min(found, MAX_CANDIDATES)]))
    needed = problem.target - first
    if rng.random() < 0.5 and needed > 0:
        return first, needed
    return first, int(rng.choice([n for n in numbers if n != first]))


def make_trace(
    problem: Problem,
    rng: np.random.Generator,
    *,
    block_share: float,
    slip_share: float,
) -> str:
    """A correct response in canonical text; a share of them uses a block.

    In a share of the blocks one path ends with a false claim, if its sibling finds the
    pair. The summary repeats each claim as it was made, once a pair, with its verdict.
    """
    sides = ["left", "right"] if rng.random() < 0.5 else ["right", "left"]
    answer = f"\nFinal Answer: {problem.answer}"
    if rng.random() >= block_share:
        found = [scan(problem, side) for side in sides]
        return next(text for text, claim in found if claim) + answer
    slips = [None, None]
    if rng.random() < slip_share and scan(problem, sides[1])[1]:
        slips[0] = make_slip(problem, sides[0], rng)
    order = rng.permutation(2)
    searches = [scan(problem, sides[i], slip=slips[i]) for i in order]
    paths = "".join(tags.PATH + text + tags.END_PATH for text, _ in searches)
    made = [claim for _, claim in searches if claim]
    claims = {frozenset(claim): claim for claim in made}
    summary = ""
    for x, y in claims.values():
        summary += " " if summary.endswith("yes") else ""
        summary += f"{x}+{y}" + (" yes" if {x, y} == {*problem.pair} else " no ")
    return (
        f"{tags.PARALLEL}{paths}{tags.END_PARALLEL}\n"
        f"{tags.SUMMARY}{summary}{tags.END_SUMMARY}{answer}"
    )


class Problems:
    """Random-access source of problems; record i is a function of seed and i alone.

    Records are dicts of str: `question`, `answer`, and with `block_share` also a
    cold-start `response`. Problems of `train` and `eval` never coincide.
    """

    def __init__(
        self,
        family: str,
        split: str,
        *,
        seed: int,
        size: int = 2**31 - 1,
        block_share: float | None = None,
        hard_share: float = 0.0,
        slip_share: float = 0.4,
    ):
        """Raises ValueError for an unknown family or split.

        Args:
          size: number of records; the default is as good as endless.
          block_share: share of traces with a block; None = no traces.
          hard_share: share of records that are of the hard family instead.
          slip_share: share of blocks in which one path ends with a false claim.
        """
        for name, value, known in (
            ("family", family, tuple(FAMILIES)),
            ("split", split, SPLITS),
        ):
            if value not in known:
                raise ValueError(f"data.{name}={value!r} is not one of {known}")
        self._family, self._split, self._seed, self._size = family, split, seed, size
        self._block_share, self._hard_share = block_share, hard_share
        self._slip_share = slip_share

    def __len__(self) -> int:
        return self._size

    def __repr__(self) -> str:  # part of grain's description of a dataset
        kind = "problems" if self._block_share is None else "traces"
        return f"Problems({self._family}, {self._split}, {kind}, seed={self._seed})"

    def __getitem__(self, index: int) -> dict[str, str]:
        rng = np.random.default_rng([self._seed, SPLITS.index(self._split), int(index)])
        hard = rng.random() < self._hard_share
        family = FAMILIES["hard" if hard else self._family]
        problem = make_problem(family, rng)
        while problem.split != self._split:
            problem = make_problem(family, rng)
        record = {"question": problem.question, "answer": problem.answer}
        if self._block_share is not None:
            record["response"] = make_trace(
                problem,
                rng,
                block_share=self._block_share,
                slip_share=self._slip_share,
            )
        return record
