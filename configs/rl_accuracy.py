"""Parallel-R1 S1: cold-start SFT, then GRPO on accuracy alone, structured.

    python -m pr1_jax.main --config=configs/rl_accuracy.py

Two CPU cores: about 9 minutes; run from the checkpoint of `sft_structured`, which is the
same first stage. Held-out hard problems (512, 95 % interval), seed 0,
at commit `8ee31f1`: 58.2 %
(54.1 to 62.5) after SFT, 91.0 % (88.5 to 93.4) after RL. Blocks do not die out: traces
without one are not in the embedded cold-start data.
"""

import ml_collections

from pr1_jax import defaults


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Spec sections 5 and 6."""
    c = defaults.get_config(arg)
    c.name = "rl_accuracy"
    c.reward.schedule = "accuracy"
    return c
