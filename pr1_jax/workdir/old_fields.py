"""What became of the fields that older versions wrote into config.json.

The one place that knows them: a run folder of an older version opens and resumes by it,
and an override on the command line that names such a field is told what to write.
"""

from collections.abc import Mapping
from typing import Any

RENAMED = {"model.kernels": "kernels", "rollout.kernels": "kernels"}
# Now constants, with the values that they have where they are used.
CONSTANT: Mapping[str, Any] = {
    "model.param_dtype": "float32",
    "model.rope_base": 1e4,
    "data.eval_seed": 0,
    "rollout.ban_illegal": True,
    "rollout.refill_share": 0.0625,
    "rl.dynamic_sampling_rounds": 3,
    "optimizer.b1": 0.9,
    "optimizer.b2": 0.95,
    "optimizer.eps": 1e-8,
}
# Dropped, whatever they were: they changed nothing of what a run learns.
DROPPED = (
    *("alarms.logp_gap", "alarms.max_parallel_ratio", "alarms.max_undecided"),
    *("alarms.min_entropy", "alarms.min_length", "report.every_sec"),
)
# Newer than some runs, with the values that such a run had without them.
ADDED: Mapping[str, Any] = {
    "data.instruction": "",
    "data.strict": False,
    "model.lora_alpha": 32.0,
    "model.lora_rank": 0,
    "model.lora_targets": ["all-linear", "tags"],
    "rl.recompute_logps": False,
    "reward.function": "",
    "reward.function_sec": 30.0,
    "reward.latency_coef": 0.0,
    "reward.overlong_buffer": 0,
    "reward.verifier": "",
    "reward.weights": "",
    "reward.workers": 2,
    "rl.baseline": "group",
    "rl.dual_clip": 0.0,
    "rl.importance": "token_truncate",
    "rl.importance_floor": 0.0,
    "rl.kl_estimator": "k3",
    "rl.mask_truncated": False,
    "rl.normalize_parts": False,
    "rl.objective": "grpo",
    "rollout.max_plan_tokens": 0,
    "rollout.max_sequential_steps": 0,
    "rollout.min_plan_tokens": 4,
    "rollout.path_labels": [],  # as JSON has it
    "rollout.planned": False,
}
# Defaults that changed and mean the same for the runs that had them: old and new.
WIDENED: Mapping[str, tuple[Any, Any]] = {
    "data.columns.question": (  # such runs had one of the first four columns
        "question,problem,Problem,prompt",
        "question,problem,Problem,prompt,messages,conversations",
    ),
}
_SHARES = {"block_share": 1.0, "hard_share": 0.0, "late_share": 0.0}  # in data.task
_BENCHMARKS = "eval.benchmarks."  # NAME.source and NAME.samples; in data.eval


def today(old: Mapping[str, Any]) -> dict[str, Any]:
    """A config of any version in the fields of this one; both by dotted names."""
    fields = {**ADDED, **{name: x for name, x in old.items() if not hint(name)}}
    fields |= later(old)
    fields |= {new: old[name] for name, new in RENAMED.items() if name in old}
    if not _recomputed(old):  # then it was without effect, and now it is refused
        fields |= {"rl.importance_cap": 0.0} if "rl.importance_cap" in old else {}
    for name, (was, now) in WIDENED.items():
        if fields.get(name) == was:
            fields[name] = now
    if any(f"data.{name}" in old for name in _SHARES):
        fields["data.task"] = _task(old)
    if any(name.startswith(_BENCHMARKS) for name in old):
        fields["data.eval"] = _benchmarks(old)
    return fields


def _recomputed(old: Mapping[str, Any]) -> bool:
    """Whether a run of this version, or of an older one, recomputes old log-probs."""
    switches = ("rl.recompute_logps", "rl.train_on_forced", "rollout.shortcut")
    return old.get("variant") == "causal" or any(old.get(name) for name in switches)


def later(old: Mapping[str, Any]) -> dict[str, Any]:
    """Newer fields by which a run may go on otherwise, with what was done before them."""
    # A model without a folder has a tokenizer without BOS.
    fields = {"data.bos": "no" if old.get("model.path") else "auto"}
    fields["model.packed_tokens"] = 0
    return {name: value for name, value in fields.items() if name not in old}


def refused(old: Mapping[str, Any], *groups: str) -> str:
    """Says which field had a value that no config can have any more; "" if none had.

    Args:
      groups: looks at fields of these alone; none = at all.
    """
    for name, value in CONSTANT.items():
        was = old.get(name, value)
        if was != value and (not groups or name.split(".")[0] in groups):
            return f"{name}={was!r} is no field any more, but always {value!r}"
    kernels = {name: old[name] for name in RENAMED if name in old}
    if len({*kernels.values()}) > 1 and not groups:
        return f"{kernels} are one field now, kernels"
    return ""


def hint(name: str) -> str:
    """What to say of an override of this field; "" if it was never one, or still is."""
    if name in RENAMED:
        return f"It is {RENAMED[name]} now."
    if name in CONSTANT:
        return f"It is no field any more, and always {CONSTANT[name]!r}."
    if name in DROPPED:
        return "It is no field any more."
    if (option := name.removeprefix("data.")) in _SHARES:
        return f"It is an option of the task now: data.task=search:{option}=VALUE."
    if f"{name}.".startswith(_BENCHMARKS):
        return "Benchmarks are named by data.eval=NAME=SOURCE@SAMPLES,… now."
    return ""


def _task(old: Mapping[str, Any]) -> str:
    """`data.task` for what were three fields."""
    shares = {name: old.get(f"data.{name}", x) for name, x in _SHARES.items()}
    options = [f"{name}={x!r}" for name, x in shares.items() if x != _SHARES[name]]
    return "search" + (":" + ",".join(options) if options else "")


def _benchmarks(old: Mapping[str, Any]) -> str:
    """`data.eval` for what were fields of each benchmark, sorted by name."""
    names = {
        name.removeprefix(_BENCHMARKS).rpartition(".")[0]
        for name in old
        if name.startswith(_BENCHMARKS)
    }
    field = lambda name, leaf: old.get(f"{_BENCHMARKS}{name}.{leaf}")
    named = [f"{n}={field(n, 'source')}@{field(n, 'samples')}" for n in sorted(names)]
    if {"sft", "rl"} & {*old.get("stages", ())}:  # which evaluated on data.eval
        named.insert(0, f"held_out={old.get('data.eval')}")
    return ",".join(named)
