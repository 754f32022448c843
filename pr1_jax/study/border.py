"""Where a bonus for blocks keeps them: the arithmetic of the rewards, in two ways.

A block is right with probability `p_block`, a lone search with `p_lone`. A right answer is
paid 1 and a wrong one −1, and in a share of the steps a right answer with a block
`BONUS` more. Which of the two does a policy come to prefer?

* `plain`: the one that is paid more on average. A block is, where p_lone / p_block is
  below 1 + BONUS / 2 · share.
* `normalised`: the one whose advantage is higher on average. An advantage is a reward less
  its group's mean, over the group's spread. Where all of a group are right the bonus is
  all the spread that there is, and counts in full, however small it is.

Without a bonus the two agree. With one, the second depends on how many of a group have a
block; `rest` follows it from half of them to where the preference ends.
"""

import functools
import math
from collections.abc import Callable

import numpy as np

BONUS = 0.2  # `rewards.reward("tiered", …)` less `rewards.reward("accuracy", …)`
_STEP = 0.01  # of a ratio


def plain(p_block: float, p_lone: float, share: float) -> float:
    """How much more a block is paid than a lone search, on average.

    Args:
      share: of the steps that pay the bonus.
    """
    return p_block * (2 + BONUS * share) - 2 * p_lone


@functools.lru_cache(maxsize=4096)
def normalised(
    p_block: float, p_lone: float, share: float, ratio: float, group: int = 8
) -> float:
    """How much higher the advantage of a block is than that of a lone search.

    Args:
      share: of the steps that pay the bonus.
      ratio: probability that another response of the group has a block.
      group: responses to a problem.
    """
    others = group - 1
    n, blocks, lone = np.ogrid[:group, :group, :group]  # with a block; right, of each
    chances = (
        _binomial(others, n, ratio)
        * _binomial(n, blocks, p_block)
        * _binomial(others - n, lone, p_lone)
    )

    def mean(bonus: float) -> float:
        def advantage(reward: float) -> np.ndarray:
            wrong = others - blocks - lone
            total = blocks * (1 + bonus) + lone - wrong + reward
            squares = blocks * (1 + bonus) ** 2 + lone + wrong + reward**2
            variance = squares / group - (total / group) ** 2
            return (reward - total / group) / (np.sqrt(np.maximum(variance, 0)) + 1e-6)

        right, lone_right, wrong = map(advantage, (1 + bonus, 1.0, -1.0))
        of_block = p_block * right + (1 - p_block) * wrong
        of_lone = p_lone * lone_right + (1 - p_lone) * wrong
        return float((chances * (of_block - of_lone)).sum())

    return (1 - share) * mean(0.0) + (share * mean(BONUS) if share else 0.0)


def _binomial(n, k, p: float) -> np.ndarray:
    """Chances of k of n, 0 where k is more; arrays of int that broadcast."""
    of = np.vectorize(lambda n, k: math.comb(n, k) * p**k * (1 - p) ** max(n - k, 0))
    return of(n, k)


def rest(margin: Callable[[float], float]) -> float:
    """The parallel ratio at which a preference ends that begins with half of the responses.

    Args:
      margin: how much a block is preferred where so many have one.

    Returns:
      1 or 0 where all come to have one or none, else where the margin changes its sign.
    """
    direction = 1 if margin(0.5) > 0 else -1
    ratio = 0.5
    while 0 < ratio < 1 and margin(ratio) * direction > 0:
        ratio = round(ratio + direction * _STEP, 6)
    return ratio


def predicted(p_block: float, p_lone: float, share: float) -> tuple[float, float]:
    """The parallel ratios at which training rests, as `plain` and `normalised` have it."""
    return (
        rest(lambda _: plain(p_block, p_lone, share)),
        rest(lambda ratio: normalised(p_block, p_lone, share, ratio)),
    )
