"""Evaluation on held-out problems."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from pr1_jax.data import prompts, sources, streams
from pr1_jax.evaluate import interval, pass_at_k
from pr1_jax.stages import rollout
from pr1_jax.stages.experiment import ORDINARY, Experiment
from pr1_jax.stages.responses import Facts, describe, everyones_facts, write_responses
from pr1_jax.system import processes

_SEED = 0  # of held-out problems made by code: the same ones for every run


def summarize(facts: Sequence[Facts], samples: int) -> dict[str, float]:
    """Metrics of an evaluation, `eval/…`; responses are problem-major."""
    correct = np.array([f.correct for f in facts]).reshape(-1, samples)
    low, high = interval(correct.mean(axis=1))
    passes = [pass_at_k(samples, int(c), samples) for c in correct.sum(axis=1)]
    renamed = {
        name.replace("rollout/", "eval/"): value
        for name, value in describe(facts).items()
    }
    return renamed | {
        "eval/accuracy_low": low,
        "eval/accuracy_high": high,
        "eval/pass_at_k": float(np.mean(passes)),
        "eval/accuracy_string": float(np.mean([f.string_correct for f in facts])),
    }


def problems(experiment: Experiment, name: str = "") -> list[prompts.Problem]:
    """The held-out problems of a source; of the one that the config names, if ""."""
    c = experiment.config
    source = sources.open_source(
        name or c.data.eval, "eval", seed=_SEED, columns=c.data.columns
    )
    return streams.held_out(
        source,
        experiment.tokenizer,
        template=c.data.template,
        max_prompt_tokens=c.rollout.max_prompt_tokens,
        limit=c.eval.problems,
    )


def evaluate(
    experiment: Experiment,
    params: Any,
    held_out: Sequence[prompts.Problem],
    *,
    responses_path: str | pathlib.Path | None = None,
) -> dict[str, float]:
    """Samples and scores held-out problems, also with `<Parallel>` banned if asked.

    All evaluations of a run draw with the same key, so that they differ by the model
    and not by luck.
    """
    c = experiment.config
    banned = [ORDINARY] if c.eval.banned and c.rollout.max_blocks else []
    metrics: dict[str, float] = {}
    for mode in (c.variant, *banned):
        scored, times = rollout.sample_and_score(
            experiment.sampler(c.eval.samples, mode),
            params,
            processes.share(held_out),
            c.eval.samples,
            experiment.key("eval"),
            experiment.tokenizer,
            timeout_sec=c.reward.timeout_sec,
        )
        facts = everyones_facts(scored, c.eval.samples)
        found = summarize(facts, c.eval.samples)
        if mode == ORDINARY:
            metrics |= {
                "eval/accuracy_banned": found["eval/accuracy"],
                "eval/accuracy_banned_low": found["eval/accuracy_low"],
                "eval/accuracy_banned_high": found["eval/accuracy_high"],
                "eval/total_tokens_banned": found["eval/total_tokens"],
                "eval/sequential_steps_banned": found["eval/sequential_steps"],
            }
        else:
            metrics |= found | times
            if responses_path is not None:
                write_responses(
                    responses_path,
                    scored,
                    traces=c.report.traces,
                    tokenizer=experiment.tokenizer,
                )
    return metrics
