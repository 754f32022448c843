"""Every metric of a run as a person reads it: words, unit, and which way is better.

The terminal's progress, the report, `curves.png` and the alarms take their words from
here. A metric that nobody described is shown by its name.
"""

import dataclasses
from typing import Literal

Form = Literal["number", "share", "count", "small", "seconds"]


@dataclasses.dataclass(frozen=True)
class Metric:
    """How one metric is read.

    Attributes:
      label: a few words, for titles and sentences.
      form: how a value is written: "share" (of 1, in per cent), "count" (whole, with k
        and M), "small" (with an exponent), "seconds", or "number".
      better: "more", "less", or "" where neither is better in itself.
      about: one sentence that says what it means.
      short: one or two words, for the terminal and legends; "" is the label.
    """

    label: str
    form: Form = "number"
    better: Literal["more", "less", ""] = ""
    about: str = ""
    short: str = ""

    def write(self, value: float) -> str:
        """A value as text.

        >>> METRICS["rollout/accuracy"].write(0.706)
        '70.6%'
        >>> METRICS["perf/tokens_per_sec"].write(12345.0)
        '12.3k'
        """
        match self.form:
            case "share":
                return f"{100 * value:.1f}%"
            case "small":
                return f"{value:.1e}"
            case "seconds":
                return f"{value:.1f}s"
            case "count":
                return _count(value)
        return f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"


def _count(value: float) -> str:
    for least, unit, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= least:
            return f"{value / unit:.1f}{letter}"
    return f"{value:.0f}"


# In order of importance: of metrics that moved alike, the first ones are named.
METRICS = {
    "reward/mean": Metric(
        "Reward", "number", "more", "Mean reward of the step's responses.", "reward"
    ),
    "rollout/accuracy": Metric(
        "Accuracy",
        "share",
        "more",
        "Share of responses whose answer is the reference's.",
        "accuracy",
    ),
    "policy/entropy": Metric(
        "Entropy",
        about="Nats a token; near 0 the policy no longer explores.",
        short="entropy",
    ),
    "rollout/total_tokens": Metric(
        "Response length",
        "count",
        about="Mean tokens of a response, those of all paths counted.",
        short="tokens",
    ),
    "rollout/sequential_steps": Metric(
        "Sequential steps",
        "count",
        about="Decode steps one after another; the paths of a block share theirs.",
        short="steps",
    ),
    "rollout/parallel_ratio": Metric(
        "Parallel ratio",
        "share",
        about="Share of responses with at least one block.",
        short="parallel",
    ),
    "rollout/num_blocks": Metric("Blocks", about="Mean number of blocks a response."),
    "analysis/relative_position": Metric(
        "Relative position of blocks",
        "share",
        about="Where a block begins, as a share of its response.",
    ),
    "rollout/format_ok": Metric(
        "Well formed",
        "share",
        "more",
        "Share of responses whose tags follow the grammar.",
        "format",
    ),
    "rollout/finished": Metric(
        "Finished",
        "share",
        "more",
        "Share of responses that ended by themselves, not at their budget.",
        "finished",
    ),
    "rollout/undecided": Metric(
        "Undecided",
        "share",
        "less",
        "Share of answers that the verifier could not judge.",
    ),
    "rollout/degenerate_groups": Metric(
        "Groups without signal",
        "share",
        "less",
        "Share of groups whose rewards are all equal: they teach nothing.",
        "no signal",
    ),
    "rollout/self_parallelism": Metric(
        "Tokens a sequential step",
        about="Tokens of a response over its own sequential steps. It is no speed-up "
        "over thinking in sequence, which may need fewer tokens.",
    ),
    "rollout/logp_gap_max": Metric(
        "Log-prob gap, largest",
        "small",
        "less",
        "Largest difference of one token's log-prob as sampled and as trained; it "
        "should be rounding.",
        "logp gap",
    ),
    "rollout/logp_gap_mean": Metric(
        "Log-prob gap, mean",
        "small",
        "less",
        "Mean difference of a token's log-prob as sampled and as trained.",
        "mean",
    ),
    "rollout/logp_gap_later_paths_max": Metric(
        "Log-prob gap in later paths, largest",
        "small",
        about="Of the causal variant, whose later paths are trained with more context "
        "than they were sampled with.",
    ),
    "rollout/logp_gap_later_paths_mean": Metric(
        "Log-prob gap in later paths, mean", "small"
    ),
    "reward/std": Metric(
        "Spread of rewards", about="Standard deviation of the step's rewards."
    ),
    "optim/grad_norm": Metric(
        "Gradient norm", "small", about="Norm of the gradient before it is clipped."
    ),
    "policy/clip_fraction": Metric(
        "Clipped tokens",
        "share",
        about="Share of tokens whose ratio left the clipping range.",
    ),
    "policy/approx_kl": Metric(
        "Policy shift", "small", about="Approximate KL from the policy that sampled."
    ),
    "policy/ref_kl": Metric(
        "KL to the reference",
        "small",
        about="KL from the policy at the start of the stage.",
    ),
    "policy/importance_mean": Metric(
        "Importance weight, mean",
        about="Of trained against sampled probabilities; 1 where they agree.",
    ),
    "policy/importance_min": Metric("Importance weight, least"),
    "analysis/path_bleu": Metric(
        "Likeness of paths (BLEU)",
        "share",
        about="BLEU between the paths of a block; 100 % is the same text.",
    ),
    "analysis/path_agreement": Metric(
        "Agreement of paths",
        "share",
        about="Share of pairs of a block's paths that come to one result.",
        short="paths",
    ),
    "analysis/summary_follows_majority": Metric(
        "Summary follows most paths",
        "share",
        about="Share of summaries that do, where the paths of a block disagree.",
        short="summary",
    ),
    "analysis/verification_share": Metric(
        "Verification",
        "share",
        about="Share of blocks that verify rather than explore.",
    ),
    "loss/sft": Metric(
        "SFT loss", "number", "less", "Nats a token of the traces.", "loss"
    ),
    "loss/grpo": Metric(
        "GRPO loss", "small", about="The objective; its size says little."
    ),
    "policy/ratio_max_error": Metric(
        "Largest ratio error",
        "small",
        "less",
        "Largest distance from 1 of a ratio before the first update of a step.",
    ),
    "rollout/sampling_rounds": Metric(
        "Sampling rounds", about="Rounds until a step had enough groups with signal."
    ),
    "optim/lr": Metric("Learning rate", "small"),
    "optim/skipped": Metric(
        "Skipped updates",
        "count",
        "less",
        "Updates left out, since a gradient was not finite.",
    ),
    "reward/tiered": Metric("Tiered reward in force", "count"),
    "data/kept": Metric(
        "Records kept", "count", "more", "Records of the data that fit the limits."
    ),
    "coldstart/kept": Metric(
        "Samples kept", "share", "more", "Share of samples that became traces.", "kept"
    ),
    "coldstart/traces": Metric("Traces", "count", "more", short="traces"),
    "eval/pass_at_k": Metric(
        "pass@k",
        "share",
        "more",
        "Chance that one of k responses to a problem is correct.",
    ),
    "eval/accuracy_string": Metric(
        "Accuracy by string",
        "share",
        "more",
        "Share of responses whose answer is the reference's, letter by letter.",
    ),
    "eval/seconds": Metric("Time of a response", "seconds", "less"),
    "perf/tokens_per_sec": Metric(
        "Tokens a second",
        "count",
        "more",
        "Tokens of a step's responses or traces, over the time of the step.",
        "tokens/s",
    ),
    "perf/step_sec": Metric("Time of a step", "seconds", "less", short="step"),
    "perf/prefill_sec": Metric("Prefill", "seconds", "less"),
    "perf/decode_sec": Metric("Decoding", "seconds", "less"),
    "perf/verify_sec": Metric("Judging answers", "seconds", "less"),
    "perf/update_sec": Metric("Update", "seconds", "less", short="update"),
    "perf/data_sec": Metric("Reading data", "seconds", "less"),
    "perf/wait_sec": Metric("Waiting for files", "seconds", "less"),
    "perf/checkpoint_sec": Metric("Checkpoints and logs", "seconds", "less"),
    "perf/accounted": Metric(
        "Time accounted for", "share", about="Sum of a step's parts over its time."
    ),
    "perf/update_tokens": Metric(
        "Tokens of updates", "count", about="Tokens computed in a step's updates."
    ),
    "perf/compilations": Metric(
        "Compilations", "count", "less", "Programs compiled since the run began."
    ),
    "perf/useful_row_steps": Metric(
        "Useful row-steps",
        "share",
        "more",
        "Share of the sampler's row-steps that wrote a token.",
    ),
}

