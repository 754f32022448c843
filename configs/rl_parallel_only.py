"""Ablation: the tiered reward at every step, structured.

    python -m pr1_jax.main --config=configs/rl_parallel_only.py

Two CPU cores: minutes; less from a checkpoint of `sft_structured`, which is the same first
stage. Of two right answers the one with a block is always worth more.
"""

import ml_collections

from pr1_jax import defaults


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """docs/method.md, section 5: parallel only."""
    c = defaults.get_config(arg)
    c.name = "rl_parallel_only"
    c.reward.schedule = "parallel_only"
    return c
