"""Parallel-R1 S2: cold-start SFT, then GRPO under the alternating reward, structured.

    python -m pr1_jax.main --config=configs/rl_alternating.py

Two CPU cores: minutes. Before the deadline a lone search sees 13 of the 20 numbers of a
hard problem, two paths that draw their rows alike 15 on average, and two that divide the
rows between them all.
"""

import ml_collections

from pr1_jax import defaults


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """docs/method.md, sections 5 and 6: windows of 10 steps, the last 2 tiered."""
    c = defaults.get_config(arg)
    c.name = "rl_alternating"
    c.reward.schedule = "alternating"
    c.rl.clip_high = 0.28
    return c
