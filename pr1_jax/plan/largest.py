"""The largest size that fits, in as few trials as possible: memory grows in a line."""

from collections.abc import Callable, Mapping, Sequence


def largest(
    sizes: Sequence[int],
    total: Callable[[int], int],
    limit: int,
    known: Mapping[int, int],
    *,
    trials: int = 3,
) -> int | None:
    """The greatest size whose total was found to be within a limit.

    A line through the two nearest known totals says where to look next; what it says
    is tried before it is believed.

    Args:
      sizes: ascending. total: bytes at a size, slow.
      known: totals that are there already, one at least.
      trials: of `total`, at most.

    Returns:
      A size of which `total` is known to be at most `limit`; None if none was found.
    """
    known = dict(known)
    for _ in range(trials):
        fits = max((n for n in known if known[n] <= limit), default=0)
        fails = min((n for n in known if known[n] > limit), default=sizes[-1] + 1)
        open_ = [n for n in sizes if fits < n < fails]
        if not open_:
            break
        guess = _guess(open_, known, limit)
        known[guess] = total(guess)
    return max((n for n in known if known[n] <= limit), default=None)


def _guess(open_: Sequence[int], known: Mapping[int, int], limit: int) -> int:
    """The next size to try: by the line, or (with one point) a neighbour of it."""
    if len(known) == 1:
        (total,) = known.values()
        return open_[0] if total <= limit else open_[-1]
    nearest = sorted(known, key=lambda n: abs(known[n] - limit))[:2]
    (a, b), values = nearest, [known[n] for n in nearest]
    slope = (values[1] - values[0]) / (b - a)
    if slope <= 0:
        return open_[len(open_) // 2]
    most = a + (limit - values[0]) / slope
    return max((n for n in open_ if n <= most), default=open_[0])
