"""Which attempts of a teacher become traces, and how all of them fared."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

KEPT, SPARE, UNFINISHED = "kept", "spare", "unfinished"
NO_CANONICAL_FORM = "no_canonical_form"

Record = Mapping[str, Any]


def first_good(
    attempts: Sequence[Record], judge: Callable[[Record], tuple[str, dict[str, Any]]]
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """The trace of the first good attempt at each question, and how all attempts fared.

    Args:
      attempts: as `samples.sample` gives them.
      judge: says `KEPT` of an attempt and gives its trace, or says why it is of no use.

    Returns:
      Traces, and the number of attempts by reason: `kept`, `spare` (of a question that
      has a trace already), or why it is of no use.
    """
    traces: dict[str, dict[str, Any]] = {}
    reasons: Counter[str] = Counter()
    for attempt in attempts:
        reason, trace = judge(attempt)
        if reason == KEPT and attempt["question"] in traces:
            reason = SPARE
        elif reason == KEPT:
            traces[attempt["question"]] = trace
        reasons[reason] += 1
    return list(traces.values()), reasons
