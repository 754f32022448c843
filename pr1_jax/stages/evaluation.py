"""Evaluation on held-out problems (docs/method.md, section 7)."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from pr1_jax import evaluate
from pr1_jax.data import prompts, streams
from pr1_jax.stages import rollout
from pr1_jax.stages.experiment import ORDINARY, Experiment
from pr1_jax.stages.responses import Response, describe, everyones, write_responses
from pr1_jax.system import processes

_SEED = 0  # of held-out problems made by code: the same ones for every run
_OF_BANNED = (  # figures that are logged for decoding without blocks
    "accuracy",
    "accuracy_low",
    "accuracy_high",
    "total_tokens",
    "sequential_steps",
)


def summarize(responses: Sequence[Response], samples: int) -> dict[str, float]:
    """Figures of an evaluation: `describe`, and `evaluate.summarize` over problems.

    Args:
      responses: of all processes, problem-major, `samples` to each problem.
    """
    correct = np.array([r.correct for r in responses]).reshape(-1, samples)
    return {
        **describe(responses),
        **evaluate.summarize(correct),
        "accuracy_string": float(np.mean([r.string_correct for r in responses])),
    }


def problems(experiment: Experiment, name: str = "") -> list[prompts.Problem]:
    """The held-out problems of a source; of the first that the config names, if ""."""
    c = experiment.config
    first, *_ = experiment.benchmarks.values()
    return streams.held_out(
        experiment.source(name or first.source, "eval", seed=_SEED),
        experiment.tokenizer,
        template=experiment.own.template,
        max_prompt_tokens=c.rollout.max_prompt_tokens,
        limit=c.eval.problems,
    )


def run(
    experiment: Experiment,
    params: Any,
    held_out: Sequence[prompts.Problem],
    *,
    responses_path: pathlib.Path,
) -> dict[str, float]:
    """Samples and scores held-out problems, also with `<Parallel>` banned if asked.

    All evaluations of a run draw with the same key, so that they differ by the model
    and not by luck.

    Returns:
      Metrics `eval/…`, and what took how long.
    """
    c = experiment.config
    banned = [ORDINARY] if c.eval.banned and c.rollout.max_blocks else []
    metrics: dict[str, float] = {}
    for mode in (c.variant, *banned):
        responses, times = rollout.sample_and_score(
            experiment,
            experiment.sampler(c.eval.samples, mode),
            params,
            processes.share(held_out),
            c.eval.samples,
            experiment.key("eval"),
        )
        figures = summarize(everyones(responses, c.eval.samples), c.eval.samples)
        if mode == ORDINARY:
            metrics |= {_name_of_banned(name): figures[name] for name in _OF_BANNED}
            continue
        metrics |= {f"eval/{name}": value for name, value in figures.items()} | times
        write_responses(
            responses_path,
            responses,
            traces=c.report.traces,
            tokenizer=experiment.tokenizer,
        )
    return metrics


def _name_of_banned(name: str) -> str:
    """The metric of a figure with blocks banned; bounds of an interval end the name.

    >>> _name_of_banned("accuracy_low")
    'eval/accuracy_banned_low'
    """
    for end in ("_low", "_high"):
        if name.endswith(end):
            return f"eval/{name.removesuffix(end)}_banned{end}"
    return f"eval/{name}_banned"
