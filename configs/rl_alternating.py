"""Parallel-R1 S2: cold-start SFT, then GRPO under the alternating reward, structured.

    python -m pr1_jax.main --config=configs/rl_alternating.py

Two CPU cores: about 8 minutes. Held-out hard problems (512, 95 % interval): 61.5 % (57.2 to
65.6) after SFT, 92.8 % (90.4 to 94.9) after RL, seed 0; 51.6 and 88.1 %, seed 1 (commit
`b99b0da`). All responses have a block.
"""

import ml_collections

from pr1_jax import defaults


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Spec sections 5 and 6: windows of 10 steps, the last 2 tiered."""
    c = defaults.get_config(arg)
    c.name = "rl_alternating"
    c.reward.schedule = "alternating"
    c.rl.clip_high = 0.28
    return c
