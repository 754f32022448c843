"""Cold-start SFT, structured variant (the paper's Parallel-SFT-Unseen).

    python -m pr1_jax.main --config=configs/sft_structured.py

Two CPU cores: minutes. Half of the traces have a block; of these, a quarter finds nothing.
"""

import ml_collections

from pr1_jax import defaults


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """docs/method.md, section 6: first row of the table, 230 steps at full size."""
    c = defaults.get_config(arg)
    c.name = "sft_structured"
    c.stages = ("sft",)
    return c
