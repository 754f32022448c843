"""An exported checkpoint is the checkpoint: weights, tokenizer, and as `model.path`."""

import logging
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import rl_alternating
from pr1_jax import export
from pr1_jax.chat import opening
from pr1_jax.data import tokenizer_files
from pr1_jax.data.prompts import Template
from pr1_jax.huggingface import usage, weights
from pr1_jax.huggingface.config import read_config
from pr1_jax.huggingface.weights import load_params
from pr1_jax.stages import curriculum, experiment
from pr1_jax.system import files
from pr1_jax.training.state import from_params
from pr1_jax.workdir.checkpoint import Position
from tests.helpers import small_run

REFERENCE = pathlib.Path(__file__).parents[1] / "helpers" / "data" / "hf_reference"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The workdir of a run with two checkpoints, and its experiment."""
    workdir = tmp_path_factory.mktemp("run")
    config, made = small_run.write(workdir, {Position(0, 12): 1, Position(1, 4): 2})
    written = config.to_dict()
    written["checkpoint"]["init"] = "/of/another/run"  # what the run itself began with
    files.write_json(workdir / "config.json", written)
    return workdir, made


def exported_params(folder, **settings):
    config = read_config(folder, **settings)
    return load_params(folder, config)


def assert_scaled(params, expected, scale, **tolerance):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, scale * b, rtol=1e-6, **tolerance),
        params,
        expected,
    )


@pytest.mark.parametrize(
    "settings, scale",
    [({}, 2), ({"number": 12}, 1), ({"max_shard_bytes": 100_000}, 2)],
)
def test_weights_of_the_checkpoint(run, tmp_path, settings, scale):
    workdir, made = run
    export.export(workdir, tmp_path / "out", **settings)
    params = exported_params(tmp_path / "out")
    assert_scaled(params, made.initial_params(), scale)
    parts = list((tmp_path / "out").glob("*.safetensors"))
    assert (len(parts) > 1) == ("max_shard_bytes" in settings)


def test_dtype_of_the_weights(run, tmp_path):
    workdir, made = run
    export.export(workdir, tmp_path / "out", dtype="bfloat16")
    params = exported_params(tmp_path / "out", param_dtype="bfloat16")
    assert params["embedding"].dtype == jnp.bfloat16
    expected = made.initial_params()["embedding"].astype(jnp.bfloat16)
    np.testing.assert_array_equal(params["embedding"], 2 * expected)


def float_dtypes(tree):
    return {
        x.dtype for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)
    }


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_of_16_bits_are_trained_in_float32(run, tmp_path, dtype):
    """Whatever activations are: a parameter moves at a small learning rate."""
    export.export(run[0], tmp_path / "out", dtype=dtype)
    config = rl_alternating.get_config("smoke")
    config.model.path, config.model.dtype = str(tmp_path / "out"), "bfloat16"
    config.rl.update(lr=1e-6, lr_schedule="constant")
    made = experiment.build(config)
    optimizer, _ = made.optimizer("rl")
    state = from_params(made.initial_params(), optimizer, made.mesh)
    assert float_dtypes(state) == {jnp.dtype("float32")}
    params = jax.device_get(state.params)
    gradients = jax.tree.map(lambda x: jnp.full_like(x, 1e-5), state.params)
    updates, _ = jax.jit(optimizer.update)(gradients, state.opt_state, state.params)
    moved = optax.apply_updates(params, jax.device_get(updates))
    same = [np.mean(a == b) for a, b in zip(*map(jax.tree.leaves, (params, moved)))]
    assert max(same) < 0.1  # some norm's scale may be so large that it stays


def test_a_template_of_the_user_goes_along(run, tmp_path, caplog):
    """From a run's own copies, wherever the user's files are by then."""
    workdir, out = shutil.copytree(run[0], tmp_path / "run"), tmp_path / "out"
    text = "{{ question | trim }} C 1{{ instruction | length }}\n"
    (workdir / "own").mkdir()
    (workdir / "own" / "template.jinja").write_text(text)
    (workdir / "own" / "instruction.txt").write_text("Think.")
    said = files.read_object(workdir / "config.json")
    said["data"] |= {"template": "/gone/a.jinja", "instruction": "/gone/told.txt"}
    files.write_json(workdir / "config.json", said)
    export.export(workdir, out)
    assert (out / usage.TEMPLATE_FILE).read_text() == text
    question = "Which number has a partner 4 larger? A 51 30 C 34"
    for folder in (workdir, out):
        asked = opening.load(folder)
        assert asked.tokenizer.decode(asked.prompt(question)) == f"{question} C 16"
        plain = opening.load(folder, template="plain")
        assert plain.tokenizer.decode(plain.prompt(question)) == question + "\n"
    trained = usage.read(out)
    usage.warn_of_other_use(out, trained.template, (" 1", " 2"))
    assert "trained with" not in caplog.text
    usage.warn_of_other_use(out, Template("plain"), (" 1", " 2"))
    named = f"--config.data.template={out / usage.TEMPLATE_FILE}"
    assert f"data.template=plain, but the model in {out}" in caplog.text
    assert named in caplog.text
    assert "data.instruction=, but the model in" in caplog.text
    assert "was trained with 'Think.'" in caplog.text
    (out / usage.TEMPLATE_FILE).unlink()
    with pytest.raises(
        ValueError, match=f"{usage.FILE}: data.template=.*: No such fil"
    ):
        usage.read(out)


def test_serves_as_the_model_of_another_run(run, tmp_path, caplog):
    workdir, made = run
    out = tmp_path / "out"
    export.export(workdir, out)
    assert tokenizer_files.load(out).tag_ids == made.tokenizer.tag_ids
    config = rl_alternating.get_config("smoke")
    config.model.path = str(out)
    config.data.template = "instruction"
    again = experiment.build(config)
    with caplog.at_level(logging.WARNING, logger="absl"):
        again.check_weights()
    assert f"{out} was trained with --config.data.template=plain" in caplog.text
    assert "path_labels" not in caplog.text
    said = files.read_object(out / usage.FILE)
    said["sampling"]["path_labels"] = [" 1", " 2"]
    files.write_json(out / usage.FILE, said)
    usage.warn_of_other_use(out, Template("plain"), (" 1", " 2"))
    assert "path_labels" not in caplog.text
    usage.warn_of_other_use(out, Template("plain"), ())
    assert "rollout.path_labels=(), but the model in" in caplog.text
    assert "trained with --config.rollout.path_labels=(' 1', ' 2')" in caplog.text
    assert again.vocab == made.vocab
    assert not again.tokenizer.new_tags  # so that their rows stay as they are
    assert_scaled(again.initial_params(), made.initial_params(), 2)


def test_several_eos_ids_stay_from_folder_to_folder(run, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    export.export(run[0], first)
    written = files.read_json(first / "generation_config.json", {})
    assert written["eos_token_id"] == 1  # one id is no list
    files.write_json(first / "generation_config.json", {"eos_token_id": [5, 1]})
    config = rl_alternating.get_config("smoke")
    config.model.path = str(first)
    made = experiment.build(config)
    assert made.vocab.eos_ids == (5, 1)
    assert made.policy(sampling=True).special_ids == made.vocab.special_ids
    assert made.about["eos"] == [5, 1]
    weights.save_params(second, made.initial_params(), made.model, made.tokenizer)
    for name in ("config.json", "generation_config.json"):
        assert files.read_json(second / name, {})["eos_token_id"] == [5, 1]
    asked = opening.load(second)
    assert asked._sampler.vocab.eos_ids == (5, 1)


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "pr1_jax.export", *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_what_is_wrong_is_one_line_and_writes_nothing(run, tmp_path):
    workdir, _ = run
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("")
    out = tmp_path / "out"
    cases = {
        f"{full} exists": (f"--workdir={workdir}", f"--out={full}"),
        "checkpoint=7 is not in": (
            *(f"--workdir={workdir}", f"--out={out}", "--checkpoint=7"),
        ),
        "no config.json": (f"--workdir={tmp_path}", f"--out={out}"),
        "--workdir is missing": (f"--out={out}",),
        "value should be one of": ("--dtype=int8",),
    }
    for words, arguments in cases.items():
        done = command(*arguments)
        assert done.returncode == 2, done.stderr
        assert words in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]
    assert [path.name for path in full.iterdir()] == ["mine.txt"]


def test_a_damaged_folder_stops_a_run_before_it_begins(run, tmp_path):
    workdir, made = run
    good, damaged, other = (tmp_path / name for name in ("good", "damaged", "other"))
    export.export(workdir, good)
    config = rl_alternating.get_config("smoke")

    def prepare(folder):
        config.model.path = str(folder)
        curriculum.prepare(config)

    prepare(good)
    shutil.copytree(good, damaged)
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=f"{weights} is truncated or damaged"):
        prepare(damaged)
    shutil.copytree(REFERENCE / "qwen3", other)
    made.tokenizer.save(other)
    too_many = f"the tokenizer has {made.tokenizer.vocab_size} tokens, .* 32"
    with pytest.raises(ValueError, match=too_many):
        prepare(other)
    (other / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(ValueError, match="model_type='mamba' is not of"):
        prepare(other)
