"""The whole curriculum that a config names: stages, with evaluations in between."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from pr1_jax.model.params import param_count
from pr1_jax.stages import (
    benchmark,
    checks,
    coldstart,
    evaluation,
    experiment,
    rl,
    sft,
)
from pr1_jax.stages.run import TRAINING, Run, Watcher
from pr1_jax.system import files, tables

_STAGES = {"coldstart": coldstart, "sft": sft, "rl": rl, "benchmark": benchmark}


def prepare(config: ml_collections.ConfigDict) -> tuple[experiment.Experiment, Any]:
    """Checks all that can be checked before anything compiles, data included.

    Returns:
      The experiment and its held-out problems, None where no stage trains.

    Raises:
      ValueError, FileNotFoundError: names the field and its value.
    """
    made = experiment.build(config)
    made.own.load()
    made.check_weights()
    for stage in config.stages:
        if stage == "benchmark":
            benchmark.check_data(made)
            continue
        with checks.naming(config, stage):
            next(_STAGES[stage].open_stream(made))
    if not _evaluates(config):
        return made, None
    with checks.naming(config, "eval"):
        return made, evaluation.problems(made)


def _evaluates(config: ml_collections.ConfigDict) -> bool:
    """Whether `data.eval` is used: around stages that train, or where there is none."""
    return not config.stages or bool({*TRAINING} & {*config.stages})


def is_finished(workdir: str) -> bool:
    """Whether a run in this workdir has come to its end."""
    path = pathlib.Path(workdir) / "summary.json"
    return bool(files.read_json(path, {}).get("finished"))


def run(
    made: experiment.Experiment,
    held_out: Any,
    workdir: str,
    watchers: Sequence[Watcher] = (),
) -> None:
    """Runs, or goes on with, the curriculum in `workdir`; tells `watchers` of it."""
    with Run(made, workdir, watchers) as current:
        current.say(
            f"{param_count(made.abstract_params()):,} parameters, "
            f"{_trained(made)}"
            f"{made.config.variant} variant, workdir {current.workdir}"
        )
        done = -1 if current.position is None else current.position.stage
        if done < 0 and _evaluates(made.config):
            _evaluate(current, held_out, "eval_0_base")
        for i, stage in enumerate(made.config.stages):
            if i < done:
                continue
            _STAGES[stage].run_stage(made, current, i)
            if stage in TRAINING:
                _evaluate(current, held_out, f"eval_{i + 1}_{stage}")
        current.finish()
        _report(current)


def _trained(made: experiment.Experiment) -> str:
    """How many parameters are trained, if not all are."""
    if made.adapter_settings is None:
        return ""
    return f"{param_count(made.abstract_trained()):,} more in adapters, "


def _evaluate(current: Run, held_out: Any, name: str) -> None:
    """Evaluates the current parameters, unless that was done before."""
    if name in current.summary["evaluations"]:
        return
    metrics = evaluation.run(
        current.experiment,
        current.params,
        held_out,
        responses_path=current.workdir / "rollouts" / f"{name}.jsonl",
    )
    current.record_evaluation(name, metrics)
    current.say(
        f"{name}: accuracy {_percent(metrics, 'accuracy')} "
        f"(95 % interval {_percent(metrics, 'accuracy_low')} to "
        f"{_percent(metrics, 'accuracy_high')}), "
        f"parallel ratio {_percent(metrics, 'parallel_ratio')}"
    )


def _percent(metrics: Mapping[str, float], name: str) -> str:
    value = metrics.get(f"eval/{name}")
    return "–" if value is None else f"{100 * value:.1f} %"


def _report(current: Run) -> None:
    """Prints the final table."""
    rows = [
        {
            "evaluation": name,
            "accuracy": _percent(e, "accuracy"),
            "95 % interval": (
                f"{100 * e['eval/accuracy_low']:.1f}–{_percent(e, 'accuracy_high')}"
            ),
            "blocks banned": _percent(e, "accuracy_banned"),
            "parallel ratio": _percent(e, "parallel_ratio"),
            "distinct work": _percent(e, "work_division"),
            "tokens": f"{e['eval/total_tokens']:.1f}",
            "steps": f"{e['eval/sequential_steps']:.1f}",
        }
        for name, e in current.summary["evaluations"].items()
        if name.startswith("eval_")
    ]
    if rows:
        current.say(tables.Table("", rows).terminal())
    skipped = "".join(
        f"; {count} updates of {stage} were skipped, because their gradients were not "
        f"finite (the last batch: non_finite_{stage}.npz)"
        for stage, count in current.skipped().items()
    )
    current.say(f"finished: {current.workdir}{skipped}")
