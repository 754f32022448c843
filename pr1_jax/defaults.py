"""Every setting of an experiment: its default, its unit, and what it is.

The comments here are what docs/config.md says, one line a field, with the unit in
brackets; after a change write it anew:

    python -m pr1_jax.defaults > docs/config.md

Shares are of 1, rates are per update. Files in `configs/` start from `get_config` and
state what differs; a size is a variant of all of them (`rl_alternating.py:smoke`).
"""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import ml_collections

REAL = ("smollm2", "qwen3_4b")  # sizes with a pretrained model and real data


def get_config(
    size: str | None = None, *, variant: str = "structured"
) -> ml_collections.ConfigDict:
    """The settings of a size: None, `smoke`, `smollm2` or `qwen3_4b`.

    Raises:
      ValueError: an unknown size.
    """
    if size not in SIZES:
        known = [name for name in SIZES if name]
        raise ValueError(f"config variant {size!r} is not one of {known}")
    config = _defaults(variant)
    SIZES[size](config)
    return config


def _defaults(variant: str) -> ml_collections.ConfigDict:
    c = ml_collections.ConfigDict()
    c.name = "common"  # of the experiment; its workdir is runs/NAME
    c.seed = 0  # of first parameters and of draws
    c.variant = variant  # "structured" or "causal": the paper's Unseen and Seen
    # In order, of "coldstart", "sft", "rl" and "benchmark"; a model is evaluated before
    # and after each stage that trains it.
    c.stages = ("sft", "rl")
    # What computes the model: "xla", "cpu" (C++ kernels: float32 on a CPU, updates on
    # one device), or "auto": for updates and for decoding each "cpu" where it runs.
    c.kernels = "auto"

    c.model = ml_collections.ConfigDict()
    # Hugging Face folder or hub name; "" = a small model for the task made by code, in
    # the shape that the next six fields give.
    c.model.path = ""
    c.model.num_layers = 4
    c.model.width = 128  # [numbers] of a token between layers
    c.model.num_heads = 4  # query heads
    c.model.num_kv_heads = 2  # key and value heads; they divide the query heads
    c.model.head_dim = 32  # [numbers] of a head
    c.model.mlp_width = 512  # [numbers] inside an MLP
    c.model.dtype = "float32"  # of activations; parameters are float32
    c.model.scan_layers = False  # one compiled layer, stacked parameters
    c.model.remat = False  # recompute layers in the backward pass
    c.model.remat_policy = "nothing"  # kept all the same; or "dots", matrix products
    c.model.attention = "auto"  # of updates: "pallas" (TPU), "xla", or "auto"
    c.model.query_chunk = 512  # [queries] whose scores XLA holds at once
    c.model.logits_chunk = 0  # [tokens] whose logits are held at once; 0 = all
    c.model.length_buckets = (60, 76, 92)  # [tokens] lengths of micro-batches

    c.data = ml_collections.ConfigDict()
    # Where things come from: embedded:easy or embedded:hard (made by code); a .jsonl,
    # .parquet or .array_record file, a folder or glob of them; tfds:NAME; or
    # hf:OWNER/NAME. @SPLIT behind the latter two takes another split, and
    # #COLUMN=VALUE behind any the records that have this value.
    c.data.sft = "embedded:easy"  # traces of the stage sft
    c.data.coldstart = "embedded:easy"  # problems for the teacher of coldstart
    c.data.rl = "embedded:hard"  # problems of the stage rl
    # Held-out problems; of the stage benchmark NAME=SOURCE@SAMPLES,… with the number of
    # responses to each problem, eval.samples by default.
    c.data.eval = "embedded:hard"
    c.data.seed = 0  # of the order of records, and of embedded ones
    # What the model is asked: "plain" (the question), "instruction" (with ours before
    # it), "chat" (by the tokenizer's chat template), "own" (the data's messages).
    c.data.template = "plain"
    # Columns of the data; of several names the first that a record has.
    c.data.columns = ml_collections.ConfigDict()
    c.data.columns.question = "question,problem,Problem,prompt"  # text or messages
    c.data.columns.answer = "answer,Answer,reward_model.ground_truth"  # reference
    c.data.columns.response = "response"  # trace
    # The task made by code, whose problems are embedded:easy and embedded:hard; with
    # options such as search:block_share=0.5,late_share=0.5.
    c.data.task = "search"

    c.rollout = ml_collections.ConfigDict()
    c.rollout.num_paths = 2  # of a block
    c.rollout.max_blocks = 4  # of a response; 0 = none are opened
    c.rollout.max_prompt_tokens = 28  # [tokens] longer prompts are dropped
    c.rollout.max_response_tokens = 92  # [tokens] longer traces are dropped
    c.rollout.min_path_tokens = 10  # [tokens] a block opens only if each may have these
    c.rollout.max_path_tokens = 36  # [tokens] 0 = as the response's budget allows
    c.rollout.max_summary_tokens = 8  # [tokens] 0 = as the response's budget allows
    c.rollout.summary_reserve = 8  # [tokens] kept for the summary while paths run
    c.rollout.answer_reserve = 6  # [tokens] kept for what follows a block
    c.rollout.temperature = 1.0  # 0 = greedy
    c.rollout.top_k = 0  # [tokens] only the likeliest; 0 = all
    c.rollout.top_p = 1.0  # [share] of probability that the likeliest tokens make up
    # "causal_after_block": RL samples as the published code does, plain causal text
    # once a block has closed, and trains as ever; for studies of what that costs.
    c.rollout.shortcut = ""
    c.rollout.rows = 128  # [responses] decoded at the same time
    c.rollout.prompts_per_prefill = 4  # [prompts] computed at once
    # [× rows] Sizes of the list of live lanes; those above num_paths are left out.
    c.rollout.lane_buckets = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0)
    c.rollout.steps_per_chunk = 32  # [tokens] between two looks of the host

    c.reward = ml_collections.ConfigDict()
    c.reward.schedule = "alternating"  # which reward at which step, see docs/method.md
    c.reward.window = 10  # [steps] of the alternating schedule
    c.reward.tiered_steps = 2  # [steps] the last of each window: with bonus for blocks
    c.reward.scaffold_steps = 200  # [steps] of alternating, then accuracy alone
    c.reward.timeout_sec = 3.0  # [s] of processor time, for one answer

    c.sft = ml_collections.ConfigDict()
    c.sft.steps = 500  # [updates]
    c.sft.batch_size = 64  # [traces] of an update
    c.sft.micro_batch_size = 8  # [traces] computed at once; 8 stay in a CPU's cache
    c.sft.lr = 3e-3  # learning rate at its highest
    c.sft.lr_schedule = "cosine"  # or "constant"
    c.sft.warmup_share = 0.1  # [share] of updates with a rising rate

    c.rl = ml_collections.ConfigDict()
    c.rl.steps = 80  # of sampling and training
    c.rl.prompts_per_step = 32  # [prompts]
    c.rl.group_size = 8  # [responses] to a prompt
    c.rl.mini_batches = 2  # [updates] of a step
    c.rl.micro_batch_size = 8  # [responses] computed at once
    # [tokens] First ones of a prompt that are computed once for its responses in a
    # micro-batch, where that is cheaper than to sort responses by length. Of several
    # numbers the largest that no prompt falls short of; each makes as many programs
    # again as there are lengths. () = never.
    c.rl.shared_prompt_tokens = (19,)
    c.rl.lr = 3e-4  # learning rate at its highest
    c.rl.lr_schedule = "cosine"  # or "constant"
    c.rl.warmup_share = 0.0  # [share] of updates with a rising rate
    c.rl.clip_low = 0.2  # ratios are clipped below 1 - this
    c.rl.clip_high = 0.2  # ratios are clipped above 1 + this
    c.rl.kl_coef = 0.0  # weight of the KL divergence from the stage's first policy
    # Where old log-probs are recomputed, tokens are weighted by trained over sampled
    # probability up to this; 0 = no correction.
    c.rl.importance_cap = 0.0
    c.rl.aggregation = "token_mean"  # or "response_mean", "constant"
    c.rl.normalize_std = True  # advantages by their group's spread; False = Dr. GRPO
    c.rl.train_on_forced = False  # on tokens that the runtime wrote; as published: True
    c.rl.dynamic_sampling = False  # replace groups without signal, up to two times

    c.optimizer = ml_collections.ConfigDict()  # AdamW
    c.optimizer.weight_decay = 0.01  # of matrices
    c.optimizer.clip_norm = 1.0  # of the whole gradient; 0 = none
    c.optimizer.tag_lr_multiplier = 1.0  # [× lr] of the tags' embedding rows

    c.mesh = ml_collections.ConfigDict()  # their product is the number of devices
    c.mesh.data = -1  # [devices] with copies of the parameters; -1 = what others leave
    c.mesh.fsdp = 1  # [devices] that split parameters and batches
    c.mesh.tensor = 1  # [devices] that split each layer

    c.coldstart = ml_collections.ConfigDict()
    c.coldstart.problems = 512  # at most
    c.coldstart.samples = 4  # [responses] to each; the first good one is kept
    c.coldstart.needs_block = True  # a trace without a block is left out
    c.coldstart.mode = "structured"  # "ordinary": the teacher does not know the tags

    c.eval = ml_collections.ConfigDict()
    c.eval.problems = 512  # at most, of each source
    c.eval.samples = 1  # [responses] to a problem
    c.eval.banned = True  # evaluate also with blocks banned
    c.eval.modes = ("structured", "causal", "ordinary")  # of the stage benchmark

    c.alarms = ml_collections.ConfigDict()
    c.alarms.min_parallel_ratio = 0.01  # [share] of responses with a block, no alarm
    c.alarms.max_degenerate = 0.99  # [share] of groups without signal, no alarm
    c.alarms.max_skipped = 10  # [updates] in a row, then the run stops; 0 = never

    c.metrics = ml_collections.ConfigDict()
    c.metrics.sinks = ()  # also to "wandb" or "trackio", which are to be installed

    c.report = ml_collections.ConfigDict()
    c.report.traces = 32  # [responses] of a file kept token by token; 0 = none

    c.checkpoint = ml_collections.ConfigDict()
    c.checkpoint.every_steps = 20  # [steps]
    c.checkpoint.keep = 2  # the newest ones
    c.checkpoint.keep_best = 1  # and those best by best_metric
    c.checkpoint.best_metric = "rollout/accuracy"  # of the step that was saved
    c.checkpoint.folder = ""  # another folder for them than the workdir, or gs://…
    c.checkpoint.init = ""  # another run's workdir to take the parameters from
    return c