# Metrics whose names end in a word of the config or of the data.
_FAMILIES = {
    "reward/weight_": Metric(
        "Weight of the reward {}", about="Weight of this reward in the step's reward."
    ),
    "data/dropped_": Metric("Records dropped: {}", "count", "less"),
    "coldstart/": Metric("Samples: {}", "share"),
    "alarm/": Metric("Alarm: {}", "count", "less", "1 while something is wrong."),
}
_BANNED = "_banned"  # an evaluation with <Parallel> banned


def describe(name: str) -> Metric:
    """The words for a metric, whoever logs it.

    A metric of an evaluation, `eval/NAME`, reads like that of a training step.

        >>> describe("eval/accuracy_banned_low").label
        'Accuracy, blocks banned'
        >>> describe("reward/weight_tiered").label
        'Weight of the reward tiered'
        >>> describe("mine/own").label
        'mine/own'
    """
    if name in METRICS:
        return METRICS[name]
    group, _, rest = name.partition("/")
    if group == "eval":
        plain = rest.removesuffix("_low").removesuffix("_high")
        metric = METRICS.get(f"rollout/{plain.removesuffix(_BANNED)}")
        if metric and plain.endswith(_BANNED):
            return dataclasses.replace(metric, label=f"{metric.label}, blocks banned")
        if metric:
            return metric
    for prefix, metric in _FAMILIES.items():
        if name.startswith(prefix):
            words = name.removeprefix(prefix).replace("_", " ")
            return dataclasses.replace(metric, label=metric.label.format(words))
    return Metric(name)
