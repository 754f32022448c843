"""The paper's table: benchmarks by decoding modes (spec section 7).

Every response is kept in `samples/<benchmark>_<mode>.jsonl`, written a chunk of problems
at a time; what is there already is not sampled again. The table, with 95 % intervals by
bootstrap over problems, goes to `benchmarks.json` and `benchmarks.md`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import rich.box
import rich.table

from pr1_jax import evaluate
from pr1_jax.answers.verdicts import CORRECT, UNDECIDED
from pr1_jax.data import prompts
from pr1_jax.stages import evaluation
from pr1_jax.stages.experiment import Experiment
from pr1_jax.stages.run import Run, evaluation_name
from pr1_jax.stages.samples import sample
from pr1_jax.system import files

_MEANS = {  # of a benchmark's responses, by the field of their records
    "parallel_ratio": lambda r: r["num_blocks"] > 0,
    "total_tokens": lambda r: r["total_tokens"],
    "sequential_steps": lambda r: r["sequential_steps"],
    "accuracy_string": lambda r: r["string_correct"],
    "undecided": lambda r: r["verdict"] == UNDECIDED,
    "finished": lambda r: r["finished"],
    "seconds": lambda r: r["seconds"],
}


def check_data(experiment: Experiment) -> dict[str, list[prompts.Problem]]:
    """The problems of every benchmark that the config names.

    Raises:
      ValueError, FileNotFoundError: names the benchmark and what is wrong.
    """
    found = {}
    for name, settings in experiment.config.eval.benchmarks.items():
        try:
            found[name] = evaluation.problems(experiment, settings.source)
        except (ValueError, FileNotFoundError) as error:
            message = f"eval.benchmarks.{name}.source={settings.source}: {error}"
            raise type(error)(message) from error
    return found


def run_stage(experiment: Experiment, run: Run, stage: int) -> None:
    """Samples all benchmarks in all modes, but for what was done before."""
    del stage
    problems = check_data(experiment)
    results: dict[str, dict[str, dict[str, float]]] = {}
    for mode in experiment.config.eval.modes:
        found, shares = {}, []
        for name, asked in problems.items():
            samples = experiment.config.eval.benchmarks[name].samples
            records = _sample(experiment, run, name, mode, asked, samples)
            shares.append(_correct(records, samples).mean(axis=1))
            found[name] = summarize(records, samples)
            if (key := evaluation_name(name, mode)) not in run.summary["evaluations"]:
                prefixed = {f"eval/{field}": x for field, x in found[name].items()}
                run.record_evaluation(key, prefixed)
        for name in [name for name in experiment.samplers if name[0] == mode]:
            del experiment.samplers[name]  # the next mode needs the room
        results[mode] = found | {"average": _average(found, shares)}
    if jax.process_index() == 0:
        files.write_json(run.workdir / "benchmarks.json", results)
        files.replace_file(run.workdir / "benchmarks.md", _markdown(results).encode())
    run.say(_table(results))


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
    mean = lambda f: float(np.mean([f(r) for r in records]))
    return {
        "eval/accuracy": mean(lambda r: r["verdict"] == CORRECT),
        "eval/parallel_ratio": mean(_MEANS["parallel_ratio"]),
    }


def _correct(records: Sequence[Mapping[str, Any]], samples: int) -> np.ndarray:
    """Whether responses are correct, bool [problems, samples]."""
    correct = [r["verdict"] == CORRECT for r in records]
    return np.array(correct).reshape(-1, samples)


def summarize(records: Sequence[Mapping[str, Any]], samples: int) -> dict[str, float]:
    """Figures of a benchmark in one mode."""
    correct = _correct(records, samples)
    passes = [evaluate.pass_at_k(samples, int(n), samples) for n in correct.sum(axis=1)]
    low, high = evaluate.interval(correct.mean(axis=1))
    pass_low, pass_high = evaluate.interval(passes)
    return {
        "problems": len(correct),
        "samples": samples,
        "accuracy": float(correct.mean()),
        "accuracy_low": low,
        "accuracy_high": high,
        "pass_at_k": float(np.mean(passes)),
        "pass_at_k_low": pass_low,
        "pass_at_k_high": pass_high,
        **{n: float(np.mean([f(r) for r in records])) for n, f in _MEANS.items()},
    }


def _average(
    found: Mapping[str, Mapping[str, float]], shares: Sequence[np.ndarray]
) -> dict[str, float]:
    """Unweighted means over benchmarks; the interval resamples each one's problems."""
    mean = lambda field: float(np.mean([f[field] for f in found.values()]))
    low, high = evaluate.interval_of_average(shares)
    return {
        "accuracy": mean("accuracy"),
        "accuracy_low": low,
        "accuracy_high": high,
        **{name: mean(name) for name in _MEANS},
    }


