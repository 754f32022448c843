"""Evaluation on held-out problems: mean@k, pass@k, parallel ratio (spec section 7)."""

import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from pr1_jax import data, processes, rollout, sources
from pr1_jax.experiment import ORDINARY, Experiment

_RESAMPLES = 2000


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is correct.

    Args:
      n: samples drawn. c: correct ones among them. k: at most n.

    Returns:
      1 − C(n − c, k) / C(n, k) (Chen et al., arXiv 2107.03374).

    Raises:
      ValueError: not 0 ≤ c ≤ n or not 1 ≤ k ≤ n.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass_at_k needs 0 <= c <= n, 1 <= k <= n: {n=}, {c=}, {k=}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of `values` [problems], by bootstrap over problems."""
    return interval_of_average([values], seed)


def interval_of_average(
    groups: Sequence[Sequence[float]], seed: int = 0
) -> tuple[float, float]:
    """95 % interval of the mean of several groups' means, each resampled by itself."""
    rng = np.random.default_rng(seed)
    means = []
    for values in groups:
        values = np.asarray(values, np.float64)
        draws = rng.integers(0, len(values), (_RESAMPLES, len(values)))
        means.append(values[draws].mean(axis=1))
    low, high = np.percentile(np.mean(means, axis=0), [2.5, 97.5])
    return float(low), float(high)


def summarize(facts: Sequence[rollout.Facts], samples: int) -> dict[str, float]:
    """Metrics of an evaluation, `eval/…`; responses are problem-major."""
    correct = np.array([f.correct for f in facts]).reshape(-1, samples)
    low, high = interval(correct.mean(axis=1))
    passes = [pass_at_k(samples, int(c), samples) for c in correct.sum(axis=1)]
    renamed = {
        name.replace("rollout/", "eval/"): value
        for name, value in rollout.describe(facts).items()
    }
    return renamed | {
        "eval/accuracy_low": low,
        "eval/accuracy_high": high,
        "eval/pass_at_k": float(np.mean(passes)),
        "eval/accuracy_string": float(np.mean([f.string_correct for f in facts])),
    }


def problems(experiment: Experiment, name: str = "") -> list[data.Problem]:
    """The held-out problems of a source; of the one that the config names, if ""."""
    c = experiment.config
    source = sources.open_source(
        name or c.data.eval, "eval", seed=c.data.eval_seed, columns=c.data.columns
    )
    return data.held_out(
        source,
        experiment.tokenizer,
        template=c.data.template,
        max_prompt_tokens=c.rollout.max_prompt_tokens,
        limit=c.eval.problems,
    )


def evaluate(
    experiment: Experiment,
    params: Any,
    held_out: Sequence[data.Problem],
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
        facts = rollout.everyones_facts(scored, c.eval.samples)
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
                rollout.write_responses(
                    responses_path,
                    scored,
                    traces=c.report.traces,
                    tokenizer=experiment.tokenizer,
                )
    return metrics
