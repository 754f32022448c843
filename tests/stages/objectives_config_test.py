"""Configs whose fields of the objective do not go together are refused in one line."""

import pytest

from configs import rl_alternating
from pr1_jax.stages import checks


def check(fields):
    config = rl_alternating.get_config("smoke").lock()
    config.update_from_flattened_dict(fields)
    checks.check(config)


RECOMPUTED = {"rl.recompute_logps": True}


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"rl.objective": "ppo"}, "rl.objective='ppo' is not one of"),
        ({"rl.kl_estimator": "k4"}, "rl.kl_estimator='k4' is not one of"),
        ({"rl.importance": "token"}, "rl.importance='token' is not one of"),
        ({"rl.baseline": "value"}, "rl.baseline='value' is not one of"),
        ({"rl.dual_clip": 1.0}, "rl.dual_clip=1.0 must be above 1"),
        ({"rl.dual_clip": -3.0}, "rl.dual_clip=-3.0 must not be negative"),
        (
            {"rl.objective": "cispo", "rl.dual_clip": 3.0},
            "rl.dual_clip=3.0 is of objectives that clip their gain, not of rl.objective",
        ),
        (
            {"rl.normalize_parts": True, "rl.kl_estimator": "k1", "rl.kl_coef": 0.1},
            "rl.normalize_parts=True has no place for a KL divergence in the reward",
        ),
        (
            {"rl.importance_floor": -0.5},
            "rl.importance_floor=-0.5 must not be negative",
        ),
        (
            {"rl.importance_floor": 3.0, "rl.importance_cap": 2.0, **RECOMPUTED},
            "rl.importance_floor=3.0 is above rl.importance_cap=2.0",
        ),
        (
            {"rl.importance_floor": 0.5, **RECOMPUTED},
            "rl.importance_floor=0.5 is above rl.importance_cap=0.0",
        ),
        (
            {"rl.importance": "sequence_mask", **RECOMPUTED},
            "rl.importance=sequence_mask corrects nothing with rl.importance_cap=0",
        ),
        (
            {"rl.importance": "token_mask", "rl.importance_cap": 2.0},
            "rl.importance_cap=2.0 corrects old log-probs that the trainer recomputes",
        ),
        (
            {"rl.normalize_parts": True, "rl.baseline": "batch"},
            "rl.normalize_parts=True normalises by group, and then by batch: it takes",
        ),
        ({"reward.overlong_buffer": -1}, "reward.overlong_buffer=-1 must not be negat"),
        (
            {"reward.overlong_buffer": 44},  # the deadline is at 43 steps
            "reward.overlong_buffer=44 must not be longer than a response may be, 43",
        ),
    ],
)
def test_what_does_not_go_together_is_named(fields, said):
    with pytest.raises(ValueError) as error:
        check(fields)
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"rl.objective": "gspo", "rl.dual_clip": 3.0, "reward.overlong_buffer": 43},
        {"rl.objective": "cispo", "rl.clip_low": 1.0, "rl.kl_estimator": "k1+"},
        {"rl.importance": "sequence_mask", "rl.importance_cap": 2.0, **RECOMPUTED},
        {"rl.importance_cap": 2.0, "rl.importance_floor": 2.0, "variant": "causal"},
        {"rl.baseline": "batch", "rl.dynamic_sampling": True},
        {"rl.kl_estimator": "k1", "rl.kl_coef": 0.1, "rl.baseline": "leave_one_out"},
        {"stages": ("sft",), "rl.importance": "sequence_mask"},
    ],
    ids=str,
)
def test_what_goes_together_is_taken(fields):
    check(fields)
