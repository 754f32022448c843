"""95 % intervals over seeds and problems.

All cells of a seed are evaluated on the same problems, and all seeds too, so a value [S,
P] has two sources of luck: the seed, which decides how training goes, and the problem.
Half of an interval's width is

    sqrt( (t(S−1) · se of the means of seeds)²  +  (t(P−1) · se of those of problems)² )

with the standard error (se) of a mean and Student's quantile t. What seeds and problems
do together is counted in both, so that it is a little too wide. A difference of two
cells is taken by seed and problem first; luck that they share cancels.

Six seeds tell little of the luck of seeds: t(5) is 2.6, not 1.96, and of three 4.3. The
interval covers the mean over all seeds and problems of the kind in 95 % of studies or
more (`tests/study/study_verdicts_test.py` simulates it). A percentile bootstrap would
not, since it never leaves the range of the seeds. With one
seed the interval speaks of problems alone: of this model, not of the method. Where all
values are equal, as with a share of 0 or 1, there is no width, though luck is possible.
"""

from typing import NamedTuple

import numpy as np
import scipy.special

_LEVEL = 0.975


class Interval(NamedTuple):
    """A mean with its 95 % interval, and the seeds it is of (0: no luck involved)."""

    value: float
    low: float
    high: float
    seeds: int


def exact(value: float) -> Interval:
    """A quantity that no luck is involved in."""
    return Interval(float(value), float(value), float(value), 0)


def over_seeds_and_problems(values) -> Interval:
    """The interval of the mean of `values`, float [S, P]: seeds by problems."""
    values = np.asarray(values, np.float64)
    by_seed, by_problem = (_half_width(values.mean(axis=axis)) for axis in (1, 0))
    return _around(values.mean(), float(np.hypot(by_seed, by_problem)), len(values))


def over_seeds(values) -> Interval | None:
    """The interval of the mean of `values`, float [S]; None for less than two seeds."""
    values = np.asarray(values, np.float64)
    if len(values) < 2:
        return None
    return _around(values.mean(), _half_width(values), len(values))


def _half_width(values: np.ndarray) -> float:
    """Half of Student's interval of the mean of values [N]; 0 for a single one."""
    N = len(values)
    if N < 2:
        return 0.0
    quantile = float(scipy.special.stdtrit(N - 1, _LEVEL))
    return quantile * float(values.std(ddof=1)) / N**0.5


def _around(mean: float, half: float, seeds: int) -> Interval:
    return Interval(float(mean), float(mean - half), float(mean + half), seeds)
