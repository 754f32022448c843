"""Evaluation alone, of a run, a Hugging Face folder or a fresh model.

    python -m pr1_jax.main --config=configs/evaluate.py \\
        --config.checkpoint.init=runs/quickstart

RESULT
"""

import ml_collections

from configs import common


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Spec section 7."""
    c = common.get_config(arg)
    c.name = "evaluate"
    c.stages = ()
    c.eval.samples = 4
    if arg is None:
        c.eval.problems = 512
    return c
