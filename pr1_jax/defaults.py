"""Every setting of an experiment: its default, its unit, and what it is.

The comments here are what docs/config.md says, one line a field, with the unit in
brackets; after a change write it anew:

    python -m pr1_jax.defaults > docs/config.md

Shares are of 1, rates are per update. Files in `configs/` start from `get_config` and
state what differs; a size is a variant of all of them (`rl_alternating.py:smoke`).
"""

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import ml_collections

from pr1_jax.sizes import FASTEST, SIZES


def get_config(
    arg: str | None = None, *, variant: str = "structured"
) -> ml_collections.ConfigDict:
    """The settings of a size: None, `smoke`, `smollm2` or `qwen3_4b`.

    Args:
      arg: the size; behind a comma, devices of `FASTEST`, as in `qwen3_4b,v5e:4x4`.

    Raises:
      ValueError: an unknown size, or devices that it has no settings for.
    """
    size, _, devices = (arg or "").partition(",")
    size = size or None
    if size not in SIZES:
        known = [name for name in SIZES if name]
        raise ValueError(f"config variant {arg!r} is not one of {known}")
    known = FASTEST.get(size, {})
    if devices and devices not in known:
        raise ValueError(
            f"config variant {arg!r}: {size} has settings for {[*known]}; without a comma "
            "it is for any devices, and `python -m pr1_jax.plan --search` looks for others"
        )
    config = ml_collections.ConfigDict()
    for add in _GROUPS:
        add(config)
    config.variant = variant
    SIZES[size](config)
    for name, value in known.get(devices, {}).items():
        section, field = name.split(".")
        config[section][field] = value
    return config


def _experiment(c: ml_collections.ConfigDict) -> None:
    """What is run."""
    c.name = "common"  # the experiment's name; its workdir is runs/NAME
    c.seed = 0  # seed of first parameters and of draws
    c.variant = "structured"  # or "causal"; the paper calls them Unseen and Seen
    # Stages in order: "coldstart", "sft", "rl", "benchmark". A model is evaluated before
    # the first and after each that trains it.
    c.stages = ("sft", "rl")
    # What computes the model: "xla", "tpu" (a Pallas kernel attends in decode steps; for
    # updates see model.attention), "cpu" (C++ kernels: float32 on a CPU, updates on one
    # device), or "auto": for updates and for decoding each "tpu" or "cpu" where it runs.
    c.kernels = "auto"


def _model(c: ml_collections.ConfigDict) -> None:
    """The model, and how it is computed."""
    c.model = ml_collections.ConfigDict()
    # A Hugging Face folder or hub name; "" = a small model that speaks data.task, in the
    # shape of the next six fields.
    c.model.path = ""
    c.model.num_layers = 4  # decoder layers
    c.model.width = 128  # [numbers] a token's vector between layers
    c.model.num_heads = 4  # query heads
    c.model.num_kv_heads = 2  # key and value heads; they divide num_heads
    c.model.head_dim = 32  # [numbers] a head's vector
    c.model.mlp_width = 512  # [numbers] the vector inside an MLP
    # Of activations: or "bfloat16"; without training also "float16". Parameters and the
    # optimizer's moments are float32.
    c.model.dtype = "float32"
    c.model.scan_layers = False  # compile one layer for all, with stacked parameters
    c.model.remat = False  # recompute layers in the backward pass: less memory, slower
    # What remat keeps of a layer beside its input: "nothing", "attention" (its output, and
    # the sum that it is added to), or "dots" (that of matrix products, too).
    c.model.remat_policy = "nothing"
    c.model.attention = "auto"  # attention of updates: "pallas" (TPU), "xla" or "auto"
    c.model.query_chunk = 512  # [tokens] queries whose scores XLA holds at once
    # [tokens] Of a micro-batch, as many of each row, whose logits are held at once; 0 = all.
    c.model.logits_chunk = 0
    # [tokens] Micro-batches are cut to the next of these lengths.
    c.model.length_buckets = (56, 72, 90, 106)
    # [tokens] Rows of updates are so long and hold several responses one after another, so
    # that little is padding; a micro-batch is of so many rows. At least the longest prompt
    # and response together. 0 = a row is a response.
    c.model.packed_tokens = 0
    # LoRA: adapters of this rank are trained beside frozen weights, which are kept in
    # model.dtype (docs/adapters.md); 0 = all weights are trained.
    c.model.lora_rank = 0
    c.model.lora_alpha = 32.0  # adapters' products count lora_alpha / lora_rank times
    # What is trained of it: projections by their names in peft ("q_proj", …, "down_proj"),
    # "all-linear" for all seven, and "tags" for the tags' rows of the embedding.
    c.model.lora_targets = ("all-linear", "tags")


