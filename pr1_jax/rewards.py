"""Rewards of a response, and their weights by step (docs/method.md, section 5).

A schedule gives the rewards of a step weights, and the reward of a response is the
weighted sum. The paper's S1 is the schedule `accuracy`, its S2 `alternating`. Every
schedule is pure: all responses of a step are rewarded alike. Beside the schedule, and
under each of them, `saving` may pay for a short critical path.
"""

from collections.abc import Mapping, Sequence

REWARDS = ("accuracy", "parallel_and_accuracy", "tiered")
SCHEDULES = (
    "accuracy",
    "alternating",
    "parallel_only",
    "parallel_and_accuracy",
    "scaffold",
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
