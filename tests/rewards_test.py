"""Rewards, weights and schedules: the tables of docs/method.md, section 5."""

import doctest

import pytest

from pr1_jax import rewards, tags
from pr1_jax.rewards import REWARDS, SCHEDULES, reward, scheduled, weighted, weights

# correct, num_blocks, format_ok -> accuracy, parallel_and_accuracy, tiered
TABLE = [
    (True, 0, True, 1.0, -1.0, 1.0),
    (True, 0, False, 1.0, -1.0, 1.0),
    (True, 1, True, 1.0, 1.0, 1.2),
    (True, 1, False, 1.0, -1.0, -1.0),
    (False, 0, True, -1.0, -1.0, -1.0),
    (False, 1, True, -1.0, -1.0, -1.0),
]


@pytest.mark.parametrize("row", TABLE)
def test_rewards(row):
    correct, num_blocks, format_ok, *expected = row
    facts = {"correct": correct, "num_blocks": num_blocks, "format_ok": format_ok}
    for name, value in zip(REWARDS, expected, strict=True):
        got = reward(name, **facts)
        assert got == value, name
        assert type(got) is float
        assert weighted({name: 1.0}, **facts) == value
    mixed = dict(zip(REWARDS, (0.5, 0.0, 0.25)))
    assert weighted(mixed, **facts) == 0.5 * expected[0] + 0.25 * expected[2]


def _run(schedule: str, num_steps: int, **settings: int) -> str:
    """First letters of the rewards of steps 1 to `num_steps`."""
    return "".join(
        scheduled(schedule, step, **settings)[0] for step in range(1, num_steps + 1)
    )


def test_schedules():
    assert _run("accuracy", 30) == "a" * 30
    assert _run("alternating", 30) == ("a" * 8 + "tt") * 3
    assert _run("parallel_only", 30) == "t" * 30
    assert _run("parallel_and_accuracy", 30) == "p" * 30
    assert _run("scaffold", 230) == ("a" * 8 + "tt") * 20 + "a" * 30


def test_schedule_settings():
    assert _run("alternating", 7, window=3, tiered_steps=1) == "aataata"
    assert _run("alternating", 4, window=2, tiered_steps=2) == "tttt"
    assert _run("alternating", 4, window=2, tiered_steps=0) == "aaaa"
    assert _run("scaffold", 8, window=2, tiered_steps=1, scaffold_steps=5) == "atataaaa"


def test_schedules_of_the_paper_give_one_reward_all_the_weight():
    found = [weights(name, step) for name in SCHEDULES for step in (1, 9)]
    assert all(list(one.values()) == [1.0] for one in found)
    assert {name for one in found for name in one} == {*REWARDS}


def test_user_mistakes():
    given = {"correct": True, "num_blocks": 1, "format_ok": True}
    with pytest.raises(ValueError, match="reward is 'acc', expected one of .*tiered"):
        reward("acc", **given)
    with pytest.raises(ValueError, match="schedule is 's2', expected one of .*scaff"):
        weights("s2", 1)
    for step in (0, -3):
        with pytest.raises(ValueError, match=f"step is {step}, expected at least 1"):
            weights("accuracy", step)
    with pytest.raises(ValueError, match="tiered_steps is 11 and window is 10"):
        weights("alternating", 1, tiered_steps=11)
    with pytest.raises(ValueError, match="window is 0"):
        weights("alternating", 1, window=0, tiered_steps=0)


@pytest.mark.parametrize("module", [rewards, tags])
def test_worked_examples_hold(module):
    tried = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert tried.attempted >= 2 and tried.failed == 0
