"""What is saved comes back, with the position in the data; and what cannot is said."""

import contextlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pr1_jax.data import sources, streams, tasks
from pr1_jax.training.state import TrainState
from pr1_jax.workdir import checkpoint
from pr1_jax.workdir.checkpoint import Checkpoints, DamagedError, Position
from pr1_jax.workdir.folder import RefusedError

PARAMS = {
    "embedding": jnp.arange(12.0).reshape(4, 3),
    "layer": {"kernel": jnp.full((3, 2), 0.1, jnp.bfloat16), "norm": jnp.ones(3)},
}


def made_state(seed=0, params=PARAMS):
    """A training state: parameters, moments and a counter, of different types."""
    noisy = lambda x: x + jax.random.normal(jax.random.key(seed), x.shape, x.dtype)
    params = jax.tree.map(noisy, params)
    return TrainState(jnp.int32(seed + 7), params, {"mu": jax.tree.map(noisy, params)})


def abstract(tree):
    """Shapes, dtypes and shardings of a tree."""
    tree = jax.tree.map(jnp.asarray, tree)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
    )


def assert_same(got, expected):
    def same(a, b):
        assert jnp.asarray(a).dtype == jnp.asarray(b).dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))

    jax.tree.map(same, got, expected)


def problems(source=None, **settings):
    return streams.problem_stream(
        source or sources.open_source("embedded:hard", "train", seed=0),
        tasks.make().tokenizer(),
        template="plain",
        max_prompt_tokens=28,
        batch_size=7,
        seed=5,
        **settings,
    )


def opened(folder, **settings):
    """Checkpoints, closed at the end: saving goes on in the background until then."""
    return contextlib.closing(Checkpoints(folder, **settings))


def saved(folder, *positions):
    """A workdir with checkpoints; the state is numbered by its place among them."""
    with opened(folder, keep=2) as checkpoints:
        for i, position in enumerate(positions):
            checkpoints.save(position, made_state(i), problems().get_state())
    return folder


def names(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_state_and_position_in_shuffled_data_with_drops_come_back(tmp_path):
    records = sources.open_source("embedded:hard", "train", seed=0)
    records = [records[i] for i in range(30)]
    records[3] = {"question": " 1" * 40, "answer": "1"}  # too long: dropped
    made = lambda: problems(records, shuffle=True)
    questions = lambda: [[p.question for p in next(stream)] for _ in range(6)]
    stream = made()
    before = questions()  # into the second epoch
    with opened(tmp_path) as checkpoints:
        assert checkpoints.latest() is None
        checkpoints.save(Position(1, 6), made_state(), stream.get_state())
        after, counts = questions(), dict(stream.counts)
    assert after != before and counts["prompt_too_long"] >= 2
    with opened(tmp_path) as checkpoints:
        assert checkpoints.latest() == Position(1, 6)
        state, position = checkpoints.restore(Position(1, 6), abstract(made_state()))
    assert_same(state, made_state())
    stream = made()
    stream.set_state(position)
    assert (questions(), dict(stream.counts)) == (after, counts)


def test_only_the_newest_are_kept_the_furthest_along_the_curriculum(tmp_path):
    saved(tmp_path, Position(0, 8), Position(0, 300), Position(1, 2), Position(1, 6))
    assert names(tmp_path) == ["01000002", "01000006"]
    with opened(tmp_path) as checkpoints:
        assert checkpoints.latest() == Position(stage=1, step=6)
        state, _ = checkpoints.restore(Position(1, 2), abstract(made_state()))
    assert_same(state, made_state(2))


@pytest.mark.parametrize("name", ["", "checkpoints"])
def test_params_alone_of_another_run_are_placed_as_asked(tmp_path, name):
    saved(tmp_path, Position(0, 2), Position(1, 2))
    mesh = jax.make_mesh((2,), ("fsdp",), devices=jax.devices()[:2])
    spec = jax.sharding.PartitionSpec("fsdp")
    wanted = abstract(PARAMS)
    wanted["embedding"] = jax.ShapeDtypeStruct(
        (4, 3), jnp.float32, sharding=jax.sharding.NamedSharding(mesh, spec)
    )
    params = checkpoint.restore_params(tmp_path / name, wanted)
    assert params["embedding"].sharding.spec == spec
    assert_same(params, made_state(1).params)


def test_no_checkpoints_to_start_from(tmp_path):
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"checkpoint.init={path}"):
            checkpoint.restore_params(path, abstract(PARAMS))
    assert not list(tmp_path.iterdir())  # nothing is made on the way
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(FileNotFoundError, match="no checkpoint in "):
        checkpoint.restore_params(tmp_path, abstract(PARAMS))


