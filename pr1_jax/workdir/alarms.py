"""What a training step should not look like, said aloud.

An alarm is a metric `alarm/NAME`, 1 while something is wrong, and a line in the log
when it begins. None of them stops a run but the one for gradients that stay non-finite.
"""

import dataclasses
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from absl import logging


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds beyond which an alarm rings, those of `config.alarms` among them.

    Shares are of 1; see `ALARMS`.
    """

    logp_gap: float  # of sampled and trained log-probs, outside later causal paths
    min_entropy: float = 0.01  # nats a token
    min_length: float = 2.0  # mean tokens of a response
    min_parallel_ratio: float = 0.01
    max_parallel_ratio: float = 1.0  # never: traces with a block teach just that
    # Two paths that toss a coin between two ways divide 0.5 of their work, and four that
    # choose among four ways 0.6: with less than that, paths do not even differ by chance.
    min_division: float = 0.3  # mean of ten steps
    few_blocks: float = 0.1  # with a smaller parallel ratio, too few to judge by
    # Verdicts that the verifier could not give; what an untrained model writes is
    # understood in two of three cases.
    max_undecided: float = 0.5
    max_degenerate: float = 0.99  # groups whose rewards are all equal
    # The quickstart goes from 9 % to 83 % while it learns to be right in 93 % of cases,
    # and passes this bound half-way, as its problems become easy for it.
    max_unlearnable: float = 0.75  # the same, mean of ten steps
    max_skipped: int = 10  # updates in a row with a non-finite gradient


LOGP_GAPS = {"structured": 1e-2, "causal": 1e-1}  # by variant, in float32
# In types of 16 bits, the bound of one layer; it grows with the fourth root of their
# number. Twice the largest gap that was measured (docs/measurements.md).
_ROUGH_LOGP_GAP = 0.25


def largest_logp_gap(variant: str, dtype: str, num_layers: int) -> float:
    """The bound of the log-prob gap's alarm.

    Args:
      variant, dtype, num_layers: of the run's model.
    """
    if dtype == "float32":
        return LOGP_GAPS[variant]
    return _ROUGH_LOGP_GAP * num_layers**0.25


@dataclasses.dataclass(frozen=True)
class Alarm:
    """One alarm; its words stand in the log and in the report.

    Attributes:
      metric: that it watches.
      rings: whether a value of the metric is wrong.
      title: two or three words.
      means: what is wrong, one sentence.
      look: what to look at, and what to change.
      steps: the value is the mean of so many steps, once there are so many.
      is_of_blocks: the metric is one of blocks; steps with few of them do not count.
    """

    metric: str
    rings: Callable[[float, Limits], bool]
    title: str
    means: str
    look: str
    steps: int = 1
    is_of_blocks: bool = False


ALARMS = {
    "logp_gap": Alarm(
        "rollout/logp_gap_max",
        lambda x, limits: x > limits.logp_gap,
        "Log-prob gap",
        "The sampler and the trainer give a token different log-probs, so the update "
        "corrects a policy that did not write these responses.",
        "Look at the gap's curve: a jump points at this step, a high start at "
        "model.dtype. Try model.dtype=float32, and report it. rl.recompute_logps and "
        "rl.importance_cap correct for it.",
    ),
    "entropy_collapse": Alarm(
        "policy/entropy",
        lambda x, limits: x < limits.min_entropy,
        "Entropy collapse",
        "The policy is nearly certain of every token: it samples the same response "
        "again and again and has nothing left to compare.",
        "Look whether the step's responses are copies of each other, and what the "
        "reward did before. A lower rl.lr or some rl.kl_coef helps.",
    ),
    "no_signal": Alarm(
        "rollout/degenerate_groups",
        lambda x, limits: x > limits.max_degenerate,
        "No signal",
        "In nearly every group all rewards are equal, so all advantages are 0 and "
        "nothing is learned.",
        "Look at accuracy: near 100 % the problems are too easy, near 0 % too hard. "
        "Harder or easier problems (data.rl), a larger rl.group_size, or "
        "rl.dynamic_sampling helps.",
    ),
    "little_signal": Alarm(
        "rollout/degenerate_groups",
        lambda x, limits: limits.max_unlearnable < x <= limits.max_degenerate,
        "Little signal",
        "For ten steps, all rewards have been equal in most groups: only the others "
        "teach something.",
        "Look at accuracy: if it is high, the problems have become easy and the run has "
        "done its work, or needs harder ones (data.rl). A larger rl.group_size or "
        "rl.dynamic_sampling finds more groups with signal.",
        steps=10,
    ),
    "length_collapse": Alarm(
        "rollout/total_tokens",
        lambda x, limits: x < limits.min_length,
        "Length collapse",
        "Responses are nearly empty: ending at once has come to pay, or nothing pays.",
        "Read the responses of this step and the one before, in rollouts/, and compare "
        "their rewards; look at reward.schedule.",
    ),
    "no_blocks": Alarm(
        "rollout/parallel_ratio",
        lambda x, limits: x < limits.min_parallel_ratio,
        "No blocks",
        "Hardly a response has a block: parallel thinking has died out, or was never "
        "learned.",
        "Look at the parallel ratio after SFT. More SFT helps, or a reward.schedule "
        "with a bonus for blocks.",
    ),
    "always_blocks": Alarm(
        "rollout/parallel_ratio",
        lambda x, limits: x > limits.max_parallel_ratio,
        "Always blocks",
        "Nearly every response has a block, also where none is of use.",
        "Look at the accuracy of evaluations with blocks banned; see reward.schedule.",
    ),
    "collapsed_paths": Alarm(
        "rollout/work_division",
        lambda x, limits: x < limits.min_division,
        "Collapsed paths",
        "For ten steps, the paths of most blocks have done the same work: a block costs "
        "more tokens than one path and finds no more.",
        "Compare the paths of some responses in the report. Labels (rollout.path_labels) "
        "tell paths apart, which without them only sampling does. SFT traces whose paths "
        "differ, a higher rollout.temperature, or a deadline that leaves no time for the "
        "same work twice (rollout.max_sequential_steps) teach paths to differ.",
        steps=10,
        is_of_blocks=True,
    ),
    "undecided": Alarm(
        "rollout/undecided",
        lambda x, limits: x > limits.max_undecided,
        "Undecided",
        "The verifier could not judge many answers; they count as not correct.",
        "Filter the report's responses by 'undecided' and read the reasons: what is not "
        "understood (docs/method.md, section 5), or too little reward.timeout_sec.",
    ),
    "skipped": Alarm(
        "optim/skipped",
        lambda x, limits: x > 0,
        "Update skipped",
        "A gradient, or its norm, was not finite, so an update was left out; the "
        "parameters stay.",
        "Look at the gradient norm before it; the batch is in non_finite_*.npz. "
        "Lower the learning rate.",
    ),
}


class Alarms:
    """The alarms of one stage."""

    def __init__(self, limits: Limits):
        self._limits = limits
        self._ringing: set[str] = set()
        self._recent = {n: deque(maxlen=alarm.steps) for n, alarm in ALARMS.items()}
        self.skipped = 0  # updates in a row, at the last step at the most

    def recall(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Continues from the metrics that an earlier process of this run logged."""
        for metrics in lines:
            self._remember(metrics)

    def _remember(self, metrics: Mapping[str, Any]) -> None:
        for name, alarm in ALARMS.items():
            if (value := self._value(alarm, metrics)) is not None:
                self._recent[name].append(value)

    def _value(self, alarm: Alarm, metrics: Mapping[str, Any]) -> float | None:
        """What an alarm watches in a step, None if there is nothing to judge by."""
        blocks = metrics.get("rollout/parallel_ratio")
        if alarm.is_of_blocks and (blocks or 0) < self._limits.few_blocks:
            return None
        return metrics.get(alarm.metric)

    def check(
        self, stage: str, step: int, metrics: Mapping[str, float]
    ) -> dict[str, float]:
        """Metrics `alarm/…` of a step; logs those that begin."""
        self.skipped = int(metrics.get("optim/skipped_in_a_row", self.skipped))
        self._remember(metrics)
        rings = {}
        for name, alarm in ALARMS.items():
            if self._value(alarm, metrics) is None:
                continue
            recent = self._recent[name]
            value = statistics.fmean(recent)
            is_wrong = len(recent) == alarm.steps and alarm.rings(value, self._limits)
            if is_wrong and name not in self._ringing:
                text = f"{alarm.metric}={value:.4g}; {alarm.means} {alarm.look}"
                logging.warning("alarm %s: %s step %d: %s", name, stage, step, text)
            if is_wrong:
                self._ringing.add(name)
            else:
                self._ringing.discard(name)
            rings[f"alarm/{name}"] = float(is_wrong)
        return rings

    @property
    def is_lost(self) -> bool:
        """Whether so many updates in a row were skipped that going on is pointless."""
        return 0 < self._limits.max_skipped <= self.skipped
