"""Blocks that the model plans: cold-start SFT, then GRPO on accuracy alone, structured.

    python -m pr1_jax.main --config=configs/rl_planned.py

Two CPU cores: minutes. Lists have four rows, and blocks from two to four paths, each with
its plan. At this deadline four paths see most. Two do with
--config.rollout.max_sequential_steps=50, and at 66 a search without a block sees as much.
3 % of the traces are too long, and left out. For a pretrained model data.sft must be
traces with plans (docs/data.md).
"""

import ml_collections

from pr1_jax import defaults, sizes


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """docs/method.md, section 10."""
    c = defaults.get_config(arg)
    c.name = "rl_planned"
    c.reward.schedule = "accuracy"
    c.rollout.planned = True
    c.rollout.num_paths = 4
    c.rollout.path_labels = (" 1", " 2", " 3", " 4")
    if sizes.size_of(arg) in sizes.REAL:
        c.rollout.max_plan_tokens = 128
    else:
        c.data.task = "partner:paths=4,planned=1"
        c.rollout.max_sequential_steps = 40
        c.rollout.min_plan_tokens, c.rollout.max_plan_tokens = 3, 6
        c.rollout.max_path_tokens = 0  # of two paths one may have three rows
    return c
