"""The sizes of an experiment: what each changes of the defaults.

A size is a variant of every config, as in `rl_alternating.py:smoke`. docs/config.md lists
what they change.
"""

from collections.abc import Callable, Mapping
from typing import Any

import ml_collections

REAL = ("smollm2", "qwen3_4b")  # sizes with a pretrained model and real data


def size_of(arg: str | None) -> str | None:
    """The size that a config's variant names: `qwen3_4b` of `qwen3_4b,v5e:4x4`."""
    return arg.partition(",")[0] if arg else None


def _smoke(c: ml_collections.ConfigDict) -> None:
    """All stages in well under 90 seconds on two cores; learns nothing."""
    c.model.num_layers, c.model.width, c.model.mlp_width = 2, 64, 128
    c.model.num_heads, c.model.num_kv_heads, c.model.head_dim = 2, 1, 32
    c.model.length_buckets, c.rl.shared_prompt_tokens = (76,), ()
    c.rollout.rows, c.rollout.prompts_per_prefill = 12, 4
    c.sft.steps, c.sft.batch_size, c.sft.micro_batch_size = 12, 16, 16
    c.rl.steps, c.rl.prompts_per_step, c.rl.group_size = 4, 4, 4
    c.rl.micro_batch_size, c.rl.kl_coef = 8, 0.0
    c.reward.window = 2
    c.reward.tiered_steps = 1
    c.reward.scaffold_steps = 2
    c.eval.problems = 16
    c.checkpoint.every_steps = 2


def _smollm2(c: ml_collections.ConfigDict) -> None:
    """A few steps of a small pretrained model on real data; a CPU is enough.

    Peak memory is about 8 GB. SmolLM2 is weak at maths: this shows that all parts work
    together, and learns the format at best.
    """
    c.model.path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    c.model.scan_layers = c.model.remat = True
    c.model.logits_chunk = 512
    c.model.length_buckets = (384, 512, 640)
    c.data.sft = "hf:Parallel-R1/parallel-r1-cold-start"
    c.data.coldstart = c.data.rl = c.data.eval = "hf:openai/gsm8k/main"
    c.data.template = "instruction"
    c.rollout.max_prompt_tokens, c.rollout.max_response_tokens = 320, 448
    c.rollout.max_sequential_steps, c.rollout.path_labels = 0, ()
    c.rollout.min_path_tokens, c.rollout.max_path_tokens = 16, 96
    c.rollout.max_summary_tokens, c.rollout.summary_reserve = 64, 48
    c.rollout.answer_reserve = 48
    c.rollout.rows, c.rollout.prompts_per_prefill = 8, 2
    c.sft.steps, c.sft.batch_size, c.sft.micro_batch_size = 6, 4, 2
    c.sft.lr = 1e-4
    c.rl.steps, c.rl.prompts_per_step, c.rl.group_size = 2, 2, 4
    c.rl.mini_batches, c.rl.micro_batch_size = 1, 2
    c.rl.shared_prompt_tokens = ()
    c.rl.lr, c.rl.lr_schedule, c.rl.kl_coef = 1e-6, "constant", 0.0
    c.reward.window, c.reward.tiered_steps = 2, 1
    c.coldstart.mode, c.coldstart.problems, c.coldstart.samples = "ordinary", 8, 1
    c.eval.problems, c.eval.samples, c.eval.banned = 4, 1, False
    c.checkpoint.every_steps = 4


def _qwen3_4b(c: ml_collections.ConfigDict) -> None:
    """The published settings for Qwen3-4B-Base; needs weights and data."""
    c.model.path = "Parallel-R1/Qwen3-4B-Base-add-special-token"
    c.model.dtype = "bfloat16"
    c.model.scan_layers = c.model.remat = True
    c.model.remat_policy = "attention"
    c.model.logits_chunk = 8192
    c.model.length_buckets = (768, 1536, 2304, 3072)
    c.model.packed_tokens = 5120  # whole tiles of the kernel that attends
    c.data.sft = "hf:Parallel-R1/parallel-r1-cold-start"
    c.data.rl = "hf:Leo-Dai/dapo-math-17k_dedup"
    c.data.eval = "tfds:gsm8k"
    c.data.template = "instruction"
    c.rollout.max_prompt_tokens, c.rollout.max_response_tokens = 2000, 3000
    c.rollout.max_sequential_steps, c.rollout.path_labels = 0, ()
    c.rollout.min_path_tokens, c.rollout.max_path_tokens = 64, 0
    c.rollout.max_summary_tokens, c.rollout.summary_reserve = 0, 256
    c.rollout.answer_reserve = 256
    c.rollout.rows, c.rollout.prompts_per_prefill = 128, 16
    c.rollout.lane_buckets = (1.0, 1.25, 1.5, 2.0)
    c.rollout.steps_per_chunk = 128
    c.reward.window, c.reward.tiered_steps = 10, 2
    c.sft.steps = 230 if c.variant == "structured" else 58
    c.sft.batch_size, c.sft.micro_batch_size, c.sft.lr = 128, 4, 1e-5
    c.rl.steps, c.rl.prompts_per_step, c.rl.group_size = 300, 512, 8
    c.rl.mini_batches, c.rl.micro_batch_size = 4, 4
    c.rl.shared_prompt_tokens = ()  # two rows a device, of which prompts are little
    c.rl.lr, c.rl.lr_schedule, c.rl.kl_coef = 1e-6, "constant", 0.0
    c.mesh.data, c.mesh.fsdp, c.mesh.tensor = 1, -1, 4
    c.eval.problems, c.eval.samples, c.eval.banned = 256, 1, False
    c.checkpoint.every_steps, c.report.traces = 10, 8


SIZES: Mapping[str | None, Callable[[ml_collections.ConfigDict], None]] = {
    None: lambda c: None,
    "smoke": _smoke,
    "smollm2": _smollm2,
    "qwen3_4b": _qwen3_4b,
}

# The best for RL of what was priced as `python -m pr1_jax.plan --search` prices, by size
# and devices, each on the mesh of the size (docs/launch.md).
FASTEST: Mapping[str | None, Mapping[str, Mapping[str, Any]]] = {
    "qwen3_4b": {
        "v5e:4x4": {"rl.micro_batch_size": 4, "rollout.rows": 192},
        "v6e:4x4": {"rl.micro_batch_size": 4, "rollout.rows": 448},
        "v5p:2x2x2": {"rl.micro_batch_size": 16, "rollout.rows": 384},
    },
}
