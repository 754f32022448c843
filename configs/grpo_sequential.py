"""The baseline without blocks: GRPO with `<Parallel>` always banned.

    python -m pr1_jax.main --config=configs/grpo_sequential.py

Two CPU cores: about 7 minutes. SFT is on traces that search one number after another; RL
makes them surer. `rl_alternating` ends more accurate, with longer responses.
"""

import ml_collections

from pr1_jax import defaults


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """docs/method.md, section 7: third row of the table, after SFT without blocks."""
    c = defaults.get_config(arg)
    c.name = "grpo_sequential"
    c.reward.schedule = "accuracy"
    c.rollout.max_blocks = 0
    c.alarms.min_parallel_ratio = 0.0
    c.data.task = "search:block_share=0.0"
    if arg in defaults.REAL:
        c.stages = ("rl",)
        c.data.template = "plain"
    return c