def _data(c: ml_collections.ConfigDict) -> None:
    """Problems and traces, and how they are put to the model."""
    # Sources are embedded:easy and embedded:hard (made by code, see data.task); .jsonl,
    # .parquet or .array_record files, a folder or a glob of them; tfds:NAME; or
    # hf:OWNER/NAME. With @SPLIT behind one of the latter two another split is read, and
    # with #COLUMN=VALUE behind any of them only records that have this value.
    c.data = ml_collections.ConfigDict()
    c.data.sft = "embedded:hard"  # source of the traces for the stage sft
    c.data.coldstart = "embedded:easy"  # source of the problems for coldstart's teacher
    c.data.rl = "embedded:hard"  # source of the problems for the stage rl
    # Source of held-out problems. The stage benchmark takes several, as
    # NAME=SOURCE@SAMPLES,… with so many responses to each problem (else eval.samples).
    c.data.eval = "embedded:hard"
    # The task made by code. Options of its traces follow, as in
    # partner:block_share=0.5,late_share=0.5 (see pr1_jax/data/partner.py).
    c.data.task = "partner"
    c.data.seed = 0  # seed of the order of records, and of those made by code
    # How a problem is put to the model: "plain" (the question as it is), "instruction"
    # (our instruction before it), "chat" (both by the tokenizer's chat template), "own"
    # (the data's messages by that template, without the solution at their end), or a file
    # of yours, as my_prompt.jinja (docs/rewards.md).
    c.data.template = "plain"
    # A text file with an instruction in place of ours; "" = ours.
    c.data.instruction = ""
    # Whether prompts begin with the tokenizer's BOS: "auto" (as it encodes text by itself;
    # a chat template writes its own, or none), "yes" or "no". It is never there twice.
    c.data.bos = "auto"
    # Whether a record ends the run if its question, answer or response is null, blank
    # or unreadable; otherwise it is left out, counted and named in the log (docs/data.md).
    c.data.strict = False
    # Columns of the data. Of several names the first that is neither null nor blank in a
    # record is read from it.
    c.data.columns = ml_collections.ConfigDict()
    # Text, or a chat: then the last turn of its user (docs/data.md).
    c.data.columns.question = "question,problem,Problem,prompt,messages,conversations"
    c.data.columns.answer = "answer,Answer,reward_model.ground_truth"  # the reference
    # The trace, with tags. Where none of these has one, a chat's last assistant turn.
    c.data.columns.response = "response"


