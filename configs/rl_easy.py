"""RL on easy problems, causal variant: correct and with a block, or −1.

    python -m pr1_jax.main --config=configs/rl_easy.py

Two CPU cores: minutes. A right answer without a block is worth as little as a wrong one.
"""

import ml_collections

from pr1_jax import defaults, sizes


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """docs/method.md, section 6: second row of the table."""
    c = defaults.get_config(arg, variant="causal")
    c.name = "rl_easy"
    c.reward.schedule = "parallel_and_accuracy"
    if sizes.size_of(arg) == "qwen3_4b":
        c.data.rl = "tfds:gsm8k"
        c.rl.steps, c.rl.prompts_per_step, c.rl.group_size = 35, 1024, 5
    elif sizes.size_of(arg) not in sizes.REAL:
        c.data.rl = c.data.eval = "embedded:easy"
        c.rl.shared_prompt_tokens = (24,) if c.rl.shared_prompt_tokens else ()
    return c
