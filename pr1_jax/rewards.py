"""Rewards of a response, and their weights by step (docs/method.md, section 5).

A schedule gives the rewards of a step weights, and the reward of a response is the
weighted sum. The paper's S1 is the schedule `accuracy`, its S2 `alternating`. Every
schedule is pure: all responses of a step are rewarded alike. Beside the schedule, and
under each of them, `saving` may pay for a short critical path, `overlong` may punish
responses that come close to their limit, and a function of the user may pay for whatever
it finds in a `Record` (docs/rewards.md).
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

REWARDS = ("accuracy", "parallel_and_accuracy", "tiered")
SCHEDULES = (
    "accuracy",
    "alternating",
    "parallel_only",
    "parallel_and_accuracy",
    "scaffold",
)
SCHEDULE, FUNCTION = "schedule", "function"  # parts of a reward
LARGEST = 1e9  # of a part and of a weight, so that squares are finite in float32


@dataclasses.dataclass(frozen=True)
class Record:
    """What a function of the user is told of a response (docs/rewards.md).

    Attributes:
      question: as it stands in the data.
      response: the text, tags visible and EOS left out.
      reference: the right answer, as it stands in the data.
      answer: what the response answers, behind its last `Final Answer:` or in its last
        box; None where it gives no answer.
      verdict: "correct", "incorrect" or "undecided"; "" for a verifier, which decides.
      num_blocks: blocks in the response.
      paths: for each block the texts of its paths, in order, without their labels.
      plans: for each block the texts of its plans; () where none are written.
      summaries: for each block the text of its summary.
      total_tokens: of the response, EOS included.
      sequential_steps: decode steps on the critical path.
      format_ok: its format check has no fault.
      truncated: cut off at a budget or deadline, not ended by the model.
    """

    question: str
    response: str
    reference: str
    answer: str | None
    verdict: str
    num_blocks: int
    paths: tuple[tuple[str, ...], ...]
    plans: tuple[tuple[str, ...], ...]
    summaries: tuple[str, ...]
    total_tokens: int
    sequential_steps: int
    format_ok: bool
    truncated: bool

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> Self:
        """The record of `dataclasses.asdict`, perhaps by way of JSON."""
        texts = {n: tuple(map(tuple, fields[n])) for n in ("paths", "plans")}
        return cls(**{**fields, **texts, "summaries": tuple(fields["summaries"])})


MADE_UP = Record(  # for a function's first call
    question="What is 2·3 + 4·5?",
    response="<Parallel><Path>2·3 = 6</Path><Path>4·5 = 20</Path></Parallel>\n"
    "<Summary>6 + 20 = 26</Summary>\nFinal Answer: 26",
    reference="26",
    answer="26",
    verdict="correct",
    num_blocks=1,
    paths=(("2·3 = 6", "4·5 = 20"),),
    plans=(),
    summaries=("6 + 20 = 26",),
    total_tokens=40,
    sequential_steps=32,
    format_ok=True,
    truncated=False,
)


def reward(name: str, *, correct: bool, num_blocks: int, format_ok: bool) -> float:
    """Returns the reward `name` of one response, between -1 and 1.2.

    Args:
      correct: the answer is equivalent to the reference (undecided is not correct).
      num_blocks: blocks in the response.
      format_ok: its format check has no fault.

    Raises:
      ValueError: there is no reward of this name.
    """
    if name not in REWARDS:
        raise ValueError(f"reward is {name!r}, expected one of {REWARDS}")
    if not correct:
        return -1.0
    if name == "accuracy":
        return 1.0
    if num_blocks >= 1 and format_ok:
        return 1.2 if name == "tiered" else 1.0
    return 1.0 if name == "tiered" and num_blocks == 0 else -1.0


def weighted(
    weights: Mapping[str, float], *, correct: bool, num_blocks: int, format_ok: bool
) -> float:
    """Returns the weighted sum of a response's rewards, as `weights` gives them.

    >>> half = {"accuracy": 0.5, "tiered": 0.5}
    >>> weighted(half, correct=True, num_blocks=1, format_ok=True)
    1.1
    """
    facts = {"correct": correct, "num_blocks": num_blocks, "format_ok": format_ok}
    return sum(weight * reward(name, **facts) for name, weight in weights.items())


def saving(steps: Sequence[int], paid: Sequence[bool]) -> list[float]:
    """Returns the share of the critical path that each response of a group saves.

    It is measured against the longest critical path among those that are paid: 0 for
    that one, for each that is not paid, and where nothing is longer; always below 1.

    >>> saving([40, 30, 10, 50], [True, True, True, False])
    [0.0, 0.25, 0.75, 0.0]

    ThreadWeaver (arXiv 2512.07843) pays correct responses for 1 − longest thread / all
    tokens. That grows with every needless token in another path, so tokens do not count
    here, and responses are compared on their steps alone, as the penalty of DC-CoT
    (arXiv 2601.23027), which also is of correct responses only.

    Args:
      steps: on the critical path of each response, at least 1.
      paid: the response is correct, and the reward of the step pays it.
    """
    longest = max((s for s, is_paid in zip(steps, paid) if is_paid), default=0)
    return [(longest - s) / longest if p else 0.0 for s, p in zip(steps, paid)]


def overlong(
    tokens: int, steps: int, *, max_tokens: int, max_steps: int, buffer: int
) -> float:
    """Returns DAPO's soft punishment, from 0 to -1 (arXiv 2503.14476, equation 13).

    It grows evenly over the last `buffer` tokens before the limit. A response has two
    lengths here, and the one that comes closer to its own limit counts.

    >>> limits = {"max_tokens": 100, "max_steps": 60, "buffer": 20}
    >>> [overlong(n, 30, **limits) for n in (80, 85, 100)]
    [0.0, -0.25, -1.0]
    >>> overlong(85, 50, **limits)
    -0.5

    Args:
      tokens: of the response, those of all paths and EOS included.
      steps: on its critical path.
      max_tokens, max_steps: the limits; max_steps 0 = none.
      buffer: at least 1, and not above a limit.
    """
    over = tokens - (max_tokens - buffer)
    if max_steps:
        over = max(over, steps - (max_steps - buffer))
    return 0.0 - min(max(over / buffer, 0.0), 1.0)


def weights(
    schedule: str,
    step: int,
    *,
    window: int = 10,
    tiered_steps: int = 2,
    scaffold_steps: int = 200,
) -> dict[str, float]:
    """Returns the weights of the rewards that `schedule` uses at `step` (from 1).

    >>> weights("alternating", 8), weights("alternating", 9)
    ({'accuracy': 1.0}, {'tiered': 1.0})

    Args:
      window, tiered_steps: in each window of so many steps the last ones are tiered.
      scaffold_steps: how long `scaffold` alternates before it turns to accuracy.

    Raises:
      ValueError: names the argument and its value.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule is {schedule!r}, expected one of {SCHEDULES}")
    if step < 1:
        raise ValueError(f"step is {step}, expected at least 1")
    if not 0 <= tiered_steps <= window or window < 1:
        raise ValueError(
            f"tiered_steps is {tiered_steps} and window is {window}, expected "
            "0 <= tiered_steps <= window and window >= 1"
        )
    if schedule == "parallel_only":
        return {"tiered": 1.0}
    if schedule == "parallel_and_accuracy":
        return {"parallel_and_accuracy": 1.0}
    if schedule == "accuracy" or (schedule == "scaffold" and step > scaffold_steps):
        return {"accuracy": 1.0}
    in_window = (step - 1) % window
    return {"accuracy" if in_window < window - tiered_steps else "tiered": 1.0}


