"""The baseline without blocks: GRPO with `<Parallel>` always banned.

    python -m pr1_jax.main --config=configs/grpo_sequential.py

Two CPU cores: minutes. SFT is on traces without blocks. The deadline is that of the other
configs: one search sees 13 of the 20 numbers of a hard problem, so that no more than 65 %
of the answers are found, and the rest can only be guessed.
"""

import ml_collections

from pr1_jax import defaults, sizes


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """docs/method.md, section 7: third row of the table, after SFT without blocks."""
    c = defaults.get_config(arg)
    c.name = "grpo_sequential"
    c.reward.schedule = "accuracy"
    c.rollout.max_blocks = 0
    c.alarms.min_parallel_ratio = 0.0
    c.data.task = "partner:block_share=0.0"
    if sizes.size_of(arg) in sizes.REAL:
        c.stages = ("rl",)
        c.data.template = "plain"
    return c
