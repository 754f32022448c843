"""Each alarm rings when it should, once, and stops."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import rl_alternating
from pr1_jax.stages import experiment, rl, sft
from pr1_jax.stages.run import Run
from pr1_jax.workdir import alarms, metrics

LIMITS = alarms.Limits(
    logp_gap=1e-2,
    min_entropy=0.01,
    min_length=2.0,
    min_parallel_ratio=0.01,
    max_parallel_ratio=0.99,
    max_undecided=0.1,
    max_degenerate=0.99,
    max_skipped=3,
)
FINE = {
    "rollout/logp_gap_max": 1e-5,
    "policy/entropy": 0.5,
    "rollout/total_tokens": 40.0,
    "rollout/parallel_ratio": 0.5,
    "rollout/work_division": 0.5,
    "rollout/undecided": 0.0,
    "rollout/degenerate_groups": 0.5,
    "optim/skipped": 0.0,
}
WRONG = [
    ("logp_gap", "rollout/logp_gap_max", 0.02),
    ("entropy_collapse", "policy/entropy", 0.001),
    ("length_collapse", "rollout/total_tokens", 1.0),
    ("no_blocks", "rollout/parallel_ratio", 0.0),
    ("always_blocks", "rollout/parallel_ratio", 1.0),
    ("collapsed_paths", "rollout/work_division", 0.1),
    ("undecided", "rollout/undecided", 0.2),
    ("no_signal", "rollout/degenerate_groups", 1.0),
    ("little_signal", "rollout/degenerate_groups", 0.9),
    ("skipped", "optim/skipped", 1.0),
]


def test_all_is_quiet_and_every_alarm_is_tried():
    found = alarms.Alarms(LIMITS).check("rl", 1, FINE)
    assert found == {f"alarm/{name}": 0.0 for name in alarms.ALARMS}
    assert {name for name, _, _ in WRONG} == {*alarms.ALARMS}


@pytest.mark.parametrize("name, metric, value", WRONG)
def test_an_alarm_rings_once_and_says_what_to_do(name, metric, value, monkeypatch):
    said = []
    warn = lambda text, *args: said.append(text % args)
    monkeypatch.setattr(alarms.logging, "warning", warn)
    made = alarms.Alarms(LIMITS)
    steps = alarms.ALARMS[name].steps
    course = [*[FINE] * steps, *[FINE | {metric: value}] * (steps + 1), *[FINE] * steps]
    found = [made.check("rl", i, x)[f"alarm/{name}"] for i, x in enumerate(course)]
    begins = found.index(1.0)
    assert steps <= begins < 2 * steps  # a mean may pass the bound before all steps do
    assert found[begins : 2 * steps + 1] == [1.0] * (2 * steps + 1 - begins)
    assert found[-1] == 0.0
    (line,) = said
    assert line.startswith(f"alarm {name}: rl step {begins}: {metric}=")
    told = line.split("; ", 1)[1]
    assert len(told) > 20  # what to do
    assert all(
        x[:1].isupper() and x.endswith(".") for x in (told, alarms.ALARMS[name].look)
    )


def test_collapsed_paths_are_told_from_chance():
    """Courses of 256 blocks a step: two paths that toss a coin, and two that agree."""
    tossed, collapsed, scarce = (alarms.Alarms(LIMITS) for _ in range(3))
    luck = np.random.default_rng(0)

    def rings(made, step, division, parallel_ratio=1.0):
        found = {"rollout/parallel_ratio": parallel_ratio}
        found |= {"rollout/work_division": division} if parallel_ratio else {}
        return made.check("rl", step, found).get("alarm/collapsed_paths")

    for step in range(1, 101):
        other_side = luck.binomial(256, 0.5) / 256  # and the others share all work
        assert rings(tossed, step, other_side) == 0.0
        # As an RL run on the embedded pair search has gone, which ended at 0.1.
        assert rings(collapsed, step, max(0.6 - 0.05 * step, 0.1)) == (step >= 11)
        # Ten steps with enough blocks, not any ten.
        ratio = (0.5, 0.0, 0.09)[step % 3]
        expected = None if ratio < 0.1 else step >= 30
        assert rings(scarce, step, 0.0, ratio) == expected


def test_an_alarm_of_several_steps_goes_on_after_a_restart():
    little = FINE | {"rollout/degenerate_groups": 0.9}
    resumed = alarms.Alarms(LIMITS)
    resumed.recall([FINE, *[little] * 9])
    assert resumed.check("rl", 11, little)["alarm/little_signal"] == 1.0
    assert alarms.Alarms(LIMITS).check("rl", 11, little)["alarm/little_signal"] == 0.0


def test_the_bound_of_the_log_prob_gap_is_that_of_the_model():
    """In bfloat16, no gap that was measured rings (docs/measurements.md)."""
    bound = alarms.largest_logp_gap
    for layers in (1, 36):
        assert bound("structured", "float32", layers) == 1e-2
        assert bound("causal", "float32", layers) == 1e-1
    for layers, largest in ((1, 0.14), (4, 0.16), (16, 0.20), (32, 0.22)):
        assert largest < bound("structured", "bfloat16", layers) < 3 * largest
    assert bound("causal", "bfloat16", 36) == bound("structured", "bfloat16", 36) < 0.7


def test_metrics_that_a_stage_lacks_ring_nothing():
    assert alarms.Alarms(LIMITS).check("sft", 1, {"optim/skipped": 0.0}) == {
        "alarm/skipped": 0.0
    }


def test_updates_skipped_in_a_row_are_counted():
    """In a row of updates: a step of several may skip some of them and not the others."""
    made = alarms.Alarms(LIMITS)
    course = ((2, 2, False), (0, 0, False), *[(1, 1, False)] * 50, (2, 3, True))
    for skipped, in_a_row, lost in course:
        metrics_ = {"optim/skipped": skipped, "optim/skipped_in_a_row": in_a_row}
        made.check("rl", 1, {name: float(x) for name, x in metrics_.items()})
        assert made.is_lost == lost
    never = alarms.Alarms(dataclasses.replace(LIMITS, max_skipped=0))
    never.check("rl", 1, {"optim/skipped_in_a_row": 50.0})
    assert not never.is_lost


@pytest.mark.parametrize("stage", [pytest.param("sft", marks=pytest.mark.slow), "rl"])
def test_gradients_that_stay_non_finite_stop_the_run(stage, tmp_path):
    config = rl_alternating.get_config("smoke")
    config.stages = (stage,)
    config.model.num_layers = config.rollout.max_blocks = 1
    config.model.update(num_heads=1, width=16, mlp_width=16, length_buckets=())
    config.rl.mini_batches, config.rl.micro_batch_size = 1, 16
    config.data.rl = config.data.eval = "embedded:easy"
    config.alarms.max_skipped = 2
    config.checkpoint.every_steps = 100
    made = experiment.build(config.lock(), devices=jax.devices()[:1])
    with Run(made, tmp_path) as current:
        if stage == "sft":
            nan = lambda x: jnp.full_like(x, jnp.nan)
            current.params = jax.tree.map(nan, current.params)
        with pytest.MonkeyPatch.context() as patch:
            if stage == "rl":
                advantages = rl.group_advantages
                infinite = lambda *args, **kwargs: (
                    (found := advantages(*args, **kwargs))[0],
                    np.full_like(found[1], math.inf),
                    found[2],
                )
                patch.setattr(rl, "group_advantages", infinite)
            match = f"{stage} step 2: 2 updates in a row .*alarms.max_skipped=2"
            with pytest.raises(FloatingPointError, match=match):
                {"sft": sft, "rl": rl}[stage].run_stage(made, current, 0)
    lines = metrics.read_metrics(tmp_path / "metrics.jsonl")
    lines = [line for line in lines if line["stage"] == stage]
    assert [line["alarm/skipped"] for line in lines] == [1.0, 1.0]
    with np.load(tmp_path / f"non_finite_{stage}.npz") as batch:
        assert batch["tokens"].shape[0] * batch["tokens"].shape[1] == 16
        assert batch["loss_mask"].any()
        if stage == "rl":
            assert np.isinf(batch["advantages"]).all()
