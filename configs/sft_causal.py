"""Cold-start SFT, causal variant (the paper's Parallel-SFT-Seen).

    python -m pr1_jax.main --config=configs/sft_causal.py

Two CPU cores: about 4 minutes. Held-out hard problems (512, 95 % interval), seed 0: 50.6 %
(46.3 to 54.7); all responses have a block.
"""

import ml_collections

from pr1_jax import defaults


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Spec section 6, first row: 58 steps at full size."""
    c = defaults.get_config(arg, variant="causal")
    c.name = "sft_causal"
    c.stages = ("sft",)
    return c
