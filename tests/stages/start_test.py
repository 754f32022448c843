"""What a run starts from: weights of another kind, or others than before, are refused."""

import contextlib
import json
import shutil

import jax
import jax.numpy as jnp
import pytest

from configs import evaluate, rl_alternating
from pr1_jax.huggingface import weights
from pr1_jax.stages import experiment
from pr1_jax.stages.run import Run
from pr1_jax.system import files
from pr1_jax.training.state import TrainState
from pr1_jax.workdir.checkpoint import Checkpoints, Position
from pr1_jax.workdir.folder import RefusedError

SMALL = {"model.num_layers": 1, "model.num_heads": 1, "model.width": 16}
SMALL |= {"model.num_kv_heads": 1, "model.mlp_width": 16}


def built(config, **fields):
    config.update_from_flattened_dict(SMALL | fields)
    return experiment.build(config.lock(), devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs `a` and `b` with other weights, and as folders `model_a` and `model_b`."""
    folder = tmp_path_factory.mktemp("runs")
    made = built(rl_alternating.get_config("smoke"))
    params = made.initial_params()
    for name, scale in (("a", 1.0), ("b", 2.0)):
        scaled = jax.tree.map(lambda x, scale=scale: scale * x, params)
        state = TrainState(jnp.int32(0), scaled, {})
        with contextlib.closing(Checkpoints(folder / name, about=made.about)) as kept:
            kept.save(Position(1, 4), state, {})
        weights.save_params(
            folder / f"model_{name}", scaled, made.model, made.tokenizer
        )
    return folder


def of_model(runs, tmp_path, **changed):
    """A model folder like the run's, its config.json changed."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in (runs / "model_a").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    given = json.loads((folder / "config.json").read_text())
    files.write_json(folder / "config.json", given | changed)
    return str(folder)


@pytest.mark.parametrize(
    "changed, named",
    [
        (
            {"rope_theta": 5e5},
            "model.rope_base: 10000.0 there, and 500000.0 here; give",
        ),
        (
            {"rms_norm_eps": 1e-5},
            "model.rms_eps: 1e-06 there, and 1e-05 here; give the",
        ),
    ],
)
def test_a_checkpoint_of_a_model_that_computes_something_else(
    runs, tmp_path, changed, named
):
    config, init = evaluate.get_config("smoke"), f"{runs}/a"
    path = of_model(runs, tmp_path, **changed)
    with pytest.raises(RefusedError, match=f"checkpoint.init={init} was .*{named}"):
        built(config, **{"checkpoint.init": init, "model.path": path})


def test_a_checkpoint_of_another_variant(runs):
    init = {"checkpoint.init": f"{runs}/a", "variant": "causal"}
    named = (
        "another variant: structured there, and causal here; set variant=structured,"
    )
    for stages in (("sft", "rl"), ("rl",), ()):
        with pytest.raises(RefusedError, match=named):
            built(rl_alternating.get_config("smoke"), stages=stages, **init)
    # These name the modes in which they decode.
    built(evaluate.get_config("smoke"), **init)
    built(rl_alternating.get_config("smoke"), stages=("coldstart",), **init)


@pytest.mark.parametrize(
    "field, first, second",
    [("checkpoint.init", "a", "b"), ("model.path", "model_a", "model_b")],
)
def test_a_workdir_goes_on_with_the_weights_that_it_began_with(
    runs, tmp_path, monkeypatch, field, first, second
):
    def begin(path):
        made = built(evaluate.get_config("smoke"), **{field: str(path)})
        with Run(made, tmp_path / "run"):
            pass

    begin(runs / first)
    before = (tmp_path / "run" / "config.json").read_bytes()
    named = rf"{field}={runs}/{second} .*{field}={runs}/{first} "
    with monkeypatch.context() as patch:
        patch.setattr(
            experiment.Experiment, "initial_params", lambda self: pytest.fail("late")
        )
        with pytest.raises(RefusedError, match=named):
            begin(runs / second)
    assert (tmp_path / "run" / "config.json").read_bytes() == before
    (runs / first).rename(runs / "moved")
    begin(runs / "moved")
    (runs / "moved").rename(runs / first)


def test_files_of_the_user_are_kept_and_compared(runs, tmp_path, caplog):
    """A template must stay what it is; a function may be mended, which the log says."""
    template, function = tmp_path / "mine.jinja", tmp_path / "mine.py"
    own = tmp_path / "run" / "own"

    def begin():
        fields = {"checkpoint.init": f"{runs}/a", "data.template": str(template)}
        fields["reward.verifier"] = f"{function}:verify"
        made = built(evaluate.get_config("smoke"), **fields)
        made.own.load()
        with Run(made, tmp_path / "run"):
            pass

    template.write_text("{{ question }}\n")
    function.write_text("verify = lambda record: True")
    for _ in range(2):
        begin()
        assert (own / "template.jinja").read_text() == template.read_text()
        assert (own / "verifier.py").read_text() == function.read_text()
    assert "another one" not in caplog.text and len([*own.iterdir()]) == 2
    function.write_text("verify = lambda record: False")
    begin()
    assert "the file of reward.verifier is another one than when" in caplog.text
    assert (own / "verifier.1.py").read_text() == "verify = lambda record: True"
    template.write_text("{{ question }}\nand more\n")
    before = {path: path.read_bytes() for path in own.iterdir()}
    with pytest.raises(RefusedError, match="data.template is .*, from line 2 on: put"):
        begin()
    assert {path: path.read_bytes() for path in own.iterdir()} == before


def test_first_weights_that_were_damaged_may_be_repaired(runs, tmp_path):
    """What could not be read is not what the run began with."""
    good, init = runs / "a", tmp_path / "init"

    def begin():
        shutil.copytree(good, init, dirs_exist_ok=True)
        if damaged:
            state = max((init / "checkpoints").iterdir()) / "state"
            part = max(state.rglob("d/*"), key=lambda path: path.stat().st_size)
            part.write_bytes(bytes(255 - x for x in part.read_bytes()))
        config = evaluate.get_config("smoke")
        with Run(built(config, **{"checkpoint.init": str(init)}), tmp_path / "run"):
            pass

    damaged = True
    with pytest.raises(RefusedError, match="is damaged"):
        begin()
    damaged = False
    begin()
    assert (tmp_path / "run" / "run.json").exists()
