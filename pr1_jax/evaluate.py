"""Figures of an evaluation: mean@k, pass@k, intervals (docs/method.md, section 7)."""

import math
from collections.abc import Sequence

import numpy as np

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


def summarize(correct: np.ndarray) -> dict[str, float]:
    """Accuracy and pass@k of k samples to each problem, each with its 95 % interval.

    Args:
      correct: [problems, k] bool.

    Returns:
      `accuracy` (mean@k) and `pass_at_k`; `…_low` and `…_high` bound their intervals.
    """
    k = correct.shape[1]
    passes = [pass_at_k(k, int(c), k) for c in correct.sum(axis=1)]
    low, high = interval(correct.mean(axis=1))
    pass_low, pass_high = interval(passes)
    return {
        "accuracy": float(correct.mean()),
        "accuracy_low": low,
        "accuracy_high": high,
        "pass_at_k": float(np.mean(passes)),
        "pass_at_k_low": pass_low,
        "pass_at_k_high": pass_high,
    }
