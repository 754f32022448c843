"""The best accuracy that the task `partner` allows, for every deadline.

A search of t tokens looks at a known number of the 16 (`reach`): a row's letter costs one
token, a number three. What a response can see of the list follows from its deadline, its
paths and whether they are labelled; it is right if the answer is among what it sees, and
every number is the answer equally often:

* `lone`: one search in the main stream.
* `divided`: a block whose paths are told apart by their labels, each at its best row.
* `alike`: a block whose paths have the same context, so that they draw their rows from
  one distribution, the best that there is, independently of each other.

A response that guesses where it has found nothing gains less than a sixteenth; it is not
in these figures. The constants are those of `pr1_jax.data.partner`; a test compares them
with its texts.
"""

import itertools
from collections.abc import Iterator

import numpy as np

ROWS, ROW_LENGTH = 4, 4
NUMBERS = ROWS * ROW_LENGTH
_ROW_TOKENS, _NUMBER_TOKENS = 1, 3
ANSWER_TOKENS = 3  # `\nFinal Answer:`, the number, EOS
# Steps of a block beside its paths' searches: <Parallel>, <Path>, </Path>, </Parallel>,
# the newline, <Summary>, the number, </Summary>.
BLOCK_TOKENS = 8
_SHARES = 12  # rows' probabilities are tried in so many steps


def reach(tokens: int) -> int:
    """Numbers that a search of so many tokens looks at, from the start of a row."""
    rows, rest = divmod(max(tokens, 0), _ROW_TOKENS + _NUMBER_TOKENS * ROW_LENGTH)
    more = max(0, rest - _ROW_TOKENS) // _NUMBER_TOKENS
    return min(NUMBERS, rows * ROW_LENGTH + more)


def lone(deadline: int) -> float:
    """The share of the list that one search sees before the deadline; 0 = no deadline."""
    return reach(deadline - ANSWER_TOKENS) / NUMBERS if deadline else 1.0


def path_reach(deadline: int, num_paths: int, *, label_tokens: int = 0) -> int:
    """Numbers that each path of a block sees, at most its share of the list.

    Args:
      deadline: in sequential steps; 0 = none.
      label_tokens: of a path's label.
    """
    share = -(-NUMBERS // num_paths)
    if not deadline:
        return share
    left = deadline - ANSWER_TOKENS - BLOCK_TOKENS - label_tokens
    return min(share, reach(left))


def divided(deadline: int, num_paths: int, *, label_tokens: int = 1) -> float:
    """The share of the list that labelled paths see together, at their best rows."""
    seen = _seen(path_reach(deadline, num_paths, label_tokens=label_tokens))
    starts = itertools.combinations_with_replacement(range(ROWS), num_paths)
    return max(float(seen[list(rows)].any(axis=0).mean()) for rows in starts)


def alike(deadline: int, num_paths: int, *, label_tokens: int = 0) -> float:
    """The share that paths see together on average which draw their rows alike."""
    seen = _seen(path_reach(deadline, num_paths, label_tokens=label_tokens))
    missed = lambda shares: (1 - shares @ seen) ** num_paths
    return max(float(1 - missed(shares).mean()) for shares in _distributions())


def best(deadline: int, num_paths: int, *, labels: bool = True) -> float:
    """The best accuracy at a deadline, with a block or without one."""
    block = divided if labels else alike
    return max(lone(deadline), block(deadline, num_paths))


def _seen(numbers: int) -> np.ndarray:
    """Which numbers a search from each row sees, float [ROWS, NUMBERS]."""
    start = np.arange(ROWS)[:, None] * ROW_LENGTH
    return (((np.arange(NUMBERS) - start) % NUMBERS) < numbers).astype(np.float64)


def _distributions() -> Iterator[np.ndarray]:
    """Probabilities of the rows, float [ROWS], on a grid."""
    for shares in itertools.product(range(_SHARES + 1), repeat=ROWS - 1):
        if sum(shares) <= _SHARES:
            yield np.array([*shares, _SHARES - sum(shares)]) / _SHARES
