"""Curves of a run: a picture of the right size, whatever there is of it."""

import matplotlib.image
import numpy as np
import pytest

from pr1_jax.report import curves, reading
from pr1_jax.workdir import metrics
from tests.helpers import made_up_run


def _assert_is_a_picture(workdir, height):
    curves.plot_curves(reading.read(workdir))
    pixels = matplotlib.image.imread(workdir / "curves.png")
    assert pixels.shape[:2] == (height, 1600)
    assert np.mean(pixels[..., :3].min(axis=-1) < 0.9) > 5e-4  # not all white
    assert [p.name for p in workdir.glob("curves*")] == ["curves.png"]


def test_a_whole_run_fills_three_rows(tmp_path):
    made_up_run.write(tmp_path, steps=20, responses=())
    _assert_is_a_picture(tmp_path, 1220)


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [("sft", 1, {"loss/sft": 0.5})],
        [("rl", 1, {"reward/mean": 1.0, "rollout/logp_gap_max": 0.0})],  # no log of 0
        [("rl", i, {"rollout/accuracy": x}) for i, x in ((1, float("nan")), (2, 1.0))],
        [(stage, 1, {"reward/mean": 1.0}) for stage in ("rl_easy", "rl_hard")],
        [("eval_0_base", 0, {"eval/accuracy": 0.5})],
    ],
)
def test_a_run_with_little_in_it_fills_one_row(tmp_path, lines):
    with metrics.MetricWriter(tmp_path) as writer:
        for line in lines:
            writer.write(*line)
    _assert_is_a_picture(tmp_path, 390)
