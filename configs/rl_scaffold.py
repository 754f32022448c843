"""Scaffold: the alternating reward first, then accuracy alone, structured.

    python -m pr1_jax.main --config=configs/rl_scaffold.py

Two CPU cores: about 10 minutes. Only the smoke variant has been run so far; there is no
result to report yet.
"""

import ml_collections

from configs import common


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Spec section 5: alternating for 200 steps at full size, here for the first half."""
    c = common.get_config(arg)
    c.name = "rl_scaffold"
    c.reward.schedule = "scaffold"
    c.rl.clip_high = 0.28
    if arg != "qwen3_4b":
        c.reward.scaffold_steps = c.rl.steps // 2
    return c
