"""What a config must satisfy; a wrong one stops before anything compiles.

Messages have the form `field=value …`. Limits of decoding and of the model's shape are
checked where they are used: `sampler.settings.Settings`, `model.config.ModelConfig`.
"""

import contextlib
import functools
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import ml_collections
from absl import logging

from pr1_jax import layout, losses, rewards
from pr1_jax.data import prompts, sources, tasks, tokenizer
from pr1_jax.defaults import flat, get_config
from pr1_jax.kernels import attention
from pr1_jax.model import adapters
from pr1_jax.model.backend import KERNELS
from pr1_jax.model.config import REMAT_POLICIES
from pr1_jax.sampler.settings import Settings
from pr1_jax.system import hub
from pr1_jax.system.mesh import batch_shards, local_mesh, make_mesh
from pr1_jax.training.optimizer import SCHEDULES
from pr1_jax.workdir import checkpoint, old_fields, sinks
from pr1_jax.workers import own

MODES = (*layout.VARIANTS, "ordinary")  # of decoding; ordinary: without blocks
SHORTCUTS = ("", "causal_after_block")  # of sampling, in RL
PLANS = "plans"  # a mode of the coldstart stage alone: plans for traces without
STAGES = ("coldstart", "sft", "rl", "benchmark")

_DTYPES = ("float32", "bfloat16", "float16")
_CHOICES = {
    "variant": layout.VARIANTS,
    "reward.schedule": rewards.SCHEDULES,
    "rollout.shortcut": SHORTCUTS,
    "rl.objective": losses.OBJECTIVES,
    "rl.kl_estimator": losses.KL_ESTIMATORS,
    "rl.importance": losses.IMPORTANCE,
    "rl.baseline": losses.BASELINES,
    "rl.aggregation": losses.AGGREGATIONS,
    "data.bos": tokenizer.BOS,
    "sft.lr_schedule": SCHEDULES,
    "rl.lr_schedule": SCHEDULES,
    "coldstart.mode": (*MODES, PLANS),
    "model.dtype": _DTYPES,
    "model.remat_policy": tuple(REMAT_POLICIES),
    "model.attention": attention.IMPLEMENTATIONS,
    "kernels": KERNELS,
}
_TOO_LARGE = 2**31  # so that inf and nan are too large, too
_POSITIVE = "must be positive"
_AT_LEAST_1 = "must be at least 1"
_NOT_NEGATIVE = "must not be negative"
_SHARE = "must be from 0 to 1"
_HOLDS = {
    _POSITIVE: lambda x: 0 < x < math.inf,
    _AT_LEAST_1: lambda x: x >= 1,
    _NOT_NEGATIVE: lambda x: 0 <= x < math.inf,
    _SHARE: lambda x: 0 <= x <= 1,
}
_LIMITS = {
    _AT_LEAST_1: """
        sft.steps sft.batch_size sft.micro_batch_size
        rl.steps rl.prompts_per_step rl.group_size rl.mini_batches rl.micro_batch_size
        rollout.rows rollout.steps_per_chunk rollout.prompts_per_prefill
        eval.problems eval.samples coldstart.problems coldstart.samples
        checkpoint.every_steps checkpoint.keep reward.window reward.workers
        model.query_chunk
    """,
    _POSITIVE: """
        sft.lr rl.lr optimizer.tag_lr_multiplier reward.timeout_sec reward.function_sec
        model.lora_alpha
    """,
    _NOT_NEGATIVE: """
        seed data.seed model.logits_chunk model.packed_tokens model.lora_rank report.traces
        rl.clip_low rl.clip_high rl.dual_clip rl.kl_coef
        rl.importance_cap rl.importance_floor reward.overlong_buffer
        optimizer.weight_decay optimizer.clip_norm
        reward.tiered_steps reward.scaffold_steps metrics.peak_tflops
    """,
    _SHARE: "sft.warmup_share rl.warmup_share reward.latency_coef",
}


