"""What a training step should not look like, said aloud.

An alarm is a metric `alarm/NAME`, 1 while something is wrong, and a line in the log
when it begins. None of them stops a run but the one for gradients that stay non-finite.
"""

import dataclasses
from collections.abc import Mapping

from absl import logging


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds of `config.alarms`. Shares are of 1; see `_RULES`."""

    logp_gap: float  # of sampled and trained log-probs, outside later causal paths
    min_entropy: float  # nats a token
    min_length: float  # mean tokens of a response
    min_parallel_ratio: float
    max_parallel_ratio: float
    max_undecided: float  # verdicts that the verifier could not give
    max_degenerate: float  # groups whose rewards are all equal
    max_skipped: int  # updates in a row with a non-finite gradient


# Name: metric, whether its value is wrong, what to look at.
_RULES = {
    "logp_gap": (
        "rollout/logp_gap_max",
        lambda x, limits: x > limits.logp_gap,
        (
            "the sampler and the trainer compute different policies; "
            "try model.dtype=float32, and report it"
        ),
    ),
    "entropy_collapse": (
        "policy/entropy",
        lambda x, limits: x < limits.min_entropy,
        "the policy hardly explores; lower rl.lr, or add rl.kl_coef",
    ),
    "no_signal": (
        "rollout/degenerate_groups",
        lambda x, limits: x > limits.max_degenerate,
        (
            "rewards in a group are all equal, so that nothing is learned; take easier or "
            "harder data.rl, a larger rl.group_size, or rl.dynamic_sampling"
        ),
    ),
    "length_collapse": (
        "rollout/total_tokens",
        lambda x, limits: x < limits.min_length,
        "responses are nearly empty; look at rollouts/ and the reward",
    ),
    "no_blocks": (
        "rollout/parallel_ratio",
        lambda x, limits: x < limits.min_parallel_ratio,
        "hardly a response has a block; see reward.schedule, or train more SFT",
    ),
    "always_blocks": (
        "rollout/parallel_ratio",
        lambda x, limits: x > limits.max_parallel_ratio,
        "nearly every response has a block; see reward.schedule",
    ),
    "undecided": (
        "rollout/undecided",
        lambda x, limits: x > limits.max_undecided,
        "the verifier cannot decide; raise reward.timeout_sec, or look at the answers",
    ),
}
NAMES = (*_RULES, "skipped")


class Alarms:
    """The alarms of one stage."""

    def __init__(self, limits: Limits):
        self._limits = limits
        self._ringing: set[str] = set()
        self.skipped = 0  # updates in a row

    def check(
        self, stage: str, step: int, metrics: Mapping[str, float]
    ) -> dict[str, float]:
        """Metrics `alarm/…` of a step; logs those that begin."""
        wrong = {}
        for name, (metric, is_wrong, advice) in _RULES.items():
            if metric in metrics:
                wrong[name] = is_wrong(metrics[metric], self._limits)
                self._ring(name, wrong[name], stage, step, metric, metrics, advice)
        if "optim/skipped" in metrics:
            skipped = metrics["optim/skipped"]
            self.skipped = self.skipped + int(skipped) if skipped else 0
            wrong["skipped"] = bool(skipped)
            advice = "a non-finite gradient, the update was left out; lower the lr"
            self._ring(
                "skipped",
                wrong["skipped"],
                stage,
                step,
                "optim/skipped",
                metrics,
                advice,
            )
        return {f"alarm/{name}": float(value) for name, value in wrong.items()}

    @property
    def is_lost(self) -> bool:
        """Whether so many updates in a row were skipped that going on is pointless."""
        return 0 < self._limits.max_skipped <= self.skipped

    def _ring(self, name, is_wrong, stage, step, metric, metrics, advice) -> None:
        if is_wrong and name not in self._ringing:
            text = "alarm %s: %s step %d: %s=%.4g; %s"
            value = metrics[metric]
            logging.warning(text, name, stage, step, metric, value, advice)
            self._ringing.add(name)
        elif not is_wrong:
            self._ringing.discard(name)
