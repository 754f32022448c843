"""A length penalty: of two right answers the one with fewer tokens is rewarded more.

    --config.reward.function=docs/examples/length_penalty.py:score
    --config.reward.weights=schedule=1,function.total=0.2,function.steps=0.1

Wrong answers are not punished for their length, so that a response is never rewarded for
giving up early.
"""

from pr1_jax.rewards import Record

LONGEST = 96  # tokens, as rollout.max_response_tokens of the run


def score(record: Record) -> dict[str, float]:
    """Parts from -1 to 0, 0 for a wrong answer."""
    if record.verdict != "correct":
        return {"total": 0.0, "steps": 0.0}
    return {
        "total": -min(record.total_tokens / LONGEST, 1.0),
        "steps": -min(record.sequential_steps / LONGEST, 1.0),
    }