def _smoke(c: ml_collections.ConfigDict) -> None:
    """All stages in well under 90 seconds on two cores; learns nothing."""
    c.model.num_layers, c.model.width, c.model.mlp_width = 2, 64, 128
    c.model.num_heads, c.model.num_kv_heads, c.model.head_dim = 2, 1, 32
    c.model.length_buckets, c.rl.shared_prompt_tokens = (76,), ()
    c.rollout.rows, c.rollout.prompts_per_prefill = 12, 4
    c.sft.steps, c.sft.batch_size, c.sft.micro_batch_size = 12, 16, 16
    c.rl.steps, c.rl.prompts_per_step, c.rl.group_size = 4, 4, 4
    c.rl.micro_batch_size = 8
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
    c.rollout.min_path_tokens, c.rollout.max_path_tokens = 16, 96
    c.rollout.max_summary_tokens, c.rollout.summary_reserve = 64, 48
    c.rollout.answer_reserve = 48
    c.rollout.rows, c.rollout.prompts_per_prefill = 8, 2
    c.sft.steps, c.sft.batch_size, c.sft.micro_batch_size = 6, 4, 2
    c.sft.lr = 1e-4
    c.rl.steps, c.rl.prompts_per_step, c.rl.group_size = 2, 2, 4
    c.rl.mini_batches, c.rl.micro_batch_size = 1, 2
    c.rl.shared_prompt_tokens = ()
    c.rl.lr, c.rl.lr_schedule = 1e-6, "constant"
    c.reward.window, c.reward.tiered_steps = 2, 1
    c.coldstart.mode, c.coldstart.problems, c.coldstart.samples = "ordinary", 8, 1
    c.eval.problems, c.eval.samples, c.eval.banned = 4, 1, False
    c.checkpoint.every_steps = 4


