"""How fast a run is: tokens a second, counted FLOPs, and their share of the peak.

Counted are the products that the model asks for (`model.costs`): weights times tokens, and
scores of pairs that see each other. Padding, dead lanes, what `remat` computes again and
what a program computes beside them do not count. Divided by time and peak they give the
model FLOPs utilization, MFU (Chowdhery et al. 2022, "PaLM", arXiv 2204.02311, appendix B).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from pr1_jax.model import costs
from pr1_jax.model.config import ModelConfig
from pr1_jax.system import accelerators, processes
from pr1_jax.trajectory import Trajectory

_PARTS = ("data", "prefill", "decode", "verify", "update", "wait", "checkpoint")


@dataclasses.dataclass(frozen=True)
class Work:
    """What forward passes feed and make.

    Attributes:
      tokens: fed to the layers.
      pairs: of a query and a key that it sees, in one layer.
      logits: tokens whose logits are made.
    """

    tokens: float = 0.0
    pairs: float = 0.0
    logits: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        """Both."""
        return Work(
            self.tokens + other.tokens,
            self.pairs + other.pairs,
            self.logits + other.logits,
        )

    def tflop(self, model: ModelConfig) -> float:
        """10^12 FLOPs of these forward passes; a backward pass is two more."""
        counts = dataclasses.asdict(self)
        return costs.forward(model, **counts, cached=0).flops / 1e12

    def update_tflop(
        self, model: ModelConfig, *, passes: int = 3, whole: bool = True
    ) -> float:
        """10^12 FLOPs of an update, which is three passes, and of other passes.

        Args:
          passes: forward passes; a backward pass is two.
          whole: whether layers' weights have gradients, and not adapters alone.
        """
        saved = 0.0 if whole else 2 * costs.layer_weights(model) * self.tokens / 1e12
        return passes * self.tflop(model) - saved


def visible_pairs(t: Trajectory, *, variant: str) -> int:
    """Pairs of a query and a key that it sees, each token itself among them.

    Args:
      variant: "structured", in which siblings do not see each other, or "causal".
    """
    pairs = _causal(len(t))
    if variant == "structured":
        labels = np.stack([t.block, t.path], axis=1)[t.path > 0]
        (blocks, _), counts = _counted(labels)
        for block in np.unique(blocks):
            of_block = counts[blocks == block]
            pairs -= int(of_block.sum() ** 2 - (of_block**2).sum()) // 2
    return pairs


def sampling(trajectories: Sequence[Trajectory], samples: int) -> Work:
    """The work of sampling; the prompt of a group is computed once.

    Args:
      trajectories: problem-major. samples: responses to each problem.
    """
    work = Work()
    for number, t in enumerate(trajectories):
        prompt = len(t.prompt)
        pairs = visible_pairs(t, variant="structured") - _causal(prompt)
        work += Work(len(t.tokens), pairs, len(t.tokens))
        if number % samples == 0:
            work += Work(prompt, _causal(prompt))
    return work


def training(
    trajectories: Sequence[Trajectory],
    *,
    variant: str,
    shared: Sequence[int] | None = None,
    group_rows: int = 1,
) -> Work:
    """The work of one forward pass of an update.

    Args:
      shared: first tokens of each that `group_rows` of them have in common, and that are
        computed once for those; None = none.
    """
    work = Work()
    copies = 1 - 1 / group_rows
    for t, common in zip(
        trajectories, [0] * len(trajectories) if shared is None else shared
    ):
        pairs = visible_pairs(t, variant=variant) - copies * _causal(int(common))
        work += Work(len(t) - copies * int(common), pairs, len(t.tokens))
    return work


def everyones(mine: Work) -> Work:
    """The work of all processes together."""
    return sum(
        (Work(*part) for part in processes.gather([dataclasses.astuple(mine)])), Work()
    )


def pace(
    metrics: Mapping[str, float], *, tokens: int, seconds: float, peak_tflops: float
) -> dict[str, float]:
    """How fast a step was, by what is known of its parts.

    Args:
      metrics: of the step: `perf/PART_sec`, `perf/sampling_tflop`, `perf/update_tflop`, of
        all processes; those that are there.
      tokens: of its responses or traces.
      peak_tflops: TFLOP/s of a device, `device_peak`; 0 where it is not known: then there
        is no MFU.
    """
    devices = jax.device_count()
    per_sec = tokens / seconds
    found = {
        "perf/step_sec": seconds,
        "perf/tokens_per_sec": per_sec,
        "perf/tokens_per_sec_per_device": per_sec / devices,
    }
    parts = [metrics[n] for part in _PARTS if (n := f"perf/{part}_sec") in metrics]
    if parts:
        found["perf/accounted"] = sum(parts) / seconds
    update = metrics.get("perf/update_tflop", 0.0)
    if peak_tflops:
        at_peak = peak_tflops * devices
        counted = update + metrics.get("perf/sampling_tflop", 0.0)
        found["perf/mfu"] = counted / seconds / at_peak
        update_sec = metrics.get("perf/update_sec", seconds)
        found["perf/update_mfu"] = update / update_sec / at_peak
    return found


def device_peak(config: Any) -> float:
    """TFLOP/s of a device: `metrics.peak_tflops`, or its data sheet's; 0 if not known."""
    if config.metrics.peak_tflops:
        return config.metrics.peak_tflops
    known = accelerators.of_kind(jax.devices()[0].device_kind)
    return known.flops_per_sec / 1e12 if known else 0.0


def _causal(tokens: int) -> int:
    return tokens * (tokens + 1) // 2


def _counted(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different rows of [n, 2] labels, transposed, and how often each is there."""
    rows, counts = np.unique(labels, axis=0, return_counts=True)
    return rows.T, counts
