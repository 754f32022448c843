"""Ablation: the tiered reward at every step, structured.

    python -m pr1_jax.main --config=configs/rl_parallel_only.py

Two CPU cores: about 9 minutes; run from the checkpoint of `sft_structured`, which is the
same first stage. Held-out hard problems (512, 95 % interval), seed 0,
at commit `8ee31f1`: 58.2 %
(54.1 to 62.5) after SFT, 91.0 % (88.5 to 93.4) after RL. Embedded, every response has a
block, so that the bonus only scales rewards and hardly changes advantages.
"""

import ml_collections

from pr1_jax import defaults


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Spec section 5, Parallel-only."""
    c = defaults.get_config(arg)
    c.name = "rl_parallel_only"
    c.reward.schedule = "parallel_only"
    return c