def _qwen3_4b(c: ml_collections.ConfigDict) -> None:
    """The published settings for Qwen3-4B-Base; needs weights and data."""
    c.model.path = "Parallel-R1/Qwen3-4B-Base-add-special-token"
    c.model.dtype = "bfloat16"
    c.model.scan_layers = c.model.remat = True
    c.model.logits_chunk = 2048
    c.model.length_buckets = (1536, 3072)
    c.data.sft = "hf:Parallel-R1/parallel-r1-cold-start"
    c.data.rl = "hf:Leo-Dai/dapo-math-17k_dedup"
    c.data.eval = "tfds:gsm8k"
    c.data.template = "instruction"
    c.rollout.max_prompt_tokens, c.rollout.max_response_tokens = 2000, 3000
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
    c.rl.lr, c.rl.lr_schedule = 1e-6, "constant"
    c.mesh.data, c.mesh.fsdp, c.mesh.tensor = 1, -1, 4
    c.eval.problems, c.eval.samples, c.eval.banned = 256, 1, False
    c.checkpoint.every_steps, c.report.traces = 10, 8


SIZES: Mapping[str | None, Callable[[ml_collections.ConfigDict], None]] = {
    None: lambda c: None,
    "smoke": _smoke,
    "smollm2": _smollm2,
    "qwen3_4b": _qwen3_4b,
}


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping with dotted names."""
    out: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            out |= flat(value, f"{prefix}{name}.")
        else:
            out[prefix + name] = value
    return out


class Field(NamedTuple):
    """A field of the config as docs/config.md has it."""

    name: str
    default: str
    unit: str
    text: str


_ASSIGNMENT = re.compile(r"    c\.([\w.]+) = ([^#]+?)(?:  # (.*))?")
_HEAD = """# Every field of a config

