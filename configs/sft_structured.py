"""Cold-start SFT, structured variant (the paper's Parallel-SFT-Unseen).

    python -m pr1_jax.main --config=configs/sft_structured.py

Two CPU cores: about 4 minutes. Held-out hard problems (512, 95 % interval), seed 0,
at commit `b99b0da`: 61.5 %
(57.2 to 65.6); all responses have a block.
"""

import ml_collections

from pr1_jax import defaults


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Spec section 6, first row: 230 steps at full size."""
    c = defaults.get_config(arg)
    c.name = "sft_structured"
    c.stages = ("sft",)
    return c