def _rollout(c: ml_collections.ConfigDict) -> None:
    """How responses are sampled."""
    c.rollout = ml_collections.ConfigDict()
    c.rollout.num_paths = 2  # paths of a block; where it is planned, at most
    c.rollout.max_blocks = 4  # blocks of a response, at most
    c.rollout.max_prompt_tokens = 28  # [tokens] longer prompts are dropped
    c.rollout.max_response_tokens = 96  # [tokens] of a response, EOS included, at most
    # [steps] on the critical path of a response, at most: a block counts as its longest
    # path (docs/method.md, section 3). 0 = no deadline.
    c.rollout.max_sequential_steps = 43
    # What the runtime writes behind each `<Path>`, a text a path, as (" 1", " 2"); () =
    # nothing, as published. Not in the loss.
    c.rollout.path_labels = (" 1", " 2")
    # Whether the model writes a plan of each path before they fork, and so decides how
    # many there are (docs/method.md, section 10); needs path_labels.
    c.rollout.planned = False
    c.rollout.min_plan_tokens = 4  # [tokens] a plan is begun if it may have these
    c.rollout.max_plan_tokens = 0  # [tokens] of a plan, at most; 0 = what is left
    c.rollout.min_path_tokens = 10  # [tokens] a block opens if each path may have these
    c.rollout.max_path_tokens = 34  # [tokens] of a path, at most; 0 = what is left
    c.rollout.max_summary_tokens = 4  # [tokens] of a summary, at most; 0 = what is left
    c.rollout.summary_reserve = 2  # [tokens] that paths leave for the summary
    c.rollout.answer_reserve = 3  # [tokens] that blocks leave for what follows
    c.rollout.temperature = 1.0  # temperature of sampling; 0 = greedy, not in RL
    c.rollout.top_k = 0  # [tokens] sample from so many, the likeliest; 0 = all
    c.rollout.top_p = 1.0  # [share] of probability that tokens sampled from make up
    # "causal_after_block": RL samples as the published code does, plain causal text
    # once a block has closed, and trains as ever; for studies of what that costs.
    c.rollout.shortcut = ""
    c.rollout.rows = 128  # [responses] decoded at the same time
    c.rollout.prompts_per_prefill = 4  # [prompts] computed at the same time
    # [× rows] Sizes of the list of live lanes, one program each; those above num_paths
    # are left out.
    c.rollout.lane_buckets = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0)
    c.rollout.steps_per_chunk = 32  # [tokens] decoded between two looks of the host


def _rewards(c: ml_collections.ConfigDict) -> None:
    """What a response is rewarded with."""
    c.reward = ml_collections.ConfigDict()
    # Which reward counts at which step: docs/method.md, section 5.
    c.reward.schedule = "alternating"
    c.reward.window = 10  # [steps] in a window of the alternating schedule
    c.reward.tiered_steps = 2  # [steps] at a window's end that pay a bonus for blocks
    c.reward.scaffold_steps = 200  # [steps] that the scaffold alternates, at the start
    # Bonus of a correct response for its short critical path, under every schedule: this
    # times the share it saves of the longest among its group's correct ones; at most 1.
    c.reward.latency_coef = 0.0
    # [tokens] Before the limit of tokens, or of sequential steps, in which a response is
    # punished more and more, up to 1 at the limit; 0 = never (docs/objectives.md).
    c.reward.overlong_buffer = 0
    c.reward.timeout_sec = 3.0  # [s] of processor time to verify an answer, at most
    # A function of yours that rewards responses: FILE.py:NAME or PACKAGE.MODULE:NAME
    # (docs/rewards.md); "" = none.
    c.reward.function = ""
    # Weights of the parts of a reward, as schedule=1,function=0.1, or, where the function
    # gives parts, schedule=1,function.NAME=0.1,…; "" = each 1. Only with a function.
    c.reward.weights = ""
    # A function of yours that says whether an answer is right, instead of our check.
    c.reward.verifier = ""
    # [s] A call of these functions may take, by the clock; a longer one ends the run.
    c.reward.function_sec = 30.0
    # Processes that call each of these functions, beside each training process.
    c.reward.workers = 2