def check(
    config: ml_collections.ConfigDict, *, devices: Sequence[jax.Device] | None = None
) -> None:
    """Checks all that follows from the config, the devices and the processes alone.

    Args:
      devices: of the mesh; default all.

    Raises:
      ValueError, FileNotFoundError: names the field and its value.
    """
    for name, value in flat(config.to_dict()).items():
        if isinstance(value, int | float):
            need(config, name, abs(value) < _TOO_LARGE, "must be a number below 2^31")
    for name, known in _CHOICES.items():
        if field(config, name) not in known:
            raise ValueError(f"{name}={field(config, name)!r} is not one of {known}")
    for what, names in _LIMITS.items():
        for name in names.split():
            need(config, name, _HOLDS[what](field(config, name)), what)
    kernel, backend = config.model.attention == "pallas", jax.default_backend()
    runs = not kernel or backend == "tpu" or devices is not None
    need(config, "model.attention", runs, f"needs a TPU, not a {backend}")
    stages = tuple(config.stages)
    _holds_only(config, "stages", STAGES)
    need(config, "stages", len({*stages}) == len(stages), "may hold each stage once")
    _check_numbers(config)
    _check_adapters(config)
    sinks.check(field(config, "metrics.sinks"))
    tasks.make(field(config, "data.task"))
    _check_prompts(config)
    _check_benchmarks(config)
    _check_batches(config)
    _check_mesh(config, devices)
    _check_lengths(config)
    _check_traces(config)
    _check_paths(config)


def recomputes(config: ml_collections.ConfigDict) -> bool:
    """Whether RL takes the trainer's log-probs as old ones, not the sampler's."""
    rl, forced = config.rl, config.rl.train_on_forced or config.rollout.shortcut
    return bool(rl.recompute_logps or config.variant == "causal" or forced)


def kl_in_reward(config: ml_collections.ConfigDict) -> bool:
    """Whether the KL divergence is taken off rewards and not a term of the loss."""
    return bool(config.rl.kl_coef) and config.rl.kl_estimator == "k1"


def _check_numbers(config: ml_collections.ConfigDict) -> None:
    known = flat(get_config().to_dict())
    for name, value in flat(config.to_dict()).items():
        if name not in known:
            said = old_fields.hint(name) or "Take it out of the config file."
            raise ValueError(f"{name}={value!r} is not a field of a config. {said}")
    trains = {"sft", "rl"} & {*config.stages}
    need(
        config,
        "model.dtype",
        not trains or config.model.dtype != "float16",
        "cannot train: gradients below 6e-8 vanish in it, and those above 65504 are "
        "infinite; take bfloat16 or float32",
    )
    if "rl" in trains:
        _check_objective(config)


def _check_objective(config: ml_collections.ConfigDict) -> None:
    rl, rollout, buffer = config.rl, config.rollout, config.reward.overlong_buffer
    clips = rl.objective != "cispo"
    what = "must be above 1, as the ratio that it limits; 0 = none"
    need(config, "rl.dual_clip", not rl.dual_clip or rl.dual_clip > 1, what)
    what = (
        f"is of objectives that clip their gain, not of rl.objective={rl.objective}: "
    )
    need(config, "rl.dual_clip", clips or not rl.dual_clip, what + "set it to 0")
    need(
        config,
        "rl.importance_cap",
        not rl.importance_cap or recomputes(config),
        "corrects old log-probs that the trainer recomputes, and here they are the "
        "sampler's own: set rl.recompute_logps=True",
    )
    what = f"is above rl.importance_cap={rl.importance_cap}: that is the highest ratio"
    what += "" if rl.importance_cap else ", and 0 corrects nothing; set both"
    fits = rl.importance_floor <= rl.importance_cap
    need(config, "rl.importance_floor", fits, what)
    need(
        config,
        "rl.importance",
        rl.importance == losses.IMPORTANCE[0] or rl.importance_cap > 0,
        "corrects nothing with rl.importance_cap=0: set that to the highest ratio, as 2",
    )
    need(
        config,
        "rl.normalize_parts",
        not rl.normalize_parts or not kl_in_reward(config),
        "has no place for a KL divergence in the reward: take another rl.kl_estimator "
        "than k1",
    )
    as_published = rl.baseline == "group" and rl.normalize_std
    need(
        config,
        "rl.normalize_parts",
        as_published or not rl.normalize_parts,
        "normalises by group, and then by batch: it takes rl.baseline=group and "
        f"rl.normalize_std=True, not {rl.baseline} and {rl.normalize_std}",
    )
    limits = [rollout.max_response_tokens, rollout.max_sequential_steps]
    shortest = min((limit for limit in limits if limit > 0), default=0)
    need(
        config,
        "reward.overlong_buffer",
        buffer <= shortest,
        f"must not be longer than a response may be, {shortest} "
        "(rollout.max_response_tokens, rollout.max_sequential_steps)",
    )


def _check_adapters(config: ml_collections.ConfigDict) -> None:
    need(
        config, "model.lora_rank", isinstance(config.model.lora_rank, int), "is no int"
    )
    _holds_only(config, "model.lora_targets", adapters.TARGETS)
    need(
        config,
        "model.lora_targets",
        bool(adapters.projections(tuple(config.model.lora_targets))),
        f"names no projection: at least one of {adapters.TARGETS[:-1]}",
    )


