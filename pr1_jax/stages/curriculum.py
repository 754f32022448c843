"""The whole curriculum that a config names: stages, with evaluations in between."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import ml_collections

from pr1_jax.model.params import param_count
from pr1_jax.stages import benchmark, coldstart, evaluation, experiment, rl, sft
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
    made.check_weights()
    readers: dict[str, Callable[[], Any]] = {}
    for stage in config.stages:
        if stage in TRAINING:
            readers[stage] = lambda stage=stage: next(_STAGES[stage].open_stream(made))
        else:
            _STAGES[stage].check_data(made)
    if _evaluates(config):
        readers["eval"] = lambda: evaluation.problems(made)
    found = None
    for name, read in readers.items():
        try:
            found = read()
        except (ValueError, FileNotFoundError) as error:
            limits = ", ".join(
                f"rollout.{limit}={config.rollout[limit]}"
                for limit in ("max_prompt_tokens", "max_response_tokens")
            )
            message = f"data.{name}={config.data[name]} ({limits}): {error}"
            raise type(error)(message) from error
    return made, found


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
            f"{param_count(current.params):,} parameters, "
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


def _evaluate(current: Run, held_out: Any, name: str) -> None:
    """Evaluates the current parameters, unless that was done before."""
    if name in current.summary["evaluations"]:
        return
    path = current.workdir / "rollouts" / f"{name}.jsonl"
    found = evaluation.run(
        current.experiment, current.params, held_out, responses_path=path
    )
    current.record_evaluation(name, found)
    current.say(
        f"{name}: accuracy {_percent(found, 'accuracy')} "
        f"(95 % interval {_percent(found, 'accuracy_low')} to "
        f"{_percent(found, 'accuracy_high')}), "
        f"parallel ratio {_percent(found, 'parallel_ratio')}"
    )


def _percent(found: dict[str, float], name: str) -> str:
    return f"{100 * found['eval/' + name]:.1f} %"


def _report(current: Run) -> None:
    """Prints the final table."""
    rows = [
        {
            "evaluation": name,
            "accuracy": _percent(e, "accuracy"),
            "95 % interval": (
                f"{_percent(e, 'accuracy_low')} to {_percent(e, 'accuracy_high')}"
            ),
            "blocks banned": (
                _percent(e, "accuracy_banned") if "eval/accuracy_banned" in e else "–"
            ),
            "parallel ratio": _percent(e, "parallel_ratio"),
            "tokens": f"{e['eval/total_tokens']:.1f}",
            "steps": f"{e['eval/sequential_steps']:.1f}",
        }
        for name, e in current.summary["evaluations"].items()
        if name.startswith("eval_")
    ]
    if rows:
        current.say(tables.Table("", rows).terminal())
    current.say(f"finished: {current.workdir}")
