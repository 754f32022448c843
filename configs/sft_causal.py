"""Cold-start SFT, causal variant (the paper's Parallel-SFT-Seen).

    python -m pr1_jax.main --config=configs/sft_causal.py

Two CPU cores: about 5 minutes. Only the smoke variant has been run so far; there is no
result to report yet.
"""

import ml_collections

from configs import common


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Spec section 6, first row: 58 steps at full size."""
    c = common.get_config(arg, variant="causal")
    c.name = "sft_causal"
    c.stages = ("sft",)
    return c