OTHER_SHAPE = PARAMS | {"embedding": jnp.zeros((5, 3))}
ONE_MORE = PARAMS | {"head": jnp.zeros((4, 3))}
ONE_LESS = PARAMS | {"layer": {"norm": jnp.ones(3)}}


@pytest.mark.parametrize(
    "wanted, named",
    [
        (OTHER_SHAPE, r"\['embedding'\] has shape \(4, 3\) there and \(5, 3\) here"),
        (ONE_MORE, r"\['head'\] has shape None there and \(4, 3\) here"),
        (ONE_LESS, r"\['layer'\]\['kernel'\] has shape \(3, 2\) there and None here"),
    ],
)
def test_checkpoint_of_another_model(tmp_path, wanted, named):
    saved(tmp_path, Position(0, 2))
    with pytest.raises(ValueError, match=named) as error:
        checkpoint.restore_params(tmp_path, abstract(wanted))
    assert f"checkpoint.init={tmp_path}" in str(error.value)


BEST = {"keep_best": 1, "best_metric": "rollout/accuracy"}


def test_the_best_are_kept_beside_the_newest(tmp_path):
    with opened(tmp_path, keep=1, **BEST) as checkpoints:
        for step, accuracy in enumerate((0.1, 0.7, 0.3, None, 0.5)):
            found = {} if accuracy is None else {"rollout/accuracy": accuracy}
            checkpoints.save(Position(1, step), made_state(step), {}, found)
    assert names(tmp_path) == ["01000001", "01000004"]


@pytest.mark.parametrize("part", ["state", "data", "about"])
@pytest.mark.parametrize("how", ["emptied", "garbled", "gone"])
def test_a_damaged_checkpoint_is_named_and_set_aside(tmp_path, part, how):
    saved(tmp_path, Position(0, 2), Position(0, 4))
    folder = tmp_path / "checkpoints" / "00000004"
    for path in sorted((folder / part).rglob("*")):
        if path.is_file():
            data = path.read_bytes()
            half = len(data) // 2
            garbled = data[:half] + bytes(255 - x for x in data[half:])
            path.write_bytes({"garbled": garbled}.get(how, b""))
            if how == "gone":
                path.unlink()
    with opened(tmp_path) as checkpoints:
        with pytest.raises(DamagedError, match=str(folder)):
            checkpoints.restore(Position(0, 4), abstract(made_state()))
        aside = checkpoints.set_aside(Position(0, 4))
        assert aside.is_dir() and not folder.exists()
        assert checkpoints.latest() == Position(0, 2)
        state, _ = checkpoints.restore(Position(0, 2), abstract(made_state()))
    assert_same(state, made_state(0))


def test_a_damaged_checkpoint_to_start_from_is_named(tmp_path):
    saved(tmp_path, Position(0, 4))
    state = tmp_path / "checkpoints" / "00000004" / "state"
    part = max(state.rglob("d/*"), key=lambda path: path.stat().st_size)
    part.write_bytes(bytes(255 - x for x in part.read_bytes()))
    named = f"checkpoint.init={tmp_path}: checkpoint 4 is damaged; name another, or "
    with pytest.raises(ValueError, match=named):
        checkpoint.restore_params(tmp_path, abstract(PARAMS))


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b"[]"])
def test_what_a_damaged_checkpoint_goes_with_is_named(tmp_path, text):
    saved(tmp_path, Position(0, 4))
    (tmp_path / "checkpoints/00000004/about/metadata").write_bytes(text)
    named = f"checkpoint.init={tmp_path}: checkpoint 4 is damaged; name another, or "
    with pytest.raises(RefusedError, match=named):
        checkpoint.check_params(tmp_path, abstract(PARAMS), about={"variant": "x"})
    with opened(tmp_path) as checkpoints, pytest.raises(DamagedError):
        checkpoints.restore(Position(0, 4), abstract(made_state()))


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b"[]"])
def test_damaged_metrics_cost_no_checkpoint(tmp_path, text):
    with opened(tmp_path, **BEST) as checkpoints:
        checkpoints.save(Position(0, 4), made_state(), {}, {"rollout/accuracy": 0.5})
    (tmp_path / "checkpoints/00000004/metrics/metrics").write_bytes(text)
    for _ in range(2):
        with opened(tmp_path, **BEST) as checkpoints:
            assert checkpoints.latest() == Position(0, 4)
    state, _ = checkpoints.restore(Position(0, 4), abstract(made_state()))
    assert_same(state, made_state())