Made by `python -m pr1_jax.defaults > docs/config.md` from the comments in
`pr1_jax/defaults.py`. A field is set on the command line, `--config.rl.lr=2e-6`, or in a
file of `configs/`. Shares are of 1, rates are per update.
"""
_TABLE = ("| Field | Default | Unit | What it is |", "|---|---|---|---|")
_UNIT = re.compile(r"\[([^]]+)\] ?(.*)")


def fields() -> Iterator[Field]:
    """All fields in the order of `_defaults`, with what the comments there say.

    A group's own comment comes as a field without a default.
    """
    above: list[str] = []
    for line in inspect.getsource(_defaults).splitlines():
        if line.strip().startswith("#"):
            above.append(line.strip(" #"))
            continue
        if match := _ASSIGNMENT.fullmatch(line):
            name, default, beside = match.groups()
            text = beside or " ".join(above)
            unit, text = found.groups() if (found := _UNIT.match(text)) else ("", text)
            if default.startswith("ml_collections"):
                default = ""
            yield Field(name, default, unit, text)
        above = []


def markdown() -> str:
    """The text of docs/config.md."""
    lines = [_HEAD, *_TABLE]
    for name, default, unit, text in fields():
        if default:
            lines.append(f"| `{name}` | `{default}` | {unit} | {text} |")
        else:
            lines += [f"\n## {name}\n", *([f"{text}\n"] if text else []), *_TABLE]
    lines.append("\n## What the sizes change")
    base = flat(get_config().to_dict())
    for size in filter(None, SIZES):
        mine = flat(get_config(size).to_dict())
        changed = (f"`{n}={x!r}`" for n, x in mine.items() if x != base[n])
        text = " ".join(inspect.getdoc(SIZES[size]).split())
        lines.append(f"\n**{size}**: {text} {', '.join(changed)}.")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
