"""Reward functions as TRL and Tunix have them, for lists of prompts and completions.

--config.reward.function=docs/examples/trl_style.py:score
"""

from pr1_jax.rewards import Record


def has_an_answer(prompts, completions, **columns):
    """A reward function of another trainer."""
    return [float("Final Answer:" in text) for text in completions]


def not_too_long(completions, answer, **columns):
    """Another one, with a column of its data set."""
    return [-len(text) / 1000 for text in completions]


FUNCTIONS = (has_an_answer, not_too_long)


def score(record: Record) -> dict[str, float]:
    """Each function's reward of one response, by the function's name."""
    columns = {"answer": [record.reference]}
    lists = {"prompts": [record.question], "completions": [record.response], **columns}
    rewards = {function.__name__: function(**lists)[0] for function in FUNCTIONS}
    return {name: 0.0 if x is None else x for name, x in rewards.items()}
