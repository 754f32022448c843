"""Runs with adapters: the laws hold, they resume, and what they leave can be used."""

import contextlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from configs import rl_alternating, rl_easy
from pr1_jax import export
from pr1_jax.chat import opening
from pr1_jax.model import adapters
from pr1_jax.model.params import param_count
from pr1_jax.stages import checks, experiment, policies, rl, sft
from pr1_jax.stages.run import Run
from pr1_jax.system import files
from pr1_jax.training.state import from_params
from pr1_jax.workdir import checkpoint, metrics
from pr1_jax.workdir.folder import RefusedError

CONFIGS = {"structured": rl_alternating, "causal": rl_easy}
STEPS = 2


def tiny(variant="structured", **fields):
    """A config with few compilations; SFT moves all adapters, so that RL's are not 0."""
    config = CONFIGS[variant].get_config("smoke")
    config.model.update(num_layers=1, num_heads=1, width=16, mlp_width=16)
    config.model.update(lora_rank=2, length_buckets=())
    config.sft.steps, config.rl.steps, config.rl.kl_coef = STEPS, STEPS, 0.1
    config.sft.lr = config.rl.lr = 0.1
    config.checkpoint.every_steps = 1
    config.rollout.lane_buckets, config.rollout.rows = (), 8
    config.update(fields)
    return config


def build(config):
    return experiment.build(config, devices=jax.devices()[:1])


