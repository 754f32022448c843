"""The charts of a run, which the page and `curves.png` draw alike."""

import dataclasses


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
        Chart("Tokens a sequential step", ("rollout/self_parallelism",)),
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
