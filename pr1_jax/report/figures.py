"""What the page draws, and the words for it: metrics, charts, alarms, in one place."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Figure:
    """A metric as a person reads it.

    Attributes:
      label: a few words.
      form: how a value is written: "share" (of 1, as per cent), "number", "count",
        "small" (with an exponent) or "seconds".
      about: one sentence.
    """

    label: str
    form: str = "number"
    about: str = ""


# In order of importance: of metrics that moved alike, the first ones are named.
FIGURES = {
    "reward/mean": Figure("Reward", about="Mean reward of the step's responses."),
    "rollout/accuracy": Figure(
        "Accuracy", "share", "Responses whose answer is the reference's."
    ),
    "policy/entropy": Figure(
        "Entropy", about="Nats a token; near 0 the policy explores no more."
    ),
    "rollout/total_tokens": Figure(
        "Response length", "count", "Mean tokens of a response, all paths counted."
    ),
    "rollout/sequential_steps": Figure(
        "Sequential steps",
        "count",
        "Decode steps one after another; paths of a block share theirs.",
    ),
    "rollout/parallel_ratio": Figure(
        "Parallel ratio", "share", "Responses with at least one block."
    ),
    "rollout/num_blocks": Figure("Blocks", about="Mean blocks of a response."),
    "analysis/relative_position": Figure(
        "Relative position of blocks",
        "share",
        "Where a block begins, as a share of its response.",
    ),
    "rollout/format_ok": Figure(
        "Well formed", "share", "Responses whose tags follow the grammar."
    ),
    "rollout/finished": Figure(
        "Finished", "share", "Responses that ended by themselves, not at their budget."
    ),
    "rollout/undecided": Figure(
        "Undecided", "share", "Answers that the verifier could not judge."
    ),
    "rollout/degenerate_groups": Figure(
        "Groups without signal", "share", "Groups whose rewards are all equal."
    ),
    "rollout/self_parallelism": Figure(
        "Tokens a step", about="Tokens over sequential steps: the speed-up of blocks."
    ),
    "rollout/logp_gap_max": Figure(
        "Log-prob gap, largest",
        "small",
        "Sampled against trained log-prob of one token; should be rounding.",
    ),
    "rollout/logp_gap_mean": Figure("Log-prob gap, mean", "small"),
    "rollout/logp_gap_later_paths_max": Figure(
        "Log-prob gap in later paths, largest", "small"
    ),
    "rollout/logp_gap_later_paths_mean": Figure(
        "Log-prob gap in later paths, mean", "small"
    ),
    "reward/std": Figure("Spread of rewards", about="Their standard deviation."),
    "optim/grad_norm": Figure("Gradient norm", "small", "Before it is clipped."),
    "policy/clip_fraction": Figure(
        "Clipped tokens", "share", "Tokens whose ratio left the clipping range."
    ),
    "policy/approx_kl": Figure(
        "Policy shift", "small", "Approximate KL from the policy that sampled."
    ),
    "policy/ref_kl": Figure("KL to the reference", "small"),
    "policy/importance_mean": Figure("Importance weight, mean"),
    "policy/importance_min": Figure("Importance weight, least"),
    "analysis/path_bleu": Figure(
        "Likeness of paths (BLEU)",
        "share",
        "Between paths of a block; 100 % is the same.",
    ),
    "analysis/path_agreement": Figure(
        "Agreement of paths", "share", "Blocks whose paths come to one result."
    ),
    "analysis/summary_follows_majority": Figure(
        "Summary follows most paths", "share", "Where the paths of a block disagree."
    ),
    "analysis/verification_share": Figure(
        "Verification", "share", "Blocks that verify rather than explore."
    ),
    "loss/sft": Figure("SFT loss", about="Nats a token of the traces."),
    "loss/grpo": Figure("GRPO loss", "small"),
    "policy/ratio_max_error": Figure("Largest ratio error", "small"),
    "rollout/sampling_rounds": Figure("Sampling rounds"),
    "optim/lr": Figure("Learning rate", "small"),
    "optim/skipped": Figure("Skipped updates", "count"),
    "reward/tiered": Figure("Tiered reward in force", "count"),
    "perf/tokens_per_sec": Figure("Tokens a second", "count"),
    "perf/step_sec": Figure("Time of a step", "seconds"),
    "perf/decode_sec": Figure("Decoding", "seconds"),
    "perf/update_sec": Figure("Update", "seconds"),
    "perf/useful_row_steps": Figure(
        "Useful row-steps", "share", "Row-steps of the sampler that wrote something."
    ),
}


@dataclasses.dataclass(frozen=True)
class Chart:
    """One chart: up to two metrics over the steps, and a held-out figure beside them.

    Attributes:
      scale: "share" (0 to 1), "zero" (from 0), "free" or "log".
      held_out: metric of the evaluations, drawn where they took place.
    """

    title: str
    metrics: tuple[str, ...]
    scale: str = "free"
    held_out: str = ""


CHARTS = {
    "Outcome": (
        Chart("Reward", ("reward/mean",)),
        Chart("Accuracy", ("rollout/accuracy",), "share", "eval/accuracy"),
        Chart("SFT loss", ("loss/sft",), "zero"),
    ),
    "Shape of the thinking": (
        Chart(
            "Parallel ratio",
            ("rollout/parallel_ratio",),
            "share",
            "eval/parallel_ratio",
        ),
        Chart("Relative position of blocks", ("analysis/relative_position",), "share"),
        Chart(
            "Length",
            ("rollout/total_tokens", "rollout/sequential_steps"),
            "zero",
        ),
        Chart("Tokens a step", ("rollout/self_parallelism",)),
        Chart("Likeness of paths (BLEU)", ("analysis/path_bleu",), "share"),
        Chart(
            "Agreement",
            ("analysis/path_agreement", "analysis/summary_follows_majority"),
            "share",
        ),
        Chart("Verification", ("analysis/verification_share",), "share"),
        Chart("Format", ("rollout/format_ok", "rollout/finished"), "share"),
    ),
    "Policy": (
        Chart("Entropy", ("policy/entropy",), "zero"),
        Chart(
            "Log-prob gap",
            ("rollout/logp_gap_max", "rollout/logp_gap_mean"),
            "log",
        ),
        Chart("Groups without signal", ("rollout/degenerate_groups",), "share"),
        Chart("Gradient norm", ("optim/grad_norm",), "log"),
        Chart("Policy shift", ("policy/approx_kl",), "log"),
        Chart("Clipped tokens", ("policy/clip_fraction",), "zero"),
    ),
    "Machine": (
        Chart("Tokens a second", ("perf/tokens_per_sec",), "zero"),
        Chart(
            "Time of a step",
            ("perf/step_sec", "perf/update_sec"),
            "zero",
        ),
    ),
}


@dataclasses.dataclass(frozen=True)
class Alarm:
    """An alarm of `pr1_jax.alarms` for a person: what it means, what to look at."""

    title: str
    means: str
    look: str


ALARMS = {
    "logp_gap": Alarm(
        "Log-prob gap",
        "The sampler and the trainer give a token different log-probs, so the update "
        "corrects a policy that did not write these responses.",
        "Look at the gap's chart: a jump points at this step, a high start at "
        "model.dtype. Try model.dtype=float32, and report it.",
    ),
    "entropy_collapse": Alarm(
        "Entropy collapse",
        "The policy is nearly certain of every token: it samples the same response "
        "again and again and has nothing left to compare.",
        "Look whether the responses below are copies of each other, and what the "
        "reward did before. A lower rl.lr or some rl.kl_coef helps.",
    ),
    "no_signal": Alarm(
        "No signal",
        "In nearly every group all rewards are equal, so all advantages are 0 and "
        "nothing is learned.",
        "Look at accuracy: near 100 % the problems are too easy, near 0 % too hard. "
        "Change data.rl, a larger rl.group_size, or rl.dynamic_sampling.",
    ),
    "length_collapse": Alarm(
        "Length collapse",
        "Responses are nearly empty: ending at once has come to pay, or nothing pays.",
        "Read the responses of this step and the one before, and compare their "
        "rewards; look at reward.schedule.",
    ),
    "no_blocks": Alarm(
        "No blocks",
        "Hardly a response has a block: parallel thinking has died out, or was never "
        "learned.",
        "Look at the parallel ratio after SFT. More SFT, or a reward.schedule with a "
        "bonus for blocks.",
    ),
    "always_blocks": Alarm(
        "Always blocks",
        "Nearly every response has a block, also where none is of use.",
        "Look at accuracy with blocks banned in the table; see reward.schedule.",
    ),
    "undecided": Alarm(
        "Undecided",
        "The verifier could not judge many answers; they count as not correct.",
        "Filter the responses by 'undecided' and read the reasons; raise "
        "reward.timeout_sec.",
    ),
    "skipped": Alarm(
        "Update skipped",
        "A gradient was not finite, so an update was left out; the parameters stay.",
        "Look at the gradient norm before it; the batch is in non_finite_*.npz. "
        "Lower the learning rate.",
    ),
}


def label(metric: str) -> str:
    """The words for a metric; its name where there are none."""
    return FIGURES[metric].label if metric in FIGURES else metric


def as_data() -> dict:
    """All of it as JSON can hold it."""
    return {
        "figures": {name: dataclasses.asdict(f) for name, f in FIGURES.items()},
        "charts": [
            {"group": group, "charts": [dataclasses.asdict(c) for c in charts]}
            for group, charts in CHARTS.items()
        ],
        "alarms": {name: dataclasses.asdict(a) for name, a in ALARMS.items()},
    }
