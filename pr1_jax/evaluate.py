"""Figures of an evaluation: mean@k, pass@k, intervals (docs/method.md, section 7)."""

import math
import statistics
from collections.abc import Sequence

import numpy as np

_RESAMPLES = 2000
_Z = statistics.NormalDist().inv_cdf(0.975)


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
    """95 % interval of the mean of `values` [problems], each from 0 to 1.

    By bootstrap over problems, and by Wilson's score (JASA 22, 1927) where that would
    be too narrow: where all values are equal, so that no resampling differs, and where
    each is 0 or 1, as of problems with one sample.

        >>> interval([0.0] * 16)
        (0.0, 0.19...)
    """
    values = np.asarray(values, np.float64)
    if np.isin(values, (0, 1)).all() or np.ptp(values) == 0:
        return _wilson(float(values.mean()), len(values))
    draws = np.random.default_rng(seed).integers(
        0, len(values), (_RESAMPLES, len(values))
    )
    low, high = np.percentile(values[draws].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def _wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's interval of a share of n."""
    spread = _Z * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    low, high = (share + _Z**2 / (2 * n) + x for x in (-spread, spread))
    scale = 1 + _Z**2 / n
    return max(low / scale, 0.0), min(high / scale, 1.0)


def interval_of_average(
    groups: Sequence[Sequence[float]], seed: int = 0
) -> tuple[float, float]:
    """95 % interval of the mean of several groups' means, from the groups' intervals.

    Distances from the means to the bounds add up as independent errors do (Zou and
    Donner, Statistics in Medicine 27, 2008).
    """
    means = [float(np.mean(values)) for values in groups]
    bounds = [interval(values, seed) for values in groups]
    average = sum(means) / len(means)
    below = math.hypot(*(x - low for x, (low, _) in zip(means, bounds)))
    above = math.hypot(*(high - x for x, (_, high) in zip(means, bounds)))
    return average - below / len(means), average + above / len(means)


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
