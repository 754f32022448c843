"""The best accuracy of searches in the task `partner`, for every deadline.

It is that of responses which are one search or one block, as all cold-start traces are,
and which look at numbers in their order. A response that went on searching behind a block
without a find would see up to 8 points more at late deadlines, and a model that knew the
answer without looking would need no search; RL was not seen to find either.

A search of so many tokens looks at a known number of the 20 (`reach`): a row's letter
costs one token, a number three. What a response can see of the list follows from its
deadline, its paths and whether they are labelled; it is right if the answer is among what
it sees, and every number is the answer equally often:

* `lone`: one search in the main stream. It needs no EOS: the deadline ends it.
* `divided`: a block whose paths search a row each, told apart by their labels.
* `alike`: a block whose paths have the same context, so that they draw their rows from
  one distribution, at best the uniform one, independently of each other.

* `planned`: a block whose main stream first names, in plans, the row where each path
  begins; a path searches until the row of another plan. Plans cost the main stream steps,
  and every path costs tokens of the response, which are limited, too.

But for planned blocks there are as many rows as paths. A response that guesses where it has found nothing gains
a twentieth at most; it is not in these figures. The constants are those of
`pr1_jax.data.partner` and of the default config; a test compares them with its texts.
"""

NUMBERS = 20
_ROW_TOKENS, _NUMBER_TOKENS = 1, 3
_ANSWER_TOKENS = 2  # `\nFinal Answer:` and the number
# Steps of a block beside its paths' searches and labels: <Parallel>, <Path>, </Path>,
# </Parallel>, the newline, <Summary>, the number, </Summary>, and the answer with EOS.
BLOCK_TOKENS = 8 + _ANSWER_TOKENS + 1
_PLAN_TOKENS = 3  # <Plan>, a row, </Plan>
_PATH_TAGS = 2


def reach(tokens: int, rows: int = 2) -> int:
    """Numbers that a search of so many tokens looks at, from the start of a row.

    Args:
      rows: that the list has.
    """
    length = NUMBERS // rows
    whole, rest = divmod(max(tokens, 0), _ROW_TOKENS + _NUMBER_TOKENS * length)
    more = max(0, rest - _ROW_TOKENS) // _NUMBER_TOKENS
    return min(NUMBERS, whole * length + more)


def lone(deadline: int, rows: int = 2) -> float:
    """The share of the list that one search sees before the deadline; 0 = no deadline."""
    return reach(deadline - _ANSWER_TOKENS, rows) / NUMBERS if deadline else 1.0


def path_reach(deadline: int, num_paths: int, *, label_tokens: int = 0) -> int:
    """Numbers that each path of a block sees, at most its row.

    Args:
      deadline: in sequential steps; 0 = none.
      label_tokens: of a path's label.
    """
    row = NUMBERS // num_paths
    left = deadline - BLOCK_TOKENS - label_tokens
    return min(row, reach(left)) if deadline else row


def divided(deadline: int, num_paths: int, *, label_tokens: int = 1) -> float:
    """The share of the list that paths see together which search a row each."""
    reached = path_reach(deadline, num_paths, label_tokens=label_tokens)
    return num_paths * reached / NUMBERS


def alike(deadline: int, num_paths: int, *, label_tokens: int = 0) -> float:
    """The share that paths see together on average which draw their rows alike."""
    missed = (1 - 1 / num_paths) ** num_paths  # of the rows
    return (1 - missed) * divided(deadline, num_paths, label_tokens=label_tokens)


def best(deadline: int, num_paths: int, *, labels: bool = True) -> float:
    """The best accuracy at a deadline, with a block or without one."""
    block = divided if labels else alike
    return max(lone(deadline, num_paths), block(deadline, num_paths))


def planned(
    deadline: int,
    num_paths: int,
    *,
    tokens: int = 0,
    rows: int = 4,
    label_tokens: int = 1,
) -> float:
    """The share of the list that the paths of a planned block see together.

    Plans are as evenly spread over the rows as can be.

    Args:
      deadline: in sequential steps; 0 = none.
      num_paths: plans that the block has, at most `rows`.
      tokens: that the response may have, all paths counted; 0 = any number.
      rows: that the list has.
    """
    left = deadline - BLOCK_TOKENS - _PLAN_TOKENS * num_paths - label_tokens
    if tokens:
        outside = BLOCK_TOKENS - _PATH_TAGS + _PLAN_TOKENS * num_paths
        share = (tokens - outside) // num_paths - _PATH_TAGS - label_tokens
        left = min(left, share) if deadline else share
    length = NUMBERS // rows
    spans = [
        length * (rows * (i + 1) // num_paths - rows * i // num_paths)
        for i in range(num_paths)
    ]
    seen = reach(left, rows) if deadline or tokens else NUMBERS
    return sum(min(span, seen) for span in spans) / NUMBERS


def shares_planned(
    deadline: int, *, tokens: int = 0, rows: int = 4
) -> dict[int, float]:
    """The share of the list that is seen at a deadline, by the number of planned paths.

    1 stands for a lone search, whose response is limited as well. Arguments are as of
    `planned`.
    """
    limits = [limit for limit in (deadline, tokens) if limit]
    shares = {1: lone(min(limits, default=0), rows)}
    for num_paths in range(2, rows + 1):
        shares[num_paths] = planned(deadline, num_paths, tokens=tokens, rows=rows)
    return shares


def best_planned(
    deadline: int, *, tokens: int = 0, rows: int = 4
) -> tuple[float, list[int]]:
    """The best accuracy at a deadline, and the numbers of paths that reach it.

    Arguments are as of `shares_planned`.
    """
    shares = shares_planned(deadline, tokens=tokens, rows=rows)
    best = max(shares.values())
    return best, [n for n, share in shares.items() if share == best]