def _check_prompts(config: ml_collections.ConfigDict) -> None:
    template = config.data.template
    prompts.check_name(template)
    need(
        config,
        "data.instruction",
        not config.data.instruction or template not in ("plain", "own"),
        f"is in no prompt of data.template={template}: take instruction, chat, or a file "
        "*.jinja that names it",
    )


def _check_benchmarks(config: ml_collections.ConfigDict) -> None:
    _holds_only(config, "eval.modes", MODES)
    given = field(config, "data.eval")
    benchmarks = sources.benchmarks(given, field(config, "eval.samples"))
    if "benchmark" in config.stages:
        need(config, "eval.modes", len(config.eval.modes), "holds none")
    else:
        alone = [benchmark.source for benchmark in benchmarks.values()] == [given]
        what = "is of the stage benchmark: others take one SOURCE, and eval.samples"
        need(config, "data.eval", alone, what)


def _check_batches(config: ml_collections.ConfigDict) -> None:
    rl, reward = config.rl, config.reward
    if "rl" in config.stages:
        need(config, "rl.group_size", rl.group_size >= 2, "must be at least 2")
        greedy = config.rollout.temperature == 0
        need(config, "rollout.temperature", not greedy, "gives GRPO equal samples")
    structured = config.variant == "structured"
    need(
        config,
        "rollout.shortcut",
        structured or not config.rollout.shortcut,
        f"is of variant=structured, not {config.variant}",
    )
    _divides(config, "rl.prompts_per_step", "rl.mini_batches")
    mini_batch = rl.prompts_per_step // rl.mini_batches * rl.group_size
    need(
        config,
        "rl.micro_batch_size",
        mini_batch % rl.micro_batch_size == 0,
        f"does not divide the mini-batch of {mini_batch} responses "
        "(rl.prompts_per_step · rl.group_size / rl.mini_batches)",
    )
    _divides(config, "sft.batch_size", "sft.micro_batch_size")
    need(
        config,
        "reward.tiered_steps",
        reward.tiered_steps <= reward.window,
        f"must not be above reward.window={reward.window}",
    )
    for name in ("reward.function", "reward.verifier"):
        if given := field(config, name):
            own.check_form(name, given)
    what = "weighs the parts of reward.function, and there is none"
    need(config, "reward.weights", reward.function or not reward.weights, what)


def _check_mesh(
    config: ml_collections.ConfigDict, devices: Sequence[jax.Device] | None
) -> None:
    mesh = make_mesh(**config.mesh, devices=devices)
    if devices is None:
        local_mesh(mesh)
    shards, processes = batch_shards(mesh), jax.process_count()
    mini_batch = config.rl.prompts_per_step // config.rl.mini_batches
    need(
        config,
        "rl.prompts_per_step",
        mini_batch % processes == 0,
        f"/ rl.mini_batches={config.rl.mini_batches} is not a multiple of the "
        f"{processes} processes",
    )
    for name in ("sft.micro_batch_size", "rl.micro_batch_size"):
        fits = field(config, name) % shards == 0
        what = f"cannot be split over {shards} devices (mesh={dict(config.mesh)})"
        need(config, name, fits, what)


def _check_lengths(config: ml_collections.ConfigDict) -> None:
    settings = decode_settings(config)
    if settings.max_blocks and not settings.may_open_blocks:
        logging.warning(
            "no block ever opens: the smallest takes %d tokens and %d sequential steps "
            "behind <Parallel>, and rollout.max_response_tokens=%d, "
            "rollout.max_sequential_steps=%d; rollout.max_blocks=0 says so, too",
            *(settings.smallest_block, settings.smallest_block_steps),
            *(settings.max_response_tokens, settings.max_sequential_steps),
        )
    for name in ("model.length_buckets", "rl.shared_prompt_tokens"):
        whole = all(isinstance(n, int) and n >= 1 for n in field(config, name))
        need(config, name, whole, "must hold positive whole numbers")
    _check_packing(config, settings)
    most = float(settings.num_paths)
    need(
        config,
        "rollout.lane_buckets",
        all(isinstance(s, int | float) and s >= 1 for s in config.rollout.lane_buckets),
        f"are shares of the rows, from 1 to rollout.num_paths={most:g}",
    )


