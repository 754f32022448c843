"""RL on easy problems, causal variant: correct and with a block, or −1.

    python -m pr1_jax.main --config=configs/rl_easy.py

Two CPU cores: about 10 minutes. Held-out easy problems (512, 95 % interval), seed 0:
65.2 % (61.1 to 69.3) after SFT, 85.7 % (82.8 to 88.7) after RL; all responses have a block.
"""

import ml_collections

from pr1_jax import defaults


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Spec section 6, second row."""
    c = defaults.get_config(arg, variant="causal")
    c.name = "rl_easy"
    c.reward.schedule = "parallel_and_accuracy"
    if arg == "qwen3_4b":
        c.data.rl = "tfds:gsm8k"
        c.rl.steps, c.rl.prompts_per_step, c.rl.group_size = 35, 1024, 5
    elif arg not in defaults.REAL:
        c.data.rl = c.data.eval = "embedded:easy"
        c.rl.shared_prompt_tokens = (11,) if c.rl.shared_prompt_tokens else ()
    return c