def run(made, workdir):
    """The stages alone: what is evaluated is what is sampled."""
    stages = {"sft": sft, "rl": rl}
    files.write_json(workdir / "config.json", made.config.to_dict())
    with Run(made, workdir) as current:
        begin = 0 if current.position is None else current.position.stage
        for i, stage in enumerate(made.config.stages):
            if i >= begin:
                stages[stage].run_stage(made, current, i)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of each variant: its folder and experiment."""
    folder, found = tmp_path_factory.mktemp("runs"), {}
    for variant in CONFIGS:
        workdir, made = folder / variant, build(tiny(variant))
        workdir.mkdir()
        run(made, workdir)
        found[variant] = workdir, made
    return found


def steps(workdir):
    lines = metrics.read_metrics(workdir / "metrics.jsonl")
    return [line for line in lines if line["stage"] == "rl"]


@pytest.mark.parametrize("variant", CONFIGS)
def test_the_sampler_and_the_trainer_agree_at_every_step(finished, variant):
    workdir, _ = finished[variant]
    found = steps(workdir)
    assert [line["step"] for line in found] == [1, 2]
    for line in found:
        assert 0 < line["rollout/logp_gap_max"] < 1e-4
        assert line["policy/ratio_max_error"] < 1e-4


def test_checkpoints_hold_adapters_alone(finished):
    workdir, made = finished["structured"]
    abstract = made.abstract_trained()
    assert param_count(abstract) < param_count(made.abstract_params()) / 10
    checkpoint.check_params(workdir, abstract, about=made.about)
    with pytest.raises(RefusedError, match="parameter .'embedding'. has shape None"):
        checkpoint.check_params(workdir, made.abstract_params())
    reference = workdir / "checkpoints_reference"
    kept = checkpoint.kept_tree(reference, None, abstract)
    moved = np.abs(
        kept["layer_0"]["q"]["b"]
    )  # as SFT left them: the policy of RL's start
    assert moved.max() > 0.01


def test_a_run_goes_on_bit_for_bit(finished, tmp_path):
    """From the first step of RL, with frozen weights made anew."""
    workdir, made = finished["structured"]
    again = tmp_path / "again"
    shutil.copytree(workdir, again)
    shutil.rmtree(again / "checkpoints" / f"{checkpoint.STAGE_SIZE + STEPS:08d}")
    run(made, again)
    read = lambda folder: policies.read_adapters(made, folder, field="--workdir")[1]
    jax.tree.map(np.testing.assert_array_equal, read(again), read(workdir))
    names = ("loss/grpo", "policy/ref_kl", "rollout/logp_gap_max")
    figures = lambda folder: [[x[n] for n in names] for x in steps(folder)]
    assert figures(again) == figures(workdir)


def test_other_frozen_weights_are_refused(finished, tmp_path, monkeypatch):
    workdir, made = finished["structured"]
    first = made.initial_params()
    changed = first | {"embedding": first["embedding"].at[3, 3].add(1e-6)}
    monkeypatch.setattr(experiment.Experiment, "initial_params", lambda self: changed)
    with pytest.raises(RefusedError, match="another frozen weights: .* on$"):
        policies.read(made, workdir, field="--workdir")
    again = tmp_path / "again"
    shutil.copytree(workdir, again)
    with pytest.raises(RefusedError, match="another frozen weights"):
        run(build(tiny()), again)


def test_an_exported_run_is_its_policy(finished, tmp_path):
    """Merged as a folder, as a chat opens the run, and as adapters for peft."""
    workdir, made = finished["structured"]
    frozen, trained = policies.read_adapters(made, workdir, field="--workdir")
    expected = adapters.merge_all(frozen.with_adapters(trained))
    assert np.abs(expected["embedding"] - frozen.params["embedding"]).max() > 0.01
    export.export(workdir, tmp_path / "merged")
    opened = opening.load(tmp_path / "merged")
    of_run = opening.load(workdir)
    for chat in (opened, of_run):
        jax.tree.map(np.testing.assert_array_equal, chat.params, expected)
    export.export(workdir, tmp_path / "apart", apart=True)
    file = tmp_path / "apart" / "adapter_model.safetensors"
    arrays = safetensors.numpy.load_file(file)
    assert len(arrays) == 2 * 7 + 1
    assert (tmp_path / "apart" / "tokenizer.json").exists()


def test_adapters_on_the_weights_of_another_run(tmp_path):
    """And of a run with all weights no adapters can be written."""
    config, base = tiny(), tmp_path / "base"
    config.model.lora_rank = 0
    of_base = build(config)
    drawn = of_base.initial_params()
    optimizer, _ = of_base.optimizer("rl")
    state = from_params(jax.tree.map(lambda x: 2 * x, drawn), optimizer, of_base.mesh)
    checkpoints = checkpoint.Checkpoints(base, about=of_base.about)
    with contextlib.closing(checkpoints):
        checkpoints.save(checkpoint.Position(0, 12), state, {})
    files.write_json(base / "config.json", config.to_dict())
    config.model.lora_rank, config.checkpoint.init = 2, str(base)
    frozen, about = policies.read_frozen(build(config))
    jax.tree.map(np.testing.assert_array_equal, frozen.params, state.params)
    assert about[checkpoint.FROZEN] == adapters.checksum(frozen.params)
    assert about[checkpoint.FROZEN] != adapters.checksum(drawn)
    with pytest.raises(ValueError, match="has no adapters"):
        export.export(base, tmp_path / "out", apart=True)


@pytest.mark.parametrize("rank", [0, 3])
def test_a_run_with_adapters_is_begun_with_merged(finished, rank):
    workdir, before = finished["structured"]
    config = tiny()
    config.model.lora_rank, config.checkpoint.init = rank, str(workdir)
    made = build(config)
    frozen, trained = policies.read_adapters(before, workdir, field="--workdir")
    expected = adapters.merge_all(frozen.with_adapters(trained))
    jax.tree.map(np.testing.assert_array_equal, made.initial_params(), expected)
    assert made.origin.number == checkpoint.STAGE_SIZE + STEPS
    config.model.scan_layers = True
    with pytest.raises(ValueError, match="model.scan_layers=True, and the run"):
        build(config)


def test_frozen_weights_are_kept_in_the_dtype_of_activations():
    config = tiny()
    config.model.dtype = "bfloat16"
    made = build(config)
    frozen, trained = made.abstract_frozen(), made.abstract_trained()
    assert {x.dtype for x in jax.tree.leaves(frozen)} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(trained)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora_rank": -1}, "model.lora_rank=-1 must not be negative"),
        ({"lora_alpha": 0.0}, "model.lora_alpha=0.0 must be positive"),
        (
            {"lora_targets": ("q", "tags")},
            r"model.lora_targets=\('q', 'tags'\) may hold",
        ),
        ({"lora_targets": ("tags",)}, "names no projection"),
    ],
)
def test_wrong_fields_are_named(fields, message):
    config = tiny()
    config.model.update(fields)
    with pytest.raises(ValueError, match=message):
        checks.check(config, devices=jax.devices()[:1])