def _check_packing(config: ml_collections.ConfigDict, settings: Settings) -> None:
    tokens, longest = config.model.packed_tokens, settings.max_tokens
    need(config, "model.packed_tokens", isinstance(tokens, int), "must be whole")
    if not tokens or not {"sft", "rl"} & {*config.stages}:
        return
    need(
        config,
        "model.packed_tokens",
        tokens >= longest,
        f"is too short a row for the longest response with its prompt, {longest} tokens "
        "(rollout.max_prompt_tokens + rollout.max_response_tokens); 0 packs none",
    )
    need(
        config,
        "rl.shared_prompt_tokens",
        "rl" not in config.stages or not config.rl.shared_prompt_tokens,
        f"and model.packed_tokens={tokens} exclude each other: responses that are packed "
        "share no prompt; set rl.shared_prompt_tokens=() or model.packed_tokens=0",
    )


def _check_traces(config: ml_collections.ConfigDict) -> None:
    """Traces, where code makes them, must have the paths that are sampled; and plans."""
    task = tasks.make(config.data.task)
    paths = int(getattr(task, "paths", config.rollout.num_paths))
    need(
        config,
        "coldstart.mode",
        "coldstart" not in config.stages
        or config.coldstart.mode != PLANS
        or config.rollout.planned,
        "needs rollout.planned=True",
    )
    is_made = "sft" in config.stages and config.data.sft.startswith("embedded:")
    if not is_made or not config.rollout.max_blocks:
        return
    rollout, planned = config.rollout, bool(getattr(task, "planned", False))
    need(
        config,
        "data.task",
        paths == rollout.num_paths,
        f"makes traces of {paths} paths, and rollout.num_paths is "
        f"{rollout.num_paths}: make them equal, with a label a path in "
        "rollout.path_labels, or () for none",
    )
    need(
        config,
        "data.task",
        planned == rollout.planned,
        f"makes traces {'with' if planned else 'without'} plans, and rollout.planned is "
        f"{rollout.planned}: make them agree, by rollout.planned={planned} or by the "
        f"option planned={int(rollout.planned)} of the task partner",
    )


def _check_paths(config: ml_collections.ConfigDict) -> None:
    init, path = config.checkpoint.init, config.model.path
    for field in ("folder", "init"):
        if given := config.checkpoint[field]:
            checkpoint.absolute(given, f"checkpoint.{field}")
    if init and "://" not in init and not os.path.isdir(init):
        raise FileNotFoundError(f"checkpoint.init={init} is not a folder")
    there = not path or os.path.exists(os.path.expanduser(path))
    if not there and hub.looks_local(path):
        raise FileNotFoundError(f"model.path={path} does not exist")


@contextlib.contextmanager
def naming(config: ml_collections.ConfigDict, name: str) -> Iterator[None]:
    """Names data and limits of their records in an error that reading them raises.

    Args:
      name: of the field in `data`.
    """
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        limits = ", ".join(
            f"rollout.{limit}={config.rollout[limit]}"
            for limit in ("max_prompt_tokens", "max_response_tokens")
        )
        message = f"data.{name}={config.data[name]} ({limits}): {error}"
        raise type(error)(message) from error


def decode_settings(config: ml_collections.ConfigDict) -> Settings:
    """The decode settings in `config.rollout`; ValueError names what is wrong."""
    names = Settings.__dataclass_fields__
    fields = {n: v for n, v in config.rollout.items() if n in names}
    return Settings(variant=config.variant, **fields)


def field(config: ml_collections.ConfigDict, name: str) -> Any:
    """The value of a dotted field name; ValueError if there is none."""
    try:
        return functools.reduce(lambda c, part: c[part], name.split("."), config)
    except (KeyError, TypeError) as error:  # --config.rl={} takes all of them away
        raise ValueError(
            f"{name} is missing: set the fields of a group one by one, "
            f"as --config.{name}=VALUE"
        ) from error


def need(config: ml_collections.ConfigDict, name: str, holds: bool, what: str) -> None:
    """Raises ValueError, with field and value, unless the condition holds."""
    if not holds:
        raise ValueError(f"{name}={field(config, name)} {what}")


def _holds_only(
    config: ml_collections.ConfigDict, name: str, known: Sequence[str]
) -> None:
    """Raises ValueError unless all items of a field are among those known."""
    items = field(config, name)  # maybe some that have no hash
    need(config, name, all(item in known for item in items), f"may hold {known}")


def _divides(config: ml_collections.ConfigDict, whole: str, part: str) -> None:
    fits = field(config, whole) % field(config, part) == 0
    need(config, part, fits, f"does not divide {whole}={field(config, whole)}")
