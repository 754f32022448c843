"""Run folders of older versions open and resume; what became of each field is said."""

import json
import pathlib
import shlex

import pytest

from configs import evaluate, grpo_sequential, rl_alternating
from pr1_jax import defaults
from pr1_jax.system import files
from pr1_jax.workdir import old_fields
from pr1_jax.workdir.folder import open_workdir, read_config
from tests.helpers import command, search_task

# `rl_alternating.py:smoke` as it was when a config had 118 fields.
OLD = json.loads((pathlib.Path(__file__).parent / "old_config.json").read_text())
SMOKE = "configs/rl_alternating.py:smoke"
NEW = search_task.put(rl_alternating.get_config("smoke")).lock()


def write(folder, **changes):
    """The old config in a folder, with some fields changed: `rl__steps` is rl.steps."""
    config = json.loads(json.dumps(OLD))
    for name, value in changes.items():
        group, _, leaf = name.rpartition("__")
        (config[group] if group else config)[leaf] = value
    files.write_json(folder / "config.json", config)
    return folder


def test_a_run_of_an_older_version_resumes_and_opens(tmp_path):
    assert len(defaults.flat(OLD)) == 118  # eval.benchmarks held none
    open_workdir(write(tmp_path), NEW)
    assert files.plain(read_config(tmp_path).to_dict()) == files.plain(NEW.to_dict())


def test_a_run_from_before_bos_goes_on_with_todays(tmp_path, caplog):
    """Its prompts had none, which is what opens it; a run without a folder has none."""
    mine = NEW.copy_and_resolve_references()
    mine.model.path = "a/model"
    open_workdir(write(tmp_path, model__path="a/model"), mine)
    assert "did as data.bos='no' does; it goes on with 'auto'" in caplog.text
    assert read_config(tmp_path).data.bos == "no"
    files.write_json(tmp_path / "config.json", mine.to_dict())
    mine.data.bos = "yes"
    with pytest.raises(ValueError, match="data.bos='yes', but the run .* has 'auto'"):
        open_workdir(tmp_path, mine)


def test_a_run_of_other_defaults_goes_on_by_the_flags_that_are_named(tmp_path):
    """The embedded task was another one: its values are to be given, all of them."""
    config = rl_alternating.get_config("smoke")
    differs = f"data.sft='embedded:hard', but the run in {tmp_path} has 'embedded:ea"
    with pytest.raises(ValueError, match=differs) as refused:
        open_workdir(write(tmp_path), config)
    _, _, given = str(refused.value).partition(" or go on as it was begun, with ")
    config = command.config_of(SMOKE, *shlex.split(given))
    open_workdir(tmp_path, config)
    assert {name.split("=")[0] for name in given.split(" --config.")[1:]} <= {
        *search_task.FIELDS
    }
    for other in (grpo_sequential.get_config("smoke"), evaluate.get_config("smoke")):
        with pytest.raises(ValueError, match="take another --workdir$"):
            open_workdir(tmp_path, other)


TWO = {name: {"source": f"embedded:{name}", "samples": 4} for name in ("hard", "easy")}
MINE = {"mine": {"source": "/m.jsonl", "samples": 2}}


@pytest.mark.parametrize(
    "get_config, old, new",
    [
        (
            rl_alternating.get_config,
            {"model__kernels": "xla", "rollout__kernels": "xla"},
            {"kernels": "xla"},
        ),
        (
            rl_alternating.get_config,
            {"data__late_share": 0.5, "data__block_share": 0.25},
            {"data.task": "search:block_share=0.25,late_share=0.5"},
        ),
        (
            grpo_sequential.get_config,
            {"name": "grpo_sequential", "data__block_share": 0.0, "rl__clip_high": 0.2}
            | {"reward__schedule": "accuracy", "rollout__max_blocks": 0},
            {"data.task": "search:block_share=0.0"},
        ),
        (
            evaluate.get_config,
            {"name": "evaluate", "stages": ["benchmark"], "rl__clip_high": 0.2}
            | {"eval__benchmarks": TWO},
            {},
        ),
        (
            rl_alternating.get_config,
            {"stages": ["rl", "benchmark"], "eval__benchmarks": MINE},
            {"data.eval": "held_out=embedded:hard,mine=/m.jsonl@2"}
            | {"stages": ("rl", "benchmark")},
        ),
        (  # without effect then, and refused now
            rl_alternating.get_config,
            {"rl__importance_cap": 2.0},
            {},
        ),
        (
            rl_alternating.get_config,
            {"variant": "causal", "rl__importance_cap": 2.0},
            {"variant": "causal", "rl.importance_cap": 2.0},
        ),
        (  # what only concerns the machine and what is shown
            rl_alternating.get_config,
            {"report__every_sec": 5.0, "alarms__min_entropy": 0.5},
            {},
        ),
    ],
    ids=[
        "kernels",
        "task",
        "sequential",
        "benchmarks",
        "both",
        "cap",
        "ratio",
        "shown",
    ],
)
def test_fields_are_those_of_today(tmp_path, get_config, old, new):
    config = search_task.put(get_config("smoke"))
    config.update_from_flattened_dict(new)
    open_workdir(write(tmp_path, **old), config)
    plain = lambda c: {
        name: value
        for name, value in defaults.flat(files.plain(c.to_dict())).items()
        if not name.startswith("alarms.")
    }
    assert plain(read_config(tmp_path)) == plain(config)


@pytest.mark.parametrize("name", old_fields.CONSTANT)
def test_another_value_of_what_is_a_constant_now_is_refused(tmp_path, name):
    old = not old_fields.CONSTANT[name] if name.endswith("illegal") else 7
    write(tmp_path, **{name.replace(".", "__"): old})
    with pytest.raises(ValueError, match=f"older version: {name}={old} is no field"):
        open_workdir(tmp_path, NEW)
    if name.startswith("model."):  # parameters would mean something else
        with pytest.raises(ValueError, match=f"older version: {name}={old}"):
            read_config(tmp_path)
    else:
        assert read_config(tmp_path).name == "rl_alternating"


def test_two_kernels_are_not_made_one(tmp_path):
    write(tmp_path, rollout__kernels="xla")
    with pytest.raises(ValueError, match="'rollout.kernels': 'xla'} are one field now"):
        open_workdir(tmp_path, NEW)
    assert read_config(tmp_path).kernels == "xla"


def test_constants_are_what_they_are_where_they_are_used():
    from pr1_jax.stages import evaluation, experiment, rl
    from pr1_jax.training.optimizer import OptimizerSettings

    optimizer = OptimizerSettings(lr=1.0, steps=1)
    made = experiment.build(NEW)
    assert old_fields.CONSTANT == {
        "model.param_dtype": made.model.param_dtype,
        "model.rope_base": made.model.rope_base,
        "data.eval_seed": evaluation._SEED,
        "rollout.ban_illegal": made.settings.ban_illegal,
        "rollout.refill_share": 0.0625,
        "rl.dynamic_sampling_rounds": rl.ROUNDS,
        "optimizer.b1": optimizer.b1,
        "optimizer.b2": optimizer.b2,
        "optimizer.eps": optimizer.eps,
    }


def test_every_old_field_has_a_hint_and_no_field_of_today_has():
    for name in {*defaults.flat(OLD), "eval.benchmarks.x.samples"}:
        gone = name not in defaults.flat(NEW.to_dict())
        assert bool(old_fields.hint(name)) == gone, name