def _training(c: ml_collections.ConfigDict) -> None:
    """The stages that train."""
    c.sft = ml_collections.ConfigDict()
    c.sft.steps = 1000  # [updates] of the stage
    c.sft.batch_size = 64  # [traces] of an update
    c.sft.micro_batch_size = 8  # [traces] computed at once; rows, if they are packed
    c.sft.lr = 3e-3  # learning rate, at its highest
    c.sft.lr_schedule = "cosine"  # how the rate falls: or "constant"
    c.sft.warmup_share = 0.1  # [share] of the updates in which the rate rises

    c.rl = ml_collections.ConfigDict()
    c.rl.steps = 100  # [steps] of the stage: each samples, then trains
    c.rl.prompts_per_step = 32  # [prompts] of a step
    c.rl.group_size = 8  # [responses] to a prompt
    c.rl.mini_batches = 2  # [updates] of a step
    c.rl.micro_batch_size = 8  # [responses] computed at once; rows, if they are packed
    # [tokens] First tokens of a prompt that are computed once for its responses in a
    # micro-batch, where that is cheaper than to sort responses by length. Of several
    # numbers the largest that no prompt falls short of is taken; each makes as many
    # programs again as there are lengths. () = never.
    c.rl.shared_prompt_tokens = (28,)
    c.rl.lr = 3e-4  # learning rate, at its highest
    c.rl.lr_schedule = "cosine"  # how the rate falls: or "constant"
    c.rl.warmup_share = 0.0  # [share] of the updates in which the rate rises
    # What is maximised: "grpo", "gspo" (one ratio a response) or "cispo" (clipped weights).
    # docs/objectives.md says which fields make which paper.
    c.rl.objective = "grpo"
    c.rl.clip_low = 0.2  # probability ratios are clipped below 1 − clip_low
    c.rl.clip_high = 0.2  # probability ratios are clipped above 1 + clip_high
    # [ratio] Where an advantage is negative, ratios above this count as this; 0 = none.
    c.rl.dual_clip = 0.0
    # Weight of the KL divergence from the stage's first policy; the paper has none. The
    # small model needs a little, or noise of early steps spoils single numbers for good.
    c.rl.kl_coef = 0.01
    # How it is estimated in the loss: "k2", "k3", or "k1+" and "k3+" with the gradient of
    # "k2". "k1" takes it off a response's reward, and leaves it out of the loss.
    c.rl.kl_estimator = "k3"
    # Old log-probs are the trainer's, by one more forward pass a step, and not those that
    # the sampler recorded. They always are in the causal variant, with train_on_forced,
    # and with rollout.shortcut. Of use in bfloat16, where the two differ.
    c.rl.recompute_logps = False
    # [ratio] Where old log-probs are recomputed, a token's loss is weighted by the ratio of
    # trained to sampled probability, at most this; 0 = no correction.
    c.rl.importance_cap = 0.0
    c.rl.importance_floor = 0.0  # [ratio] and at least this
    # What becomes of ratios outside: "token_truncate" (they are set to floor and cap),
    # "token_mask" (such tokens are dropped), or the same with the ratio of a whole response:
    # "sequence_truncate", "sequence_mask".
    c.rl.importance = "token_truncate"
    c.rl.aggregation = "token_mean"  # of the loss: or "response_mean", "constant"
    # What advantages compare a reward with: the mean of its "group", of the others in it
    # ("leave_one_out"), or of the "batch", which then is the step's; "group_then_batch" is
    # as "group", but the spread that divides is of the batch.
    c.rl.baseline = "group"
    c.rl.normalize_std = True  # divide advantages by their spread; no = Dr. GRPO
    # Normalise the parts of a reward each in its group, before they are summed (GDPO).
    c.rl.normalize_parts = False
    # Leave responses that were cut off out of the loss, not out of the baseline.
    c.rl.mask_truncated = False
    c.rl.train_on_forced = False  # also on tokens the runtime wrote, as published
    c.rl.dynamic_sampling = False  # replace groups without signal; 3 tries at most

    # AdamW; its betas are 0.9 and 0.95.
    c.optimizer = ml_collections.ConfigDict()
    c.optimizer.weight_decay = 0.01  # decay of matrices, not of norms or biases
    c.optimizer.clip_norm = 1.0  # the gradient's norm, at most; 0 = any
    c.optimizer.tag_lr_multiplier = 1.0  # [× lr] rate of the tags' embedding rows

    # The product is the number of devices.
    c.mesh = ml_collections.ConfigDict()
    c.mesh.data = -1  # [devices] that split batches, parameters copied; -1 = the rest
    c.mesh.fsdp = 1  # [devices] that split batches and parameters
    c.mesh.tensor = 1  # [devices] that split each layer


