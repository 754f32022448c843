"""The baseline without blocks: GRPO with `<Parallel>` always banned.

    python -m pr1_jax.main --config=configs/grpo_sequential.py

Two CPU cores: about 8 minutes. Only the smoke variant has been run so far; there is no
result to report yet.
"""

import ml_collections

from configs import common


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Spec section 7, third row of the table; embedded, after SFT on traces without blocks."""
    c = common.get_config(arg)
    c.name = "grpo_sequential"
    c.reward.schedule = "accuracy"
    c.rollout.max_blocks = 0
    c.data.block_share = 0.0
    if arg in common.REAL:
        c.stages = ("rl",)
        c.data.template = "plain"
    return c
