"""The paper's table: benchmarks by decoding modes (docs/method.md, section 7).

Every response is kept in `samples/<benchmark>_<mode>.jsonl`, written a chunk of problems
at a time; what is there already is not sampled again. The table, with 95 % intervals
over problems, goes to `benchmarks.json` and `benchmarks.md`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from pr1_jax import diversity, evaluate
from pr1_jax.data import prompts
from pr1_jax.stages import evaluation
from pr1_jax.stages.experiment import Experiment
from pr1_jax.stages.responses import Response, describe
from pr1_jax.stages.run import Run, evaluation_name
from pr1_jax.stages.samples import sample
from pr1_jax.system import files, tables

_AVERAGED = (  # figures whose means over benchmarks make sense, of those that have them
    "accuracy",
    "parallel_ratio",
    "total_tokens",
    "sequential_steps",
    "accuracy_string",
    "undecided",
    "finished",
    "seconds",
    *diversity.FIGURES,
)


def check_data(experiment: Experiment) -> dict[str, list[prompts.Problem]]:
    """The problems of every benchmark that the config names.

    Raises:
      ValueError, FileNotFoundError: names the benchmark and what is wrong.
    """
    problems = {}
    for name, benchmark in experiment.benchmarks.items():
        try:
            problems[name] = evaluation.problems(experiment, benchmark.source)
        except (ValueError, FileNotFoundError) as error:
            message = f"data.eval, {name}={benchmark.source}: {error}"
            raise type(error)(message) from error
    return problems


def run_stage(experiment: Experiment, run: Run, stage: int) -> None:
    """Samples all benchmarks in all modes, but for what was done before."""
    del stage
    problems = check_data(experiment)
    results: dict[str, dict[str, dict[str, float]]] = {}
    for mode in experiment.config.eval.modes:
        of_mode, shares = {}, []
        for name, asked in problems.items():
            samples = experiment.benchmarks[name].samples
            records = _sample(experiment, run, name, mode, asked, samples)
            correct = [Response.read(record).correct for record in records]
            shares.append(np.reshape(correct, (-1, samples)).mean(axis=1))
            of_mode[name] = summarize(records, samples)
            if (key := evaluation_name(name, mode)) not in run.summary["evaluations"]:
                metrics = {f"eval/{field}": x for field, x in of_mode[name].items()}
                run.record_evaluation(key, metrics)
        for name in [name for name in experiment.samplers if name[0] == mode]:
            del experiment.samplers[name]  # the next mode needs the memory
        results[mode] = of_mode | {"average": _average(of_mode, shares)}
    if jax.process_index() == 0:
        files.write_json(run.workdir / "benchmarks.json", results)
        text = f"{_papers(results).markdown()}\n{_details(results).markdown()}"
        files.replace_file(run.workdir / "benchmarks.md", text.encode())
    run.say(_details(results).terminal())


def _sample(
    experiment: Experiment,
    run: Run,
    name: str,
    mode: str,
    problems: Sequence[prompts.Problem],
    samples: int,
) -> list[dict[str, Any]]:
    """Records of all responses to a benchmark, problem-major."""
    path = run.workdir / "samples" / f"{name}_{mode}.jsonl"
    settings = {"mode": mode, "samples": samples}
    records: list[dict[str, Any]] = []
    with run.display(f"{name} {mode}", len(problems)) as progress:
        for done, records in sample(experiment, run.params, path, problems, **settings):
            if records:
                progress.update(done, _figures(records))
    return records


def _figures(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What is shown while a benchmark is sampled."""
    figures = describe([Response.read(record) for record in records])
    return {f"eval/{name}": figures[name] for name in ("accuracy", "parallel_ratio")}


def summarize(records: Sequence[Mapping[str, Any]], samples: int) -> dict[str, float]:
    """Figures of a benchmark in one mode.

    Args:
      records: as `samples.sample` gives them.
    """
    responses = [Response.read(record) for record in records]
    return {
        "problems": len(records) // samples,
        "samples": samples,
        **evaluation.summarize(responses, samples),
        "seconds": float(np.mean([record["seconds"] for record in records])),
    }


def _average(
    figures: Mapping[str, Mapping[str, float]], shares: Sequence[np.ndarray]
) -> dict[str, float]:
    """Unweighted means over benchmarks; the interval resamples each one's problems.

    Args:
      shares: of each benchmark, the share of correct samples by problem.
    """
    low, high = evaluate.interval_of_average(shares)
    known = {n: [f[n] for f in figures.values() if n in f] for n in _AVERAGED}
    means = {n: float(np.mean(values)) for n, values in known.items() if values}
    return {**means, "accuracy_low": low, "accuracy_high": high}


_NOTE = (
    "Shares in per cent, with 95 % intervals over problems. distinct: of the steps of "
    "work in a block's paths, those that one path alone did. Of a response, on average: "
    "tokens, sequential steps, wall-clock seconds (in batches, with verification). "
    "string: mean@k by the published string checker."
)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _interval(figures: Mapping[str, float], name: str) -> str:
    if name not in figures:
        return ""
    mean, low, high = (_percent(figures[name + end]) for end in ("", "_low", "_high"))
    return f"{mean} ({low}–{high})"


def _details(results: Mapping[str, Mapping[str, Mapping[str, float]]]) -> tables.Table:
    """All figures."""
    rows = [
        {
            "mode": mode,
            "benchmark": f"{name} @{f['samples']}" if "samples" in f else name,
            "mean@k": _interval(f, "accuracy"),
            "pass@k": _interval(f, "pass_at_k"),
            "parallel": _percent(f["parallel_ratio"]),
            "distinct": _percent(f["work_division"]) if "work_division" in f else "",
            "tokens": f"{f['total_tokens']:.1f}",
            "steps": f"{f['sequential_steps']:.1f}",
            "sec": f"{f['seconds']:.3f}",
            "string": _percent(f["accuracy_string"]),
        }
        for mode, of_mode in results.items()
        for name, f in of_mode.items()
    ]
    return tables.Table("", rows, _NOTE)


def _papers(results: Mapping[str, Mapping[str, Mapping[str, float]]]) -> tables.Table:
    """The paper's table: mean@k / pass@k in per cent, a row a mode."""

    def pair(f: Mapping[str, float]) -> str:
        mean, passed = _percent(f["accuracy"]), _percent(f["pass_at_k"])
        return f"{mean} / {passed}" if f["samples"] > 1 else mean

    rows = []
    for mode, of_mode in results.items():
        average = of_mode["average"]
        row = {"mode": mode, "parallel": _percent(average["parallel_ratio"])}
        row |= {name: pair(f) for name, f in of_mode.items() if name != "average"}
        rows.append(row | {"Avg.": _interval(average, "accuracy")})
    return tables.Table("", rows)
