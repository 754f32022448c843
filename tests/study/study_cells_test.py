"""The cells of the study: what they change, what they cost, what they start from."""

import pytest
from absl import flags
from ml_collections import config_flags

from pr1_jax.data import tasks
from pr1_jax.stages import checks, rl
from pr1_jax.study import cells, optimum, runner
from tests.helpers.command import ROOT

PAY = cells.PAY


def config_of(study, cell, seed=0):
    """The config that `pr1_jax.main` would get; where it starts from is left out."""
    command = [x for x in study.command(cell, seed) if "checkpoint.init" not in x]
    argv = ["main", *(x for x in command if x.startswith("--config"))]
    values = flags.FlagValues()
    flag = config_flags.DEFINE_config_file(
        "config", None, lock_config=True, flag_values=values, sys_argv=argv
    )
    values(argv)
    return flag.value


@pytest.mark.parametrize("size", cells.SIZES)
def test_all_cells_are_valid_configs_on_the_same_problems(size, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    study = runner.Study(tmp_path, size=size)
    steps, asked = {}, {}
    for cell in cells.CELLS.values():
        config = config_of(study, cell, seed=7)
        checks.check(config)
        assert (config.seed, config.data.seed) == (7, 7)
        assert "embedded:hard" in config.data.eval
        assert config.eval.problems == cells.COMMON["eval.problems"]
        assert config.rollout.max_sequential_steps == cell.deadline
        assert len(config.rollout.path_labels) == cell.labels * cell.paths
        task = tasks.make(config.data.task)
        assert config.rollout.num_paths == task.paths == cell.paths
        assert config.rollout.planned == bool(task.planned) == cell.planned
        first = task.records("hard", "eval", seed=0)[0]["question"]
        assert asked.setdefault(cell.paths, first) == first
        if cell.kind == "evaluate":
            continue
        assert tuple(config.stages) == (cell.kind,)
        if cell.kind == "rl":
            assert config.rl.clip_high == 0.28
            steps[cell.name] = config.rl.steps
        else:
            share = 0.0 if cell.name == "sft_sequential" else 0.5
            assert task.block_share == share
    for name, cell in cells.CELLS.items():  # as many steps for all that are compared
        reward, _, labels = name.rpartition(f"_{cell.deadline}_")
        if reward in cells.REWARDS and labels in cells.LABELS:
            begun = cells.named("accuracy", cell.deadline, labels)
            assert steps[name] == steps[begun]


def test_cells_differ_by_what_they_are_named_for(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = lambda name: config_of(runner.Study(tmp_path), cells.CELLS[name])
    for name, reward in cells.REWARDS.items():
        c = config(f"{name}_{PAY}_labels")
        weights = [rl.reward_weights(c, step) for step in range(1, 101)]
        assert sum("tiered" in of_step for of_step in weights) == 100 * reward.share
        assert bool(c.reward.latency_coef) == (name == "latency")
    assert config("forced").rl.train_on_forced
    assert config("causal_sampling").rollout.shortcut == "causal_after_block"
    assert config(f"sequential_{PAY}").rollout.max_blocks == 0
    assert config(f"causal_with_easy_{PAY}").variant == "causal"
    assert config(f"causal_easy_{PAY}").data.rl == "embedded:easy"
    assert tasks.make(config("sft_late").data.task).late_share == 0.5


def test_blocks_have_the_room_that_the_optimum_counts_on(tmp_path, monkeypatch):
    """Reserves and path budgets take nothing from a search, at any deadline."""
    monkeypatch.chdir(ROOT)
    for cell in cells.CELLS.values():
        if cell.kind != "rl" or not cell.deadline:
            continue
        config = config_of(runner.Study(tmp_path), cell)
        c = config.rollout
        labels = int(cell.labels)
        if cell.planned:
            assert (c.num_paths, c.min_plan_tokens, c.max_path_tokens) == (4, 3, 0)
            assert c.max_response_tokens == 96 and c.max_plan_tokens >= 3
            assert checks.decode_settings(config).may_open_blocks
            continue
        reach = optimum.path_reach(cell.deadline, cell.paths, label_tokens=labels)
        # <Parallel>, </Parallel> and what follows; both tags of a path, and its label.
        left = cell.deadline - 1 - 3 - c.summary_reserve - c.answer_reserve
        assert left >= c.min_path_tokens
        path = min(left, c.max_path_tokens) - 2 - labels
        assert optimum.reach(path, cell.paths) == reach
        assert c.max_path_tokens * cell.paths + 10 <= c.max_response_tokens


def test_cells_start_from_cells_that_are_run_before_at_as_many_seeds():
    everything = [name for members in cells.MEMBERS.values() for name in members]
    order = [cell.name for cell in cells.with_starts(everything)]
    assert {*order} == {*cells.CELLS} and len({*order}) == len(order)
    for i, name in enumerate(order):
        cell = cells.CELLS[name]
        if cell.start:
            assert cell.start in order[:i]
            assert cells.CELLS[cell.start].seeds >= cell.seeds
