"""Rewards of a response, and which of them a step uses (spec section 5).

The paper's S1 is the schedule `accuracy`, its S2 `alternating`. Every schedule is
pure: one step has one reward for all of its batch.
"""

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

    correct: the answer is equivalent to the reference (undecided is not correct).
    num_blocks: blocks in the response; format_ok: its format check found no fault.
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


def scheduled(
    schedule: str,
    step: int,
    *,
    window: int = 10,
    tiered_steps: int = 2,
    scaffold_steps: int = 200,
) -> str:
    """Returns the name of the reward that `schedule` uses at `step` (from 1).

    window, tiered_steps: in each window of so many steps the last ones are tiered.
    scaffold_steps: how long `scaffold` alternates before it turns to accuracy.
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
        return "tiered"
    if schedule == "parallel_and_accuracy":
        return "parallel_and_accuracy"
    if schedule == "accuracy" or (schedule == "scaffold" and step > scaffold_steps):
        return "accuracy"
    in_window = (step - 1) % window
    return "accuracy" if in_window < window - tiered_steps else "tiered"