def scheduled(schedule: str, step: int, **settings: int) -> str:
    """Returns the name of the one reward that `weights`, called alike, gives weight 1.

    Raises:
      ValueError: as `weights`, or the step's reward is a mixture.
    """
    of_step = weights(schedule, step, **settings)
    for name, weight in of_step.items():
        if weight == 1.0:
            return name
    raise ValueError(f"schedule {schedule!r} mixes rewards at step {step}: {of_step}")


def part_weights(given: str, parts: Sequence[str]) -> dict[str, float]:
    """Returns the weight of each part of a reward.

    >>> part_weights("schedule=1,function.length=-0.1", ["schedule", "function.length"])
    {'schedule': 1.0, 'function.length': -0.1}

    Args:
      given: NAME=NUMBER for each part, with commas between; "" = each has weight 1.
      parts: their names.

    Raises:
      ValueError: names a part that there is not, that is missing or named twice, or
        whose weight is no finite number.
    """
    if not given.strip():
        return dict.fromkeys(parts, 1.0)
    known = f"the parts are {', '.join(parts)}"
    found: dict[str, float] = {}
    for item in given.split(","):
        name, _, value = (text.strip() for text in item.partition("="))
        if name not in parts:
            raise ValueError(f"reward.weights={given}: {name!r} is no part; {known}")
        if name in found:
            raise ValueError(f"reward.weights={given} names {name} twice")
        try:
            found[name] = float(value)
        except ValueError:
            found[name] = math.nan
        if not abs(found[name]) < LARGEST:
            raise ValueError(
                f"reward.weights={given}: {name}={value} is not a number below "
                f"{LARGEST:g}"
            )
    if missing := [name for name in parts if name not in found]:
        raise ValueError(
            f"reward.weights={given} has no weight for {', '.join(missing)}; {known}. "
            "0 leaves a part out of the reward, and it is logged all the same"
        )
    return found
