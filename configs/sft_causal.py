"""Cold-start SFT, causal variant (the paper's Parallel-SFT-Seen).

    python -m pr1_jax.main --config=configs/sft_causal.py

Two CPU cores: minutes. Half of the traces have a block; of these, a quarter finds nothing.
"""

import ml_collections

from pr1_jax import defaults


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """docs/method.md, section 6: first row of the table, 58 steps at full size."""
    c = defaults.get_config(arg, variant="causal")
    c.name = "sft_causal"
    c.stages = ("sft",)
    return c