_COLUMNS = (
    (
        "benchmark",
        lambda name, f: f"{name} @{f['samples']}" if "samples" in f else name,
    ),
    ("mean@k", lambda name, f: _interval(f, "accuracy")),
    ("pass@k", lambda name, f: _interval(f, "pass_at_k")),
    ("parallel", lambda name, f: f"{100 * f['parallel_ratio']:.1f}"),
    ("tokens", lambda name, f: f"{f['total_tokens']:.1f}"),
    ("steps", lambda name, f: f"{f['sequential_steps']:.1f}"),
    ("sec", lambda name, f: f"{f['seconds']:.3f}"),
    ("string", lambda name, f: f"{100 * f['accuracy_string']:.1f}"),
)
_CAPTION = (
    "Shares in per cent, with 95 % intervals by bootstrap over problems. Of a response, "
    "on average: tokens, sequential steps, wall-clock seconds (in batches, with "
    "verification). string: mean@k by the published string checker."
)


def _interval(found: Mapping[str, float], name: str) -> str:
    if name not in found:
        return ""
    mean, low, high = (100 * found[name + end] for end in ("", "_low", "_high"))
    return f"{mean:.1f} ({low:.1f}–{high:.1f})"


def _table(
    results: Mapping[str, Mapping[str, Mapping[str, float]]],
) -> rich.table.Table:
    """All figures, for the terminal."""
    table = rich.table.Table(
        *(title for title, _ in _COLUMNS),
        box=rich.box.SIMPLE,
        caption=_CAPTION,
        caption_justify="left",
    )
    for mode, found in results.items():
        table.add_row(mode, style="bold")
        for name, figures in found.items():
            first, *rest = (cell(name, figures) for _, cell in _COLUMNS)
            table.add_row(f"  {first}", *rest)
        table.add_section()
    return table


def _markdown(results: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """The paper's table, mean@k / pass@k in per cent, and all figures below it."""
    names = [name for name in next(iter(results.values())) if name != "average"]
    rows = [["mode", "parallel", *names, "Avg."]]
    for mode, found in results.items():
        pair = lambda f: (
            f"{100 * f['accuracy']:.1f} / {100 * f['pass_at_k']:.1f}"
            if f["samples"] > 1
            else f"{100 * f['accuracy']:.1f}"
        )
        average = found["average"]
        rows.append(
            [
                mode,
                f"{100 * average['parallel_ratio']:.1f}",
                *(pair(found[name]) for name in names),
                _interval(average, "accuracy"),
            ]
        )
    details = [["mode", *(title for title, _ in _COLUMNS)]] + [
        [mode, *(cell(name, figures) for _, cell in _COLUMNS)]
        for mode, found in results.items()
        for name, figures in found.items()
    ]
    return f"{_rows(rows)}\n{_rows(details)}\n{_CAPTION}\n"


def _rows(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head."""
    lines = ["| " + " | ".join(row) + " |\n" for row in rows]
    return "".join([lines[0], "|" + "---|" * len(rows[0]) + "\n", *lines[1:]])