def _other_stages(c: ml_collections.ConfigDict) -> None:
    """Cold start and evaluation."""
    c.coldstart = ml_collections.ConfigDict()
    c.coldstart.problems = 512  # problems for the teacher, at most
    c.coldstart.samples = 4  # [responses] to each; the first good one is kept
    c.coldstart.needs_block = True  # leave out traces without a block
    # How the teacher decodes: "structured", "causal", or "ordinary" if it does not know
    # the tags; or "plans", ordinary, too: it plans the paths of traces in data.coldstart.
    c.coldstart.mode = "structured"

    c.eval = ml_collections.ConfigDict()
    c.eval.problems = 512  # problems of each source, at most
    c.eval.samples = 1  # [responses] to a problem
    c.eval.banned = True  # evaluate also with blocks banned
    c.eval.modes = ("structured", "causal", "ordinary")  # of decoding a benchmark


def _workdir(c: ml_collections.ConfigDict) -> None:
    """What is watched and kept."""
    # Beyond these, a metric alarm/NAME is 1 and the log says what to look at.
    c.alarms = ml_collections.ConfigDict()
    c.alarms.min_parallel_ratio = 0.01  # [share] of responses with a block
    c.alarms.max_degenerate = 0.99  # [share] of groups with equal rewards
    c.alarms.max_skipped = 10  # [updates] skipped in a row; then a run stops; 0 = never

    c.metrics = ml_collections.ConfigDict()
    # [TFLOP/s] Peak of a device, by which MFU is measured; 0 = its data sheet's. A CPU has
    # none there: `python -m pr1_jax.bench --suite=limits` measures one.
    c.metrics.peak_tflops = 0.0
    c.metrics.sinks = ()  # send metrics also to "wandb" or "trackio", once installed

    c.report = ml_collections.ConfigDict()
    c.report.traces = 32  # [responses] of a file kept token by token; 0 = none

    c.checkpoint = ml_collections.ConfigDict()
    c.checkpoint.every_steps = 20  # [steps] between two checkpoints
    c.checkpoint.keep = 2  # checkpoints kept, the newest
    c.checkpoint.keep_best = 1  # and kept beside them, the best by best_metric
    c.checkpoint.best_metric = "rollout/accuracy"  # at the step that is saved
    c.checkpoint.folder = ""  # where they go: a folder or gs://…; "" = the workdir
    c.checkpoint.init = ""  # workdir of a run to take the first parameters from


_GROUPS = (
    _experiment,
    _model,
    _data,
    _rollout,
    _rewards,
    _training,
    _other_stages,
    _workdir,
)


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
_UNIT = re.compile(r"(?:\[([^]]+)\] )?(.*)")


def fields() -> Iterator[Field]:
    """All fields in the order of `_GROUPS`, with what the comments there say.

    A group's own comment comes as a field without a default.
    """
    above: list[str] = []
    for line in "".join(map(inspect.getsource, _GROUPS)).splitlines():
        if line.strip().startswith("#"):
            above.append(line.strip(" #"))
            continue
        if match := _ASSIGNMENT.fullmatch(line):
            name, default, beside = match.groups()
            text = beside or " ".join(above)
            unit, text = _UNIT.fullmatch(text).groups()
            if default.startswith("ml_collections"):
                default = ""
            yield Field(name, default, unit or "", text)
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
        for devices, settings in FASTEST.get(size, {}).items():
            found = ", ".join(f"`{n}={x!r}`" for n, x in settings.items())
            lines.append(f"\n**{size},{devices}**: the same, but {found}.")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
