"""Problems and cold-start traces in batches, through grain (docs/method.md, section 6).

`problem_stream` and `trace_stream` turn records of text (`sources.open_source`) into
batches: shuffled anew each epoch, tokenised in threads, filtered with every drop counted,
sharded over processes, resumed exactly. `held_out` gives the problems of an evaluation.

Sharding comes after filtering: each process tokenises the global batch and keeps every
`process_count`-th item of it. So batch k is the same whatever the number of processes; to
shard before filtering would make it depend on which records are dropped.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import grain
from absl import logging

from pr1_jax import tags
from pr1_jax.data import prompts, traces
from pr1_jax.data.prompts import Problem
from pr1_jax.data.records import NO_ANSWER, NO_QUESTION, NO_RESPONSE, Record
from pr1_jax.data.rows import UNREADABLE, Dropped
from pr1_jax.data.sources import Source
from pr1_jax.data.tokenizer import Tokenizer
from pr1_jax.trajectory import Trajectory

# After so many drops in a row a source is taken to hold nothing of use; after fewer of
# them if none of its records was of use before.
_MAX_DROPS = 50_000
_MAX_FIRST_DROPS = 2_000
_READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=128)

_FIRST = 100  # records of which an item is made when a stream opens, until there is one

# Why a record is dropped: by the limits of a run, or since it is of no use.
PROMPT_TOO_LONG, PROMPT_EMPTY = "prompt_too_long", "prompt_empty"
RESPONSE_TOO_LONG, MALFORMED = "response_too_long", "malformed"
REFUSED = "refused_by_template"
USELESS = (NO_QUESTION, NO_ANSWER, NO_RESPONSE, UNREADABLE)
LIMITS = (PROMPT_TOO_LONG, RESPONSE_TOO_LONG, MALFORMED, PROMPT_EMPTY, REFUSED)
REASONS = (*LIMITS, *USELESS)

T = TypeVar("T")


class _Items(Sequence[T]):
    """Items made of records, in their order; a `Dropped` where none can be made."""

    def __init__(self, source: Source, make: Callable[[Record], T]):
        self._source, self._make = source, make

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> T | Dropped:
        try:
            return self._make(self._source[index])
        except Dropped as drop:
            return drop


class Stream(grain.DatasetIterator[list[T]]):
    """An iterator over batches, endless unless `epochs` bounds it; made by `*_stream`.

    Its state is JSON: the position in the data and the counts. All processes have the
    same state. The last batch of a bounded stream may be short.
    """

    _closed = True  # for grain's `__del__`, where `__init__` fails

    def __init__(
        self,
        source: Source,
        make: Callable[[Record], T],
        *,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        epochs: int | None = None,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """Makes the pipeline.

        Args:
          make: makes an item of a record, or raises `Dropped`.
          batch_size: items in a batch of one process.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} is not positive")
        if not 0 <= process_index < process_count:
            raise ValueError(f"{process_index=} is not below {process_count=}")
        if not len(source):
            raise ValueError("the data holds no records")
        items = _Items(source, make)
        for index in range(min(len(items), _FIRST)):  # a template that fails fails now
            if not isinstance(items[index], Dropped):
                break
        dataset = grain.MapDataset.source(items).seed(seed)
        if shuffle:
            dataset = dataset.shuffle()  # by a permutation of indices, never held
        dataset = dataset.repeat(epochs).to_iter_dataset(_READ)
        super().__init__(iter(dataset))
        self._kept = 0  # records so far of which an item was made
        self._dropped: Counter[str] = Counter()  # and the others, by reason
        self._batch_size = batch_size * process_count
        self._shard = slice(process_index, None, process_count)
        self._log = process_index == 0
        self._records = len(source)

    def __next__(self) -> list[T]:
        batch: list[T] = []
        in_a_row = 0
        for item in self._parent:
            if isinstance(item, Dropped):
                in_a_row += 1
                self._drop(item, in_a_row)
            else:
                in_a_row = 0
                self._kept += 1
                batch.append(item)
            if self._log and self._dropped and self._seen == self._records:
                logging.warning("%s", self.summary)  # all records were read once
            if len(batch) == self._batch_size:
                break
        if not self._kept:
            raise ValueError(f"the data holds no usable record: {self.summary}")
        if not batch:
            raise StopIteration
        return batch[self._shard]

    @property
    def counts(self) -> dict[str, int]:
        """Records up to this batch: `kept`, and those dropped by reason (`REASONS`).

        A record counts as often as it was read: once an epoch.
        """
        return {"kept": self._kept, **self._dropped}

    @property
    def summary(self) -> str:
        """The counts in a line: `kept 30 of 60 records: 30 prompt too long`."""
        return _summary(self._kept, self._dropped)

    def get_state(self) -> dict[str, Any]:
        """Position after the last batch, as JSON."""
        return {
            "parent": self._parent.get_state(),
            "counts": dict(self._dropped),
            "items": self._kept,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from a state of a stream with the same arguments."""
        self._parent.set_state(state["parent"])
        self._kept = state["items"]
        self._dropped = Counter()
        for reason, count in state["counts"].items():  # older versions had others
            self._dropped[reason if reason in REASONS else MALFORMED] += count

    @property
    def _seen(self) -> int:
        return self._kept + self._dropped.total()

    def _drop(self, item: Dropped, in_a_row: int) -> None:
        if self._log and not self._dropped[item.reason]:
            text = "dropping a record (%s, further ones are only counted): %s"
            logging.warning(text, _words(item.reason), str(item))
        self._dropped[item.reason] += 1
        limit = _MAX_DROPS if self._kept else _MAX_FIRST_DROPS
        # Whole epochs differ in order: only two hold every record in any case.
        if in_a_row >= min(2 * self._records, limit):
            raise ValueError(
                f"{in_a_row} records in a row were dropped ({self.summary}); "
                f"the last one: {item}"
            )


def problem_stream(
    source: Source,
    tokenizer: Tokenizer,
    *,
    template: str | prompts.Template,
    max_prompt_tokens: int,
    allow_tags: bool = True,
    **stream_args: Any,
) -> Stream[Problem]:
    """Batches of problems; `stream_args` (batch_size, seed, …) are those of `Stream`.

    `template` and `allow_tags` are those of `prompt_tokens`.
    """
    given = tokenizer, template, max_prompt_tokens, allow_tags
    return Stream(source, lambda record: _problem(record, *given), **stream_args)


def trace_stream(
    source: Source,
    tokenizer: Tokenizer,
    *,
    variant: str,
    template: str | prompts.Template,
    max_prompt_tokens: int,
    max_response_tokens: int,
    grammar: tags.Grammar = tags.PLAIN,
    **stream_args: Any,
) -> Stream[Trajectory]:
    """Batches of cold-start traces, brought into canonical form and laid out.

    Paths get the labels of `grammar` that they lack. A trace is dropped as malformed if
    it does not pass the format check, has no canonical form (stray text in a block, more
    paths than labels), or if its tokens cannot be laid out.
    """
    given = (
        tokenizer,
        variant,
        template,
        max_prompt_tokens,
        max_response_tokens,
        grammar,
    )
    return Stream(source, lambda record: _trace(record, *given), **stream_args)


def held_out(
    source: Source,
    tokenizer: Tokenizer,
    *,
    template: str | prompts.Template,
    max_prompt_tokens: int,
    limit: int,
) -> list[Problem]:
    """The first `limit` problems, in order, for evaluation.

    Records of no use (`USELESS`) are left out, counted and named in the log.

    Raises:
      ValueError: a prompt is empty, longer than its budget or refused by the chat
        template. Such problems of a benchmark are not left out.
    """
    problems: list[Problem] = []
    dropped: list[Dropped] = []
    for index in range(len(source)):
        if len(problems) >= limit:
            break
        try:
            made = _problem(source[index], tokenizer, template, max_prompt_tokens)
        except Dropped as drop:
            if drop.reason in USELESS:
                dropped.append(drop)
                continue
            what = f"held-out problem {index}"
            if drop.reason == PROMPT_TOO_LONG:
                limit = f"rollout.max_prompt_tokens={max_prompt_tokens}"
                what = f"{limit}: the prompt of {what} is longer"
            elif drop.reason == PROMPT_EMPTY:
                what += " has an empty prompt"
            raise ValueError(f"{what}: {drop}") from drop
        problems.append(made)
    if not problems:
        raise ValueError(f"no problem to evaluate on: eval.problems={limit}")
    if dropped:
        counts = Counter(drop.reason for drop in dropped)
        text = "held-out problems: %s; the first of no use: %s"
        logging.warning(text, _summary(len(problems), counts), str(dropped[0]))
    return problems


def _summary(kept: int, dropped: Counter[str]) -> str:
    """The counts in a line: `kept 30 of 60 records: 30 prompt too long`."""
    reasons = ", ".join(f"{n} {_words(reason)}" for reason, n in dropped.items())
    text = f"kept {kept} of {kept + dropped.total()} records"
    return f"{text}: {reasons}" if reasons else text


def _words(reason: str) -> str:
    return reason.replace("_", " ")


def _problem(
    record: Record,
    tokenizer: Tokenizer,
    template: str | prompts.Template,
    max_prompt_tokens: int,
    allow_tags: bool = True,
) -> Problem:
    question, settings = record["question"], {"allow_tags": allow_tags}
    settings |= {"template": template}
    messages = json.loads(record.get("messages", "null"))
    try:
        prompt = prompts.prompt_tokens(
            question, tokenizer, messages=messages, **settings
        )
    except ValueError as error:
        prompts.prompt_tokens(question, tokenizer, **settings)  # fails for any record?
        raise Dropped(REFUSED, f"{error}: {question[:60]!r}") from error
    if not len(prompt):  # nothing would predict the first token
        raise Dropped(PROMPT_EMPTY, f"no token: {str(record)[:60]}")
    if len(prompt) > max_prompt_tokens:
        detail = f"{len(prompt)} tokens, {max_prompt_tokens=}"
        raise Dropped(PROMPT_TOO_LONG, f"{detail}: {question[:60]!r}")
    return Problem(question, record.get("answer", ""), prompt)


def _trace(
    record: Record,
    tokenizer: Tokenizer,
    variant: str,
    template: str | prompts.Template,
    max_prompt_tokens: int,
    max_response_tokens: int,
    grammar: tags.Grammar,
) -> Trajectory:
    prompt = _problem(record, tokenizer, template, max_prompt_tokens).prompt
    about = f": {record['question'][:60]!r}"
    if faults := tags.check_format(record["response"], grammar.unlabelled):
        raise Dropped(MALFORMED, faults[0] + about)
    try:
        response = tags.canonical(record["response"], grammar)
        trace = traces.from_text(
            prompt, response, tokenizer, variant=variant, grammar=grammar
        )
    except ValueError as error:
        raise Dropped(MALFORMED, str(error) + about) from error
    if len(trace.tokens) > max_response_tokens:
        detail = f"{len(trace.tokens)} tokens, {max_response_tokens=}"
        raise Dropped(RESPONSE_TOO_LONG, detail + about)
    return trace
