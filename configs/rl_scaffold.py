"""Scaffold: the alternating reward first, then accuracy alone, structured.

    python -m pr1_jax.main --config=configs/rl_scaffold.py

Two CPU cores: minutes; less from a checkpoint of `sft_structured`, which is the same first
stage. The bonus keeps blocks alive first; then they have to pay.
"""

import ml_collections

from pr1_jax import defaults, sizes


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """docs/method.md, section 5: alternating for 200 steps, here for the first half."""
    c = defaults.get_config(arg)
    c.name = "rl_scaffold"
    c.reward.schedule = "scaffold"
    c.rl.clip_high = 0.28
    if sizes.size_of(arg) != "qwen3_4b":
        c.reward.scaffold_steps = c.rl.steps // 2
    return c
