r"""The paper's table for any checkpoint: benchmarks by decoding modes.

    python -m pr1_jax.main --config=configs/evaluate.py \
        --config.checkpoint.init=runs/quickstart

`checkpoint.init` is the workdir of a run; `model.path` a Hugging Face folder. Benchmarks
of your own are named by `data.eval`, with the number of responses to each problem:

    --config.data.eval=/data/mine.jsonl
    --config.data.eval="mine=/data/mine.jsonl@4,gsm8k=tfds:gsm8k@1"

Two CPU cores: minutes. The deadline of the config holds in every mode: where blocks are
banned, one search sees 13 of the 20 numbers of a hard problem before it.
"""

import ml_collections

from pr1_jax import defaults, sizes

_BENCHMARKS = {
    "smollm2": "gsm8k=hf:openai/gsm8k/main@2",
    "qwen3_4b": "aime24=hf:HuggingFaceH4/aime_2024@train@16,"
    "aime25=hf:math-ai/aime25@16,amc23=hf:math-ai/amc23@16,"
    "math=hf:HuggingFaceH4/MATH-500@1",
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """docs/method.md, section 7."""
    c = defaults.get_config(arg)
    c.name = "evaluate"
    c.stages = ("benchmark",)
    embedded = "easy=embedded:easy@4,hard=embedded:hard@4"
    c.data.eval = _BENCHMARKS.get(sizes.size_of(arg), embedded)
    if sizes.size_of(arg) == "qwen3_4b":
        c.eval.problems = 1000  # of each at most
    return c
