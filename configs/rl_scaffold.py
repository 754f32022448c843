"""Scaffold: the alternating reward first, then accuracy alone, structured.

    python -m pr1_jax.main --config=configs/rl_scaffold.py

Two CPU cores: about 9 minutes; run from the checkpoint of `sft_structured`, which is the
same first stage. Held-out hard problems (512, 95 % interval), seed 0,
at commit `8ee31f1`: 58.2 %
(54.1 to 62.5) after SFT, 91.6 % (89.3 to 93.9) after RL, as with `rl_alternating`: embedded,
every response has a block, so that the bonus only scales rewards.
"""

import ml_collections

from pr1_jax import defaults


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Spec section 5: alternating for 200 steps at full size, here for the first half."""
    c = defaults.get_config(arg)
    c.name = "rl_scaffold"
    c.reward.schedule = "scaffold"
    c.rl.clip_high = 0.28
    if arg != "qwen3_4b":
        c.reward.scaffold_steps = c.rl.steps // 2
    return c