@pytest.mark.parametrize("lost", ["_CHECKPOINT_METADATA", "state", "metrics"])
def test_a_half_deleted_checkpoint_is_deleted(tmp_path, lost):
    """As after a kill while an old one was being deleted; the best one stays."""
    with opened(tmp_path, keep=3, **BEST) as checkpoints:
        for step, accuracy in ((1, 0.9), (2, 0.1), (3, 0.3), (4, 0.2)):  # 1 is best
            found = {"rollout/accuracy": accuracy}
            checkpoints.save(Position(0, step), made_state(), {}, found)
            checkpoints.wait()
    part = tmp_path / "checkpoints" / "00000002" / lost
    part.unlink() if part.is_file() else shutil.rmtree(part)
    with opened(tmp_path, keep=2, **BEST) as checkpoints:
        assert [checkpoints.has(Position(0, n)) for n in (1, 2, 3, 4)] == [1, 0, 1, 1]
        assert checkpoints.latest() == Position(0, 4)
    assert names(tmp_path) == ["00000001", "00000003", "00000004"]


def test_a_half_written_checkpoint_is_none(tmp_path):
    saved(tmp_path, Position(0, 2))
    half = tmp_path / "checkpoints" / "00000004.orbax-checkpoint-tmp-123"
    (half / "state").mkdir(parents=True)
    with opened(tmp_path) as checkpoints:
        assert checkpoints.latest() == Position(0, 2)


def test_another_model_or_tokenizer_is_refused_and_named(tmp_path):
    nine, eight = ({"tokenizer": f"of {n} tokens"} for n in (9, 8))
    with opened(tmp_path, about=nine) as checkpoints:
        checkpoints.save(Position(0, 2), made_state(), {})
        checkpoints.wait()
        other = abstract(made_state(params=OTHER_SHAPE))
        with pytest.raises(ValueError, match=r"is of another model: .*embedding"):
            checkpoints.restore(Position(0, 2), other)
    named = "00000002 was made with another tokenizer: of 9 tokens there, and of 8"
    with opened(tmp_path, about=eight) as checkpoints:
        with pytest.raises(ValueError, match=named):
            checkpoints.restore(Position(0, 2), abstract(made_state()))
        with pytest.raises(ValueError, match="of 9 tokens there, and of 8 tokens here"):
            checkpoint.check_params(tmp_path, abstract(PARAMS), about=eight)


ABOUT = {
    "variant": "structured",
    "tags": {"<Path>": 5, "</Path>": 6},
    "model": {"rope_base": 1e4, "rms_eps": 1e-6, "rope_scaling": {"factor": 8.0}},
}


@pytest.mark.parametrize(
    "changed, named",
    [
        ({"variant": "causal"}, "variant: structured there, and causal here; set var"),
        ({"tags": {"<Path>": 5, "</Path>": 7}}, "tags.</Path>: 6 there, and 7 here"),
        (
            {"model": {"rope_base": 1e6}},
            "model.rope_base: 10000.0 there, and 1000000.0",
        ),
        ({"model": {"rms_eps": 1e-5}}, "model.rms_eps: 1e-06 there, and 1e-05 here; "),
        (
            {"model": {"rope_scaling": {"factor": 4.0}}},
            "model.rope_scaling.factor: 8.0 there, and 4.0 here; give the model.path",
        ),
        (
            {"model": {"rope_scaling": None}},
            "model.rope_scaling: {'factor': 8.0} there, and None here; give the model.",
        ),
    ],
)
def test_parameters_that_go_with_something_else_are_refused(tmp_path, changed, named):
    with opened(tmp_path, about=ABOUT) as checkpoints:
        checkpoints.save(Position(0, 2), made_state(), {})
    checkpoint.check_params(tmp_path, abstract(PARAMS), about=ABOUT)
    named = f"checkpoint.init={tmp_path} was made with another {re.escape(named)}"
    with pytest.raises(RefusedError, match=named):
        checkpoint.check_params(tmp_path, abstract(PARAMS), about=ABOUT | changed)


def test_what_older_checkpoints_do_not_say_is_logged(tmp_path, caplog):
    with opened(tmp_path, about={"tokenizer": "of 9 tokens"}) as checkpoints:
        checkpoints.save(Position(0, 2), made_state(), {})
    older = {"variant": "structured", "model": {"rope_base": 1e4}}
    about = {"tokenizer": "of 9 tokens", **ABOUT}
    checkpoint.check_params(tmp_path, abstract(PARAMS), about=about)
    assert "does not say with which variant, tags, model it was made" in caplog.text
    checkpoint.check_about(older, ABOUT, "it")
    assert "which tags, model.rms_eps, model.rope_scaling it was made" in caplog.text


def test_buckets_that_cannot_be_read(monkeypatch):
    with pytest.raises(ValueError, match="checkpoint.folder=s3://b/r: buckets are gs"):
        checkpoint.absolute("s3://b/r")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="checkpoint.init=gs://b/r needs a package: "):
        checkpoint.absolute("gs://b/r", "checkpoint.init")
