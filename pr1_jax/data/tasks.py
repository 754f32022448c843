"""Tasks made by code: problems, traces and a tokenizer, for which nothing is downloaded.

A config names one as `data.task`, and its problems and traces as `embedded:FAMILY`. A
further task is a class such as `partner.Partner` and its name in `make` and `_all`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from pr1_jax.data.partner import NUM_ROWS, Partner
from pr1_jax.data.search import Search
from pr1_jax.data.tokenizer import Tokenizer
from pr1_jax.tags import PLAN_TAGS

NOTHING = "no"  # the conclusion of a path that comes to nothing


class Task(Protocol):
    """What a run, a chat and the report need to know of a task made by code."""

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that spells its problems and traces, and nothing else."""

    def records(
        self, family: str, split: str, *, seed: int, traces: bool = False
    ) -> Sequence[dict[str, str]]:
        """Random access to as good as endless records, each drawn by its index.

        Args:
          family: `easy` or `hard`.
          split: `train` or `eval`, which have no problem in common.
          traces: whether records have a `response` beside `question` and `answer`.

        Raises:
          ValueError: an unknown family or split.
        """

    def as_asked(self, question: str) -> str:
        """A question as a person types it in the form that its problems have."""

    def asked(self, question: str) -> str | None:
        """What a question asks for, in plain words; None for one in another language."""

    def conclusion(self, text: str, *, summary: bool = False) -> str | None:
        """What a path or a summary concludes, `NOTHING` if it says so.

        Equal conclusions are equal texts; None for a text in another language.
        """

    def work(self, text: str) -> tuple[str, ...] | None:
        """The distinct steps of work of a path, in order, so that paths can be compared.

        Equal steps are equal texts; None for a text in another language.
        """


TASKS = {"partner": Partner, "search": Search}


def make(given: str = "partner") -> Task:
    """The task that `data.task` names, with its options.

        >>> make("partner:block_share=0.75,late_share=0.5")
        Partner(block_share=0.75, late_share=0.5, own_row_share=0.1, paths=2, planned=0)

    Raises:
      ValueError: there is no such task, or it has no such option.
    """
    name, _, rest = given.partition(":")
    options: dict[str, float] = {}
    for option, _, value in (x.partition("=") for x in rest.split(",") if x):
        if option in options:
            raise ValueError(f"data.task={given} names {option} twice")
        try:
            options[option] = float(value)
        except ValueError as error:
            raise ValueError(
                f"data.task={given}: {option}={value} is not a number"
            ) from error
    if name not in TASKS:
        raise ValueError(f"data.task={given} is not one of {tuple(TASKS)}")
    known = [field.name for field in dataclasses.fields(TASKS[name])]
    if wrong := [option for option in options if option not in known]:
        raise ValueError(f"data.task={given}: {wrong[0]} is not one of {known}")
    try:
        return TASKS[name](**options)
    except ValueError as error:
        raise ValueError(f"data.task={given}: {error}") from error


def _all() -> list[Task]:
    return [make(name) for name in TASKS]


def spoken(tokenizer: Tokenizer, num_paths: int = 2) -> Task | None:
    """The task whose language is all that a tokenizer can spell, if there is one.

    Args:
      num_paths: of a block, by which a task may make its problems; tags of plans may be
        in the tokenizer or not.
    """
    vocabulary = lambda x: {*x.hf_tokenizer.get_vocab()} - {*PLAN_TAGS}
    mine = vocabulary(tokenizer)
    task = next((t for t in _all() if vocabulary(t.tokenizer()) == mine), None)
    if isinstance(task, Partner) and num_paths in NUM_ROWS:
        return dataclasses.replace(task, paths=num_paths)
    return task


def asked(question: str) -> str | None:
    """Returns `Task.asked` of the first task that can read the question; None if none can."""
    read = (task.asked(question) for task in _all())
    return next((words for words in read if words is not None), None)


def conclusion(text: str, *, summary: bool = False) -> str | None:
    """Returns `Task.conclusion` of the first task that can read the text; None if none can."""
    read = (task.conclusion(text, summary=summary) for task in _all())
    return next((reached for reached in read if reached is not None), None)


def work(text: str) -> tuple[str, ...] | None:
    """Returns `Task.work` of the first task that can read the text; None if none can."""
    read = (task.work(text) for task in _all())
    return next((steps for steps in read if steps is not None), None)
