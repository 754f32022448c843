"""Ablation: the tiered reward at every step, structured.

    python -m pr1_jax.main --config=configs/rl_parallel_only.py

Two CPU cores: about 10 minutes. Only the smoke variant has been run so far; there is no
result to report yet.
"""

import ml_collections

from configs import common


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Spec section 5, Parallel-only."""
    c = common.get_config(arg)
    c.name = "rl_parallel_only"
    c.reward.schedule = "parallel_only"
    return c
