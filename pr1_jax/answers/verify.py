"""The check of responses: the answer is extracted, compared, and if need be verified."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pr1_jax.answers.compare import quick
from pr1_jax.answers.extract import boxes, extract
from pr1_jax.answers.pool import NUM_WORKERS, ask
from pr1_jax.answers.verdicts import INCORRECT, UNDECIDED, Result

FAILED = "the answer check failed"


def check(response: str, reference: str, *, timeout_sec: float = 3.0) -> Result:
    """Whether the answer of `response` is equivalent to `reference`.

    Nothing that a model wrote makes it raise.

    Args:
      timeout_sec: processor time that math-verify may take; an overrun is undecided.

    Raises:
      ValueError: `timeout_sec` is not positive.
      RuntimeError: math-verify cannot start.
    """
    return check_many([response], [reference], timeout_sec=timeout_sec)[0]


def check_many(
    responses: Sequence[str], references: Sequence[str], *, timeout_sec: float = 3.0
) -> list[Result]:
    """`check` of each pair, in order; workers share those that need one."""
    if len(responses) != len(references):
        raise ValueError(
            f"responses has {len(responses)} items, references {len(references)}"
        )
    if timeout_sec <= 0:
        raise ValueError(f"timeout_sec is {timeout_sec}, expected more than 0")
    pairs = [_safely(_pair, *texts) for texts in zip(responses, references)]
    decided = {  # equal pairs once
        pair: pair if isinstance(pair, Result) else _safely(quick, *pair)
        for pair in pairs
        if pair
    }
    decided[None] = Result(INCORRECT, "the response gives no answer")
    slow = {x for x in decided.values() if not isinstance(x, Result)}
    if slow:
        with ThreadPoolExecutor(NUM_WORKERS) as threads:
            results = threads.map(lambda texts: ask(*texts, timeout_sec), slow)
            found = dict(zip(slow, results))
        decided = {pair: found.get(x, x) for pair, x in decided.items()}
    return [decided[pair] for pair in pairs]


def _safely(decide: Callable[..., Any], *texts: str) -> Any:
    """What `decide` returns; a fault of ours in it is no fault of the training run."""
    try:
        return decide(*texts)
    except Exception as error:  # noqa: BLE001
        return Result(UNDECIDED, f"{FAILED}: {type(error).__name__}")


def _pair(response: str, reference: str) -> tuple[str, str] | None:
    """Answer and reference as they are compared, None without an answer."""
    answer = extract(response)
    if answer is None:
        return None
    wanted = reference if len(boxes(reference)) > 1 else extract(reference)
    return answer, wanted or reference
