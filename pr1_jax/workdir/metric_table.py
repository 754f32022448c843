"""Every metric of a run as a person reads it: words, unit, and which way is better.

The terminal's progress, the report and `curves.png` take their words from
here. A metric that nobody described is shown by its name.
"""

import dataclasses
import functools
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Metric:
    """How one metric is read.

    Attributes:
      form: how a value is written: "share" (of 1, in per cent), "count" (whole, with k
        and M), "small" (with an exponent), "seconds", or "number".
      label: a few words, for titles and sentences.
      about: one sentence that says what it means.
      better: "more", "less", or "" where neither is better in itself.
      short: one or two words, for the terminal and legends.
    """

    form: Literal["number", "share", "count", "small", "seconds"]
    label: str
    about: str = ""
    better: Literal["more", "less", ""] = ""
    short: str = ""

    def __post_init__(self):
        object.__setattr__(self, "short", self.short or self.label.lower())

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
                units = (1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")
                for least, unit, letter in units:
                    if abs(value) >= least:
                        return f"{value / unit:.1f}{letter}"
                return f"{value:.0f}"
        return f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"


_share, _count, _small, _seconds, _number = (
    functools.partial(Metric, form)
    for form in ("share", "count", "small", "seconds", "number")
)

# In order of importance: of metrics that moved alike, the first ones are named.
METRICS = {
    "reward/mean": _number("Reward", "Mean reward of the step's responses.", "more"),
    "rollout/accuracy": _share("Accuracy", "Answers that are the reference's.", "more"),
    "policy/entropy": _number(
        "Entropy", "Nats a token; near 0 the policy no longer explores."
    ),
    "rollout/total_tokens": _count(
        "Response length", "Mean tokens, those of all paths.", short="tokens"
    ),
    "rollout/sequential_steps": _count(
        "Sequential steps",
        "Mean decode steps; the paths of a block share theirs.",
        short="steps",
    ),
    "rollout/parallel_ratio": _share(
        "Parallel ratio", "Responses with a block.", short="parallel"
    ),
    "rollout/work_division": _share(
        "Distinct work",
        "Of the steps of work in a block's paths, those that one path alone did.",
        "more",
        "distinct work",
    ),
    "rollout/identical_paths": _share(
        "Identical paths",
        "Blocks in which two paths are the same text.",
        "less",
        "identical paths",
    ),
    "rollout/path_likeness": _share(
        "Likeness of paths",
        "Word pairs that two paths of a block share; 100 % for the same text.",
        "less",
        "pairs",
    ),
    "rollout/num_blocks": _number("Blocks", "Mean number of blocks in a response."),
    "rollout/num_paths": _number(
        "Paths of a block", "Mean number; where blocks are planned, the model decides."
    ),
    "analysis/relative_position": _share(
        "Relative position of blocks", "Where a block begins in its response."
    ),
    "rollout/format_ok": _share(
        "Well formed", "Responses whose tags follow the grammar.", "more", "format"
    ),
    "rollout/finished": _share(
        "Finished", "Responses that ended before their budget.", "more"
    ),
    "rollout/undecided": _share(
        "Undecided", "Answers that the verifier could not judge.", "less"
    ),
    "rollout/degenerate_groups": _share(
        "Groups without signal",
        "Groups of equal rewards, which teach nothing.",
        "less",
        "no signal",
    ),
    "rollout/self_parallelism": _number(
        "Tokens a sequential step",
        "Of one response; no speed-up over a response without blocks.",
    ),
    "rollout/logp_gap_max": _small(
        "Log-prob gap, largest",
        "Sampled against trained log-prob of a token; should be rounding.",
        "less",
        "logp gap",
    ),
    "rollout/logp_gap_mean": _small(
        "Log-prob gap, mean", "Sampled against trained log-probs.", "less", "mean"
    ),
    "rollout/logp_gap_later_paths_max": _small(
        "Log-prob gap in later paths, largest",
        "In the causal variant, which trains them with more context.",
    ),
    "rollout/logp_gap_later_paths_mean": _small("Log-prob gap in later paths, mean"),
    "reward/std": _number(
        "Spread of rewards", "Standard deviation of the step's rewards."
    ),
    "optim/grad_norm": _small("Gradient norm", "Before the gradient is clipped."),
    "policy/clip_fraction": _share(
        "Clipped tokens", "Tokens whose ratio left the clipping range."
    ),
    "policy/approx_kl": _small(
        "Policy shift", "Approximate KL from the policy that sampled."
    ),
    "policy/ref_kl": _small(
        "KL to the reference", "From the policy at the start of the stage."
    ),
    "policy/importance_mean": _number(
        "Importance weight, mean", "Trained over sampled probability of a token."
    ),
    "policy/importance_min": _number("Importance weight, least"),
    "policy/importance_dropped": _share(
        "Dropped tokens", "Tokens whose importance weight is out of its range."
    ),
    "analysis/path_bleu": _share(
        "Likeness of paths (BLEU)",
        "Between paths of a block; 100 % is the same text.",
        short="BLEU",
    ),
    "analysis/path_agreement": _share(
        "Agreement of paths", "Pairs of a block's paths with one result.", short="paths"
    ),
    "analysis/summary_follows_majority": _share(
        "Summary follows most paths",
        "Where the paths of a block disagree.",
        short="summary",
    ),
    "analysis/verification_share": _share(
        "Verification", "Blocks that verify rather than explore."
    ),
    "loss/sft": _number("SFT loss", "Nats a token of the traces.", "less", "loss"),
    "loss/grpo": _small("GRPO loss", "The objective; its size says little."),
    "policy/ratio_max_error": _small(
        "Largest ratio error",
        "Distance of a ratio from 1 before a step's first update.",
        "less",
    ),
    "rollout/sampling_rounds": _number(
        "Sampling rounds", "Rounds until enough groups had a signal."
    ),
    "optim/lr": _small("Learning rate"),
    "optim/skipped": _count(
        "Skipped updates", "Updates whose gradient was not finite.", "less"
    ),
    "optim/skipped_in_a_row": _count(
        "Updates skipped in a row", "At the most; earlier steps count.", "less"
    ),
    "reward/latency": _number(
        "Reward for short critical paths",
        "Mean of what correct responses get for fewer steps than others of their group.",
        short="latency",
    ),
    "reward/schedule": _number(
        "Reward of the schedule", "Mean; its weight is not in it.", short="schedule"
    ),
    "reward/schedule_std": _number("Spread of the schedule's reward"),
    "reward/function": _number(
        "Reward of your function", "Mean; its weight is not in it.", short="function"
    ),
    "reward/function_std": _number("Spread of your function's reward"),
    "reward/overlong": _number(
        "Punishment of long responses", "Mean; from 0 to -1 as they near the limit."
    ),
    "reward/tiered": _count("Tiered reward in force"),
    "reward/not_finite": _count(
        "Rewards that are no number", "Their groups are left out.", "less"
    ),
    "data/kept": _count(
        "Records kept", "Records read so far that fit the limits.", "more"
    ),
    "coldstart/kept": _share(
        "Samples kept", "Samples that became traces.", "more", "kept"
    ),
    "coldstart/traces": _count("Traces", better="more"),
    "eval/pass_at_k": _share(
        "pass@k", "Chance that one of k responses to a problem is correct.", "more"
    ),
    "eval/accuracy_string": _share(
        "Accuracy by string",
        "Answers that are the reference's, letter by letter.",
        "more",
    ),
    "eval/seconds": _seconds("Time of a response", better="less"),
    "perf/tokens_per_sec": _count(
        "Tokens a second",
        "Tokens of responses or traces, over a step's time.",
        "more",
        "tokens/s",
    ),
    "perf/tokens_per_sec_per_device": _count(
        "Tokens a second a device",
        "Tokens of responses or traces, over a step's time and all devices.",
        "more",
    ),
    "perf/mfu": _share(
        "MFU of a step",
        "FLOPs that the model asks for, of those that the devices could make in a step.",
        "more",
        "MFU",
    ),
    "perf/update_mfu": _share(
        "MFU of updates",
        "FLOPs that updates ask for, of those that the devices could make in their time.",
        "more",
        "MFU of updates",
    ),
    "perf/sampling_tflop": _number(
        "TFLOP of sampling", "10^12 FLOPs that a step's prompts and responses ask for."
    ),
    "perf/update_tflop": _number(
        "TFLOP of updates", "10^12 FLOPs that a step's updates ask for."
    ),
    "perf/step_sec": _seconds("Time of a step", better="less", short="step"),
    "perf/prefill_sec": _seconds("Prefill", better="less"),
    "perf/decode_sec": _seconds("Decoding", better="less"),
    "perf/verify_sec": _seconds("Judging answers", better="less"),
    "perf/update_sec": _seconds("Update", better="less"),
    "perf/data_sec": _seconds("Reading data", better="less"),
    "perf/wait_sec": _seconds("Waiting for files", better="less"),
    "perf/checkpoint_sec": _seconds("Checkpoints and logs", better="less"),
    "perf/accounted": _share(
        "Time accounted for", "Sum of a step's parts over its time."
    ),
    "perf/update_tokens": _count(
        "Tokens of updates", "Tokens computed in a step's updates."
    ),
    "perf/compilations": _count(
        "Compilations", "Programs compiled since the run began.", "less"
    ),
    "perf/useful_row_steps": _share(
        "Useful row-steps", "Row-steps of the sampler that wrote a token.", "more"
    ),
}

# Metrics whose names end in a word of the config or of the data.
_FAMILIES = {
    "reward/weight_": _number(
        "Weight of the reward {}", "Its weight in the step's reward."
    ),
    "reward/function.": _number(
        "Reward of your function: {}", "Of a part of it, not weighted."
    ),
    "data/dropped_": _count("Records dropped: {}", better="less"),
    "coldstart/": _share("Samples: {}"),
    "alarm/": _count("Alarm: {}", "1 while something is wrong.", "less"),
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
        base = plain.removesuffix(_BANNED)
        metric = METRICS.get(f"rollout/{base}") or METRICS.get(f"eval/{base}")
        if metric and plain.endswith(_BANNED):
            return dataclasses.replace(metric, label=f"{metric.label}, blocks banned")
        if metric:
            return metric
    for prefix, metric in _FAMILIES.items():
        if name.startswith(prefix):
            words = name.removeprefix(prefix).replace("_", " ")
            label = metric.label.format(words)
            return dataclasses.replace(metric, label=label, short="")
    return Metric("number", name)
