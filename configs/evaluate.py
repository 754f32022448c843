r"""The paper's table for any checkpoint: benchmarks by decoding modes.

    python -m pr1_jax.main --config=configs/evaluate.py \
        --config.checkpoint.init=runs/quickstart

`checkpoint.init` is the workdir of a run; `model.path` a Hugging Face folder.

Two CPU cores: about 2 minutes. The quickstart (seed 0, 512 problems, 4 samples) on hard ones,
mean@4 with 95 % interval: structured 91.4 (89.2 to 93.5), causal 84.5 (82.0 to 87.3),
ordinary 5.3 (4.3 to 6.3): it was trained structured, and never without a block.
"""

import ml_collections

from pr1_jax import defaults


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Spec section 7."""
    c = defaults.get_config(arg)
    c.name = "evaluate"
    c.stages = ("benchmark",)
    if arg == "qwen3_4b":
        c.eval.problems = 1000  # of each at most
        hub = {
            "aime25": ("hf:math-ai/aime25", 16),
            "aime24": ("hf:HuggingFaceH4/aime_2024@train", 16),
            "amc23": ("hf:math-ai/amc23", 16),
            "math": ("hf:HuggingFaceH4/MATH-500", 1),
        }
        for name, (source, samples) in hub.items():
            c.eval.benchmarks[name] = defaults.benchmark(source, samples)
    elif arg == "smollm2":
        c.eval.benchmarks.gsm8k = defaults.benchmark("hf:openai/gsm8k/main", 2)
    else:
        for name in ("hard", "easy"):
            c.eval.benchmarks[name] = defaults.benchmark(f"embedded:{name}", 4)
    return c
