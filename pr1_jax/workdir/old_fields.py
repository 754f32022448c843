"""What became of the fields that older versions wrote into config.json.

The one place that knows them: a run folder of an older version opens and resumes by it,
and an override on the command line that names one is told the new name.
"""

from collections.abc import Mapping
from typing import Any

RENAMED = {
    "model.kernels": "kernels",
    "rollout.kernels": "kernels",
}
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
_SHARES = {"block_share": 1.0, "hard_share": 0.0, "late_share": 0.0}  # of data
_BENCHMARKS = "eval.benchmarks."  # NAME.source and NAME.samples
# Dropped, whatever they were: they change nothing of what a run learns.
DROPPED = (
    *("alarms.logp_gap", "alarms.max_parallel_ratio", "alarms.max_undecided"),
    *("alarms.min_entropy", "alarms.min_length", "report.every_sec"),
)


def today(found: Mapping[str, Any]) -> dict[str, Any]:
    """A config of any version in the fields of this one; both by dotted names."""
    gone = {*RENAMED, *CONSTANT, *DROPPED, *(f"data.{name}" for name in _SHARES)}
    fields = {
        name: value
        for name, value in found.items()
        if name not in gone and not name.startswith(_BENCHMARKS)
    }
    for name, new in RENAMED.items():
        if name in found:
            fields[new] = found[name]
    if shares := {n: found[f"data.{n}"] for n in _SHARES if f"data.{n}" in found}:
        fields["data.task"] = _task(shares)
    if any(name.startswith(_BENCHMARKS) for name in found):
        fields["data.eval"] = _benchmarks(found)
    return fields


def _benchmarks(found: Mapping[str, Any]) -> str:
    """`data.eval` for what were fields of each benchmark, sorted by name."""
    names = {
        name.removeprefix(_BENCHMARKS).rpartition(".")[0]
        for name in found
        if name.startswith(_BENCHMARKS)
    }
    named = [
        f"{name}={found[f'{_BENCHMARKS}{name}.source']}"
        f"@{found[f'{_BENCHMARKS}{name}.samples']}"
        for name in sorted(names)
    ]
    if {"sft", "rl"} & {*found.get("stages", ())}:  # which have evaluated on the first
        named.insert(0, f"held_out={found.get('data.eval')}")
    return ",".join(named)


def _task(shares: Mapping[str, float]) -> str:
    """`data.task` for what were three fields."""
    options = [f"{n}={x!r}" for n, x in shares.items() if x != _SHARES[n]]
    return "search" + (":" + ",".join(options) if options else "")


def refused(found: Mapping[str, Any], groups: tuple[str, ...] = ()) -> str:
    """Names a field that is a constant now and had another value; "" without one.

    Args:
      groups: looks at fields of these alone; () = at all.
    """
    for name, value in CONSTANT.items():
        if groups and name.split(".")[0] not in groups:
            continue
        if (old := found.get(name, value)) != value:
            return f"{name}={old!r} is no field any more, but always {value!r}"
    return ""


def hint(name: str) -> str:
    """What to say of an override of this field; "" if it was never one."""
    if name in RENAMED:
        return f"It is {RENAMED[name]} now."
    if name.startswith(_BENCHMARKS.rstrip(".")):
        return "Benchmarks are named by data.eval=NAME=SOURCE@SAMPLES,… now."
    if (option := name.removeprefix("data.")) in _SHARES:
        return f"It is an option of the task now: data.task=search:{option}=VALUE."
    if name in CONSTANT:
        return f"It is no field any more, and always {CONSTANT[name]!r}."
    return "It is no field any more." if name in DROPPED else ""
