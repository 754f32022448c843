"""Problems and cold-start traces through grain (spec section 6).

`open_source` gives random access to records of text: made by code, from local files,
from tensorflow-datasets or from the Hugging Face hub. `problem_stream` and
`trace_stream` turn them into batches: shuffled anew each epoch, tokenised in threads,
filtered by length with every drop counted, sharded over processes, resumed exactly.
`held_out` gives the problems of an evaluation, in order.

Sharding comes after filtering: each process tokenises the global batch and keeps every
`process_count`-th record of it. So batch k is the same whatever the number of
processes; to shard before filtering would make it depend on where the drops fall.
"""

import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import grain
from absl import logging

from pr1_jax import tags
from pr1_jax.data import prompts, sources, traces
from pr1_jax.data.prompts import Problem
from pr1_jax.data.sources import Source
from pr1_jax.data.tokenizer import Tokenizer
from pr1_jax.trajectory import Trajectory

# After so many drops in a row an endless source is taken to hold nothing of use; after
# fewer of them if none of its records was of use before.
_MAX_DROPS = 50_000
_MAX_FIRST_DROPS = 2_000
_READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=128)

T = TypeVar("T")
open_source = sources.open_source


class Stream(grain.DatasetIterator[list[T]]):
    """An iterator over batches, endless unless `epochs` bounds it; made by `*_stream`.

    Its state is JSON: the position in the data and the counts. All processes have the
    same state. The last batch of a bounded stream may be short.

    Attributes:
      records: number of records in the source, of which each epoch has all.
    """

    _closed = True  # for grain's `__del__`, where `__init__` fails

    def __init__(
        self,
        source: Source,
        make: "Callable[[dict[str, str]], T | _Dropped]",
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
          make: makes an item of a record, or says why it is dropped.
          batch_size: items in a batch of one process.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} is not positive")
        if not 0 <= process_index < process_count:
            raise ValueError(f"{process_index=} is not below {process_count=}")
        if not len(source):
            raise ValueError("the data holds no records")
        make(source[0])  # a template that fails should fail now
        dataset = grain.MapDataset.source(source).seed(seed)
        if shuffle:
            dataset = dataset.shuffle()  # by a permutation of indices, never held
        dataset = dataset.repeat(epochs).map(make)
        super().__init__(iter(dataset.to_iter_dataset(_READ)))
        self._dropped: Counter[str] = Counter()
        self._items = 0  # made so far, that is, not dropped
        self._batch_size = batch_size * process_count
        self._shard = slice(process_index, None, process_count)
        self._log = process_index == 0
        self.records = len(source)

    def __next__(self) -> list[T]:
        batch: list[T] = []
        drops = 0  # in a row
        for item in self._parent:
            if isinstance(item, _Dropped):
                drops += 1
                self._drop(item, drops, useful=bool(self._items or batch))
                continue
            drops = 0
            batch.append(item)
            if len(batch) == self._batch_size:
                break
        self._items += len(batch)
        if not self._items:
            raise ValueError(f"the data holds no usable record: {dict(self._dropped)}")
        if not batch:
            raise StopIteration
        return batch[self._shard]

    @property
    def counts(self) -> dict[str, int]:
        """Records up to this batch: "kept", and those dropped by reason."""
        return {"kept": self._items, **self._dropped}

    def get_state(self) -> dict[str, Any]:
        """Position after the last batch, as JSON."""
        return {
            "parent": self._parent.get_state(),
            "counts": dict(self._dropped),
            "items": self._items,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from a state of a stream with the same arguments."""
        self._parent.set_state(state["parent"])
        self._dropped = Counter(state["counts"])
        self._items = state["items"]

    def _drop(self, item: "_Dropped", drops: int, *, useful: bool) -> None:
        _count(self._dropped, item, log=self._log)
        limit = _MAX_DROPS if useful else _MAX_FIRST_DROPS
        # Whole epochs differ in order: only two hold every record in any case.
        if drops >= min(2 * self.records, limit):
            raise ValueError(
                f"{drops} records in a row were dropped, {dict(self._dropped)} in all; "
                f"the last one: {item.detail}"
            )


def problem_stream(
    source: Source,
    tokenizer: Tokenizer,
    *,
    template: str,
    max_prompt_tokens: int,
    allow_tags: bool = True,
    **stream_args: Any,
) -> Stream[Problem]:
    """Batches of problems; `stream_args` (batch_size, seed, …) are those of `Stream`.

    `template` and `allow_tags` are those of `prompt_tokens`.
    """
    prompts.check_template(template)
    make = functools.partial(
        _make_problem,
        tokenizer=tokenizer,
        template=template,
        max_prompt_tokens=max_prompt_tokens,
        allow_tags=allow_tags,
    )
    return Stream(source, make, **stream_args)


def trace_stream(
    source: Source,
    tokenizer: Tokenizer,
    *,
    variant: str,
    template: str,
    max_prompt_tokens: int,
    max_response_tokens: int,
    **stream_args: Any,
) -> Stream[Trajectory]:
    """Batches of cold-start traces, brought into canonical form and laid out.

    Reasons for drops: `prompt_empty`, `prompt_too_long`, `format_fault`,
    `no_canonical_form` (stray text in a block), `no_layout` (its tokens cannot be laid
    out), `response_too_long`.
    """
    prompts.check_template(template)
    make = functools.partial(
        _make_trace,
        tokenizer=tokenizer,
        variant=variant,
        template=template,
        max_prompt_tokens=max_prompt_tokens,
        max_response_tokens=max_response_tokens,
    )
    return Stream(source, make, **stream_args)


def held_out(
    source: Source,
    tokenizer: Tokenizer,
    *,
    template: str,
    max_prompt_tokens: int,
    limit: int,
) -> list[Problem]:
    """The first `limit` problems, in order, for evaluation.

    Raises:
      ValueError: a prompt is longer than its budget. Problems of a benchmark are not
        left out in silence.
    """
    prompts.check_template(template)
    problems: list[Problem] = []
    for index in range(min(limit, len(source))):
        item = _make_problem(source[index], tokenizer, template, max_prompt_tokens)
        if isinstance(item, _Dropped):
            limit_name = f"rollout.max_prompt_tokens={max_prompt_tokens}"
            faults = {
                "prompt_too_long": f"{limit_name}: the prompt of held-out problem "
                f"{index} is longer: {item.detail}",
                "prompt_empty": f"held-out problem {index} has an empty prompt",
            }
            raise ValueError(faults[item.reason])  # noqa: TRY004  not about types
        problems.append(item)
    if not problems:
        raise ValueError(f"no problem to evaluate on: eval.problems={limit}")
    return problems


@dataclasses.dataclass(frozen=True)
class _Dropped:
    """Stands in the pipeline for a record that is left out."""

    reason: str
    detail: str


def _count(counts: Counter[str], item: _Dropped, *, log: bool = True) -> None:
    """Counts a drop, and logs the first one of its reason."""
    if log and not counts[item.reason]:
        text = "dropping a record (%s, further ones are only counted): %s"
        logging.warning(text, item.reason, item.detail)
    counts[item.reason] += 1


def _make_problem(
    record: dict[str, str],
    tokenizer: Tokenizer,
    template: str,
    max_prompt_tokens: int,
    allow_tags: bool = True,
) -> Problem | _Dropped:
    messages = json.loads(record["messages"]) if "messages" in record else None
    prompt = prompts.prompt_tokens(
        record["question"],
        tokenizer,
        template=template,
        messages=messages,
        allow_tags=allow_tags,
    )
    if not len(prompt):  # nothing would predict the first token
        return _Dropped("prompt_empty", f"no token: {str(record)[:60]}")
    if len(prompt) > max_prompt_tokens:
        detail = f"{len(prompt)} tokens, {max_prompt_tokens=}"
        return _Dropped("prompt_too_long", f"{detail}: {record['question'][:60]!r}")
    return Problem(record["question"], record["answer"], prompt)


def _make_trace(
    record: dict[str, str],
    tokenizer: Tokenizer,
    variant: str,
    template: str,
    max_prompt_tokens: int,
    max_response_tokens: int,
) -> Trajectory | _Dropped:
    record = {"answer": "", **record}
    problem = _make_problem(record, tokenizer, template, max_prompt_tokens)
    if isinstance(problem, _Dropped):
        return problem
    about = f": {record['question'][:60]!r}"
    if faults := tags.check_format(record["response"]):
        return _Dropped("format_fault", faults[0] + about)
    reason = "no_canonical_form"
    try:
        response = tags.canonical(record["response"])
        reason = "no_layout"
        trace = traces.from_text(problem.prompt, response, tokenizer, variant=variant)
    except ValueError as error:
        return _Dropped(reason, str(error) + about)
    if len(trace.tokens) > max_response_tokens:
        detail = f"{len(trace.tokens)} tokens, {max_response_tokens=}"
        return _Dropped("response_too_long", detail + about)
    return trace
