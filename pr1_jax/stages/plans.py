"""Plans for traces that have none, from a teacher (`coldstart.mode="plans"`).

The teacher sees a problem with its solution, and writes one plan for each path. These are
set into the trace, which stays as it is otherwise.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pr1_jax import tags
from pr1_jax.data.records import Record
from pr1_jax.data.rows import Dropped
from pr1_jax.data.sources import Source
from pr1_jax.data.streams import MALFORMED
from pr1_jax.stages.attempts import KEPT, NO_CANONICAL_FORM, UNFINISHED, first_good

NUMBER, EMPTY = "number_of_plans", "empty_plan"
_PLAN = re.compile(f"{tags.PLAN}(.*?){tags.END_PLAN}", re.DOTALL)
_REQUEST = """\
Below are a problem and a solution of it. Where the solution thinks in parallel, several \
<Path>…</Path> work on one step and do not see each other. For each <Path>, in their \
order, write a <Plan>…</Plan>: one sentence that says what the path is to do, as one would \
put it before the work, without what it finds. Write {number} plans, and nothing else.

Problem: {question}

Solution: {response}

Plans:
"""


def requests(source: Source) -> tuple[dict[str, Record], Counter[str]]:
    """What a teacher is asked of each trace, with the trace.

    Args:
      source: of traces in blocks without plans.

    Returns:
      Records of traces by what is asked, their `response` in canonical text; and how
      many others there are, by the reason why they are of no use.
    """
    asked: dict[str, Record] = {}
    dropped: Counter[str] = Counter()
    for index in range(len(source)):
        try:
            record = source[index]
            response = _canonical(record["response"])
        except Dropped as drop:
            dropped[drop.reason] += 1
            continue
        question = record["question"].strip()
        number = response.count(tags.PATH)
        request = _REQUEST.format(number=number, question=question, response=response)
        asked.setdefault(request, {**record, "response": response})
    return asked, dropped


def _canonical(response: str) -> str:
    """A trace that may get plans, in canonical text."""
    if tags.PARALLEL not in response:
        raise Dropped("no_block", "the trace has no block")
    if any(tag in response for tag in tags.PLAN_TAGS):
        raise Dropped("has_plans", "the trace has plans")
    try:
        return tags.canonical(response)
    except ValueError as error:
        raise Dropped(MALFORMED, str(error)) from error


def insert(trace: str, plans: Sequence[str]) -> str:
    """Returns a trace in canonical text with as many plans as it has paths.

    >>> insert("<Parallel><Path>a</Path><Path>b</Path></Parallel>", ["p", "q"])
    '<Parallel><Plan>p</Plan><Plan>q</Plan><Path>a</Path><Path>b</Path></Parallel>'
    """
    first, *blocks = trace.split(tags.PARALLEL)
    pieces, rest = [first], list(plans)
    for block in blocks:
        number = block.count(tags.PATH)
        some, rest = rest[:number], rest[number:]
        written = (tags.PLAN + plan + tags.END_PLAN for plan in some)
        pieces += tags.PARALLEL, *written, block
    return "".join(pieces)


def select(
    records: Sequence[Mapping[str, Any]],
    asked: Mapping[str, Record],
    grammar: tags.Grammar,
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Each trace with the first good plans for it, and how all attempts fared.

    Args:
      records: attempts, as `samples.sample` gives them; each `question` is a request.
      asked: traces by request.
      grammar: of what is written, whose paths get the labels that they lack.

    Returns:
      Records of `question`, `response` in canonical form and `answer`; and the number
      of attempts by reason: `kept`, `spare` (of a trace that has plans already), or why
      it is of no use.
    """

    def judge(attempt):
        trace = asked[attempt["question"]]
        reason, response = _judge(attempt, trace["response"], grammar)
        question = json.loads(trace.get("messages", "null")) or trace["question"]
        answer = trace["answer"]
        return reason, {"question": question, "response": response, "answer": answer}

    return first_good(records, judge)


def _judge(
    attempt: Mapping[str, Any], trace: str, grammar: tags.Grammar
) -> tuple[str, str]:
    """Why an attempt is of no use, or `kept` and the trace with its plans."""
    if not attempt["finished"]:
        return UNFINISHED, ""
    plans = [plan.strip() for plan in _PLAN.findall(attempt["response"])]
    if len(plans) != trace.count(tags.PATH):
        return NUMBER, ""
    if not all(plans):
        return EMPTY, ""
    try:
        return KEPT, tags.canonical(insert(trace, plans), grammar)
    except ValueError:
        return NO_CANONICAL_FORM, ""
