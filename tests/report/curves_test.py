"""Curves of a run: a picture of the right size, whatever there is of it."""

import matplotlib.image
import numpy as np
import pytest

from pr1_jax.report import curves, reading
from pr1_jax.workdir import metrics


def _rl_figures(step):
    return {
        "reward/mean": step / 40 - 0.5,
        "reward/tiered": float((step - 1) % 10 >= 8),
        "rollout/accuracy": float("nan") if step == 3 else step / 40,
        "rollout/parallel_ratio": 0.6,
        "rollout/total_tokens": 90.0,
        "rollout/sequential_steps": 60.0,
        "rollout/logp_gap_max": 0.0 if step == 4 else 1e-5,
        "policy/entropy": 0.4,
        "perf/tokens_per_sec": 12e3,
    }


def _evaluation(accuracy):
    return {
        "eval/accuracy": accuracy,
        "eval/accuracy_low": accuracy - 0.03,
        "eval/accuracy_high": accuracy + 0.03,
    }


def _write_run(workdir):
    with metrics.MetricWriter(workdir) as writer:
        writer.write("eval_0_base", 0, _evaluation(0.05))
        for step in range(1, 31):
            writer.write("sft", step, {"loss/sft": 2.0 / step})
        banned = {"eval/accuracy_banned": 0.4}
        writer.write("eval_1_sft", 0, {**_evaluation(0.5), **banned})
        for stage in ("rl_easy", "rl_hard"):
            for step in range(1, 21):
                writer.write(stage, step, _rl_figures(step))


def _assert_is_a_picture(workdir, height):
    curves.plot_curves(reading.read(workdir))
    path = workdir / "curves.png"
    pixels = matplotlib.image.imread(path)
    assert pixels.shape[:2] == (height, 1600)
    assert np.mean(pixels[..., :3].min(axis=-1) < 0.9) > 5e-4  # not all white
    assert [p.name for p in path.parent.glob("curves*")] == ["curves.png"]


def test_a_whole_run_fills_three_rows(tmp_path):
    _write_run(tmp_path)
    _assert_is_a_picture(tmp_path, 1220)


@pytest.mark.parametrize(
    "metrics_by_step",
    [
        {},
        {1: {"loss/sft": 0.5}},
        {1: {"reward/mean": 1.0, "rollout/logp_gap_max": 0.0}},  # no log of zero
        {0: {"eval/accuracy": 0.5}},
    ],
)
def test_a_run_with_little_in_it_fills_one_row(tmp_path, metrics_by_step):
    with metrics.MetricWriter(tmp_path) as writer:
        for step, figures in metrics_by_step.items():
            writer.write("stage", step, figures)
    _assert_is_a_picture(tmp_path, 390)
