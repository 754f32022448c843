"""Which responses of a mini-batch an update computes together.

A micro-batch is cut to its longest response, so responses are sorted by length. Where
responses of a group stand together instead, their prompt is computed once for all of
them (Liu et al. 2025, "Prefix Grouper", arXiv 2506.05433). Which of the two costs fewer
tokens depends on the lengths, and is counted here.

Or rows hold several responses one after another, so that little of them is padding.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from pr1_jax.system import processes
from pr1_jax.training.logps import PolicySettings
from pr1_jax.trajectory import Trajectory


@dataclasses.dataclass(frozen=True)
class Order:
    """The rows of a mini-batch in order.

    Attributes:
      rows: [B] int, numbers of trajectories.
      shared: [B] int, as `trajectory.Batch` has it.
      computed_tokens: that the model's layers see, padding included; of all processes.
    """

    rows: np.ndarray
    shared: np.ndarray
    computed_tokens: int


def arrange(
    trajectories: Sequence[Trajectory],
    policy: PolicySettings,
    *,
    group_size: int,
    micro_batch: int,
    max_tokens: int,
) -> Order:
    """The order that costs the fewest tokens; all processes choose alike.

    Args:
      trajectories: of this process, whole groups one after another.
      policy: of the update; `group_rows` divides the group size and the micro-batch.
      micro_batch: rows of it that are this process's.
      max_tokens: of a row that is not cut.
    """
    lengths = np.array([len(t) for t in trajectories])
    prompts = np.array([len(t.prompt) for t in trajectories])
    by_length = np.argsort(lengths, kind="stable")
    # Whole sets of responses to one prompt, the longest of each last.
    groups = np.arange(len(lengths)) // group_size
    sets = np.lexsort((lengths, groups)).reshape(-1, policy.group_rows)
    sets = sets[np.argsort(lengths[sets[:, -1]], kind="stable")]

    def counted(rows, prompts) -> Order:
        shared, tokens = np.zeros(len(rows), int), 0
        for first in range(0, len(rows), micro_batch):
            some = slice(first, first + micro_batch)
            size, common = policy.size_of(
                lengths[rows[some]].max(), prompts[rows[some]].min(), max_tokens
            )
            shared[some] = common
            saved = common * (micro_batch - micro_batch // policy.group_rows)
            tokens += micro_batch * size - saved
        return Order(rows, shared, tokens)

    orders = counted(by_length, np.zeros_like(prompts)), counted(sets.ravel(), prompts)
    everyones = processes.gather([[order.computed_tokens for order in orders]])
    costs = np.sum(everyones, axis=0)
    best = int(np.argmin(costs))
    return dataclasses.replace(orders[best], computed_tokens=int(costs[best]))


@dataclasses.dataclass(frozen=True)
class Rows:
    """The trajectories of a mini-batch in rows that hold several.

    Attributes:
      rows: numbers of the trajectories of each; those behind them are empty.
      computed_tokens: as of `Order`.
    """

    rows: Sequence[Sequence[int]]
    computed_tokens: int


def fill(
    trajectories: Sequence[Trajectory],
    policy: PolicySettings,
    *,
    micro_batch: int,
    max_tokens: int,
) -> Rows:
    """The rows that cost the fewest tokens; all processes choose alike.

    Trajectories go into the first row that has space, the longest first. Rows are as
    long as the longest of the lengths to which a micro-batch is cut, or as another of
    them, where a trajectory is not longer. Rows of like length and work stand together.

    Args:
      trajectories: of this process.
      policy, micro_batch, max_tokens: as of `arrange`.
    """
    lengths = np.array([len(t) for t in trajectories])
    sizes = [size for size, _ in policy.sizes(max_tokens)]
    choices, cut = [], []
    for least in sizes:
        rows = _first_fit(lengths, sizes, least)
        used = [(lengths[row].sum(), (lengths[row] ** 2).sum()) for row in rows]
        work = [(policy.size_of(n, 0, max_tokens)[0], int(pairs)) for n, pairs in used]
        order = sorted(range(len(rows)), key=lambda i: work[i], reverse=True)
        choices.append([rows[i] for i in order])
        cut.append([work[i][0] for i in order[::micro_batch]])
    everyones = processes.gather([cut])
    costs = []
    for alike in zip(*everyones, strict=True):  # micro-batches of a choice by process
        longest = map(max, itertools.zip_longest(*alike, fillvalue=0))
        costs.append(micro_batch * len(everyones) * sum(longest))
    best = int(np.argmin(costs))
    return Rows(choices[best], costs[best])


def _first_fit(
    lengths: np.ndarray, sizes: Sequence[int], least: int
) -> list[list[int]]:
    """Rows of `least` tokens, and the next of the sizes for what is longer."""
    rows: list[list[int]] = []
    free = np.zeros(len(lengths), int)
    for i in np.argsort(-lengths, kind="stable"):
        fits = np.flatnonzero(free[: len(rows)] >= lengths[i])
        row = fits[0] if len(fits) else len(rows)
        if row == len(rows):
            rows.append([])
            free[row] = next(n for n in sizes if n >= max(lengths[i], least))
        rows[row].append(int(i))
        free[row] -= lengths[i]
    return rows
