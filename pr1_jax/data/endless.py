"""Records of problems that code draws: as good as endless, and split by what is asked."""

import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

SPLITS = ("train", "eval")
_EVAL_SHARE = 8  # one problem in so many belongs to `eval`, by its hash


class Problem(Protocol):
    """A problem of a task made by code."""

    @property
    def question(self) -> str:
        """Text of the prompt."""

    @property
    def answer(self) -> Any:
        """Reference answer, as text or as a number."""

    @property
    def split(self) -> str:
        """The one of `SPLITS` that it belongs to."""


def split_of(number: int, numbers: Sequence[int]) -> str:
    """`eval` for one problem in eight, by a hash of a list and of the number asked for."""
    key = repr((number, sorted(numbers))).encode()
    return "train" if zlib.crc32(key) % _EVAL_SHARE else "eval"


class Records:
    """Random access to records of a family; record i is a function of seed and i alone.

    Records are dicts of str: `question`, `answer`, and of traces the `response`.
    """

    def __init__(
        self,
        name: str,
        families: Collection[str],
        family: str,
        split: str,
        *,
        seed: int,
        draw: Callable[[np.random.Generator], Iterator[Problem]],
        trace: Callable[[Any, np.random.Generator], str] | None,
    ):
        """Opens them; nothing is drawn yet.

        Args:
          name: of the task, in grain's description of a dataset.
          families: those that the task has. family, split: of these records.
          draw: draws problems of the family, whatever their split, one after the other.
          trace: makes a response to a problem; None for records without one.

        Raises:
          ValueError: an unknown family or split.
        """
        for what, value, known in (
            ("family", family, tuple(families)),
            ("split", split, SPLITS),
        ):
            if value not in known:
                raise ValueError(f"data.{what}={value!r} is not one of {known}")
        self._name, self._family, self._split = name, family, split
        self._seed, self._draw, self._trace = seed, draw, trace

    def __len__(self) -> int:
        return 2**31 - 1

    def __repr__(self) -> str:  # part of grain's description of a dataset
        kind = "traces" if self._trace else "problems"
        return f"{self._name}({self._family}, {self._split}, {kind}, seed={self._seed})"

    def __getitem__(self, index: int) -> dict[str, str]:
        rng = np.random.default_rng([self._seed, SPLITS.index(self._split), int(index)])
        problem = next(p for p in self._draw(rng) if p.split == self._split)
        record = {"question": problem.question, "answer": str(problem.answer)}
        if self._trace:
            record["response"] = self._trace(problem, rng)
        return record
