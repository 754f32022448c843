"""The baseline without blocks: GRPO with `<Parallel>` always banned.

    python -m pr1_jax.main --config=configs/grpo_sequential.py

Two CPU cores: about 7 minutes. Held-out hard problems (512, 95 % interval), seed 0: 79.3 %
(75.6 to 82.6) after SFT on traces that search patiently, 87.7 % (84.8 to 90.6) after RL,
in 18 tokens; `rl_alternating` reaches 92.8 % in 45 tokens, 29 of them one after another.
"""

import ml_collections

from pr1_jax import defaults


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Spec section 7, third row of the table; embedded, after SFT on traces without blocks."""
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
