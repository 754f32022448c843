"""Parallel-R1 S1: cold-start SFT, then GRPO on accuracy alone, structured.

    python -m pr1_jax.main --config=configs/rl_accuracy.py

Two CPU cores: minutes; less from a checkpoint of `sft_structured`, which is the same first
stage. Nothing pays for blocks but what they find before the deadline.
"""

import ml_collections

from pr1_jax import defaults


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """docs/method.md, sections 5 and 6."""
    c = defaults.get_config(arg)
    c.name = "rl_accuracy"
    c.reward.schedule = "accuracy"
    return c
