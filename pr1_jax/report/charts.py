"""The charts of a run, which the page and `curves.png` draw alike."""

import dataclasses

from pr1_jax.workdir import metric_table

_SCALES = {"share": "share", "small": "log", "count": "zero", "seconds": "zero"}


@dataclasses.dataclass(frozen=True)
class Chart:
    """One chart: up to two metrics over the steps, and a held-out figure beside them.

    Attributes:
      scale: "share" (0 to 1), "zero" (from 0), "free" or "log".
      held_out: metric of the evaluations, drawn where they took place; "" for none.
      in_picture: whether `curves.png` has the chart, too.
    """

    title: str
    metrics: tuple[str, ...]
    scale: str
    held_out: str
    in_picture: bool


def _chart(
    *metrics: str, title: str = "", scale: str = "", in_picture: bool = False
) -> Chart:
    """A chart with title and scale of its first metric, unless they are given."""
    first = metric_table.describe(metrics[0])
    is_sampled = len(metrics) == 1 and metrics[0].startswith("rollout/")
    return Chart(
        title or first.label,
        metrics,
        scale or _SCALES.get(first.form, "free"),
        metrics[0].replace("rollout/", "eval/") if is_sampled else "",
        in_picture,
    )


CHARTS = {
    "Outcome": (
        _chart("reward/mean", in_picture=True),
        _chart("rollout/accuracy", in_picture=True),
        _chart("loss/sft", scale="zero", in_picture=True),
    ),
    "Shape of the thinking": (
        _chart("rollout/parallel_ratio", in_picture=True),
        _chart("rollout/num_paths", in_picture=True),
        _chart(
            "rollout/work_division",
            "rollout/identical_paths",
            title="Paths",
            in_picture=True,
        ),
        _chart(
            "rollout/total_tokens",
            "rollout/sequential_steps",
            title="Length",
            in_picture=True,
        ),
        _chart("rollout/path_likeness", "analysis/path_bleu"),
        _chart(
            "analysis/path_agreement",
            "analysis/summary_follows_majority",
            title="Agreement",
        ),
        _chart("analysis/relative_position"),
        _chart("analysis/verification_share"),
        _chart("rollout/format_ok", "rollout/finished", title="Format"),
    ),
    "Policy": (
        _chart("policy/entropy", scale="zero", in_picture=True),
        _chart(
            "rollout/logp_gap_max",
            "rollout/logp_gap_mean",
            title="Log-prob gap",
            in_picture=True,
        ),
        _chart("rollout/degenerate_groups", in_picture=True),
        _chart("optim/grad_norm"),
        _chart("policy/approx_kl"),
        _chart("policy/clip_fraction"),
    ),
    "Machine": (
        _chart("perf/tokens_per_sec"),
        _chart("perf/mfu", "perf/update_mfu", title="MFU"),
        _chart("perf/step_sec"),
        _chart("perf/decode_sec", "perf/update_sec", title="Time by phase"),
        _chart("perf/verify_sec", "perf/checkpoint_sec", title="Other time"),
    ),
}
