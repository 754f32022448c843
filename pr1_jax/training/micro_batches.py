"""Which responses of a mini-batch an update computes together.

A micro-batch is cut to its longest response, so responses are sorted by length. Where
responses of a group stand together instead, their prompt is computed once for all of
them (Liu et al. 2025, "Prefix Grouper", arXiv 2506.05433). Which of the two costs fewer
tokens depends on the lengths, and is counted here.
"""

import dataclasses
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
