"""The shapes of the next chunk of steps."""

from collections.abc import Sequence

FEWEST_ROWS, FEWEST_SLOTS, FEWEST_PROMPT_TOKENS = 8, 128, 64  # smallest shapes


def doubling(smallest: int, largest: int) -> list[int]:
    """`smallest`, twice it, … up to half of `largest`, and `largest`."""
    sizes = []
    while smallest <= largest / 2:
        sizes.append(smallest)
        smallest *= 2
    return [*sizes, largest]


def fit(sizes: Sequence[int], needed: int) -> int:
    """The smallest size that will do."""
    return next(size for size in sizes if size >= needed)
