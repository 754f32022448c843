"""Parallel-R1 S1: cold-start SFT, then GRPO on accuracy alone, structured.

    python -m pr1_jax.main --config=configs/rl_accuracy.py

Two CPU cores: about 10 minutes. Only the smoke variant has been run so far; there is no
result to report yet.
"""

import ml_collections

from configs import common


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Spec sections 5 and 6."""
    c = common.get_config(arg)
    c.name = "rl_accuracy"
    c.reward.schedule = "accuracy"
    return c
