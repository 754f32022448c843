"""Runs with adapters: the laws hold, they resume, and what they leave can be used."""

import functools
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
from pr1_jax.stages import checks, curriculum, evaluation, experiment, policies
from pr1_jax.workdir import checkpoint, metrics
from pr1_jax.workdir.folder import RefusedError
from tests.helpers import small_run

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
    config.eval.problems, config.eval.banned = 2, False
    config.update(fields)
    return config


def run(config, workdir):
    made = experiment.build(config, devices=jax.devices()[:1])
    curriculum.run(made, evaluation.problems(made), workdir)
    return made


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of each variant from the weights of another run: its folder and experiment."""
    folder, found = tmp_path_factory.mktemp("runs"), {}
    for variant in CONFIGS:
        config = tiny(variant)
        found[variant] = folder / variant, run(config, folder / variant)
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
    """From the first step of RL, with the frozen weights made anew."""
    workdir, made = finished["structured"]
    again = tmp_path / "again"
    shutil.copytree(workdir, again)
    shutil.rmtree(again / "checkpoints" / f"{checkpoint.STAGE_SIZE + STEPS:08d}")
    (again / "summary.json").unlink()
    run(tiny(), again)
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
        run(tiny(), again)


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


def test_adapters_on_the_weights_of_another_run(finished, tmp_path):
    """Of a run with all weights; those of a run with adapters are not enough."""
    workdir, _ = finished["structured"]
    base, _ = small_run.write(tmp_path / "base", {checkpoint.Position(0, 12): 2})
    config = rl_alternating.get_config("smoke")
    config.model.lora_rank = 2
    config.checkpoint.init = str(tmp_path / "base")
    made = experiment.build(config, devices=jax.devices()[:1])
    frozen, about = policies.read_frozen(made)
    drawn = experiment.build(base, devices=jax.devices()[:1]).initial_params()
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
    jax.tree.map(lambda x, y: close(x, 2 * y), frozen.params, drawn)
    assert about[checkpoint.FROZEN] != adapters.checksum(drawn)
    config = tiny()
    config.checkpoint.init = str(workdir)
    with pytest.raises(RefusedError, match="holds adapters alone: .*pr1_jax.export"):
        experiment.build(config, devices=jax.devices()[:1])


def test_frozen_weights_are_kept_in_the_dtype_of_activations():
    config = tiny()
    config.model.dtype = "bfloat16"
    made = experiment.build(config, devices=jax.devices()[:1])
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


def test_a_run_without_adapters_has_none_to_write(tmp_path):
    small_run.write(tmp_path / "run", {checkpoint.Position(0, 12): 1})
    with pytest.raises(ValueError, match="has no adapters"):
        export.export(tmp_path / "run", tmp_path / "out", apart=True)
