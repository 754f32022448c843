"""What is saved comes back, with the position in the data; and what cannot is said."""

import contextlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pr1_jax.data import sources, streams, tasks
from pr1_jax.training.state import TrainState
from pr1_jax.workdir import checkpoint
from pr1_jax.workdir.checkpoint import Checkpoints, DamagedError, Position

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
    """Shapes, dtypes and places of a tree."""
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
    source = source or sources.open_source("embedded:hard", "train", seed=0)
    return streams.problem_stream(
        source,
        tasks.make().tokenizer(),
        template="plain",
        max_prompt_tokens=28,
        **{"batch_size": 4, "seed": 0, **settings},
    )


def questions(stream, batches):
    return [[p.question for p in next(stream)] for _ in range(batches)]


def saved(folder, *places, keep=2):
    """A workdir with checkpoints; the state is numbered by its place."""
    checkpoints = Checkpoints(folder, keep=keep)
    stream = problems()
    for i, place in enumerate(places):
        checkpoints.save(place, made_state(i), stream.get_state())
    checkpoints.close()
    return folder


def test_state_and_position_come_back(tmp_path):
    stream = problems()
    before = questions(stream, 3)
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest() is None
    checkpoints.save(Position(0, 3), made_state(), stream.get_state())
    after = questions(stream, 3)
    checkpoints.close()

    checkpoints, stream = Checkpoints(tmp_path), problems()
    assert checkpoints.latest() == Position(0, 3)
    state, position = checkpoints.restore(Position(0, 3), abstract(made_state()))
    stream.set_state(position)
    assert_same(state, made_state())
    assert questions(stream, 3) == after != before
    checkpoints.close()


def test_the_position_in_shuffled_data_with_drops_comes_back(tmp_path):
    records = sources.open_source("embedded:hard", "train", seed=0)
    records = [records[i] for i in range(30)]
    records[3] = {"question": "1 " * 40, "answer": "1"}  # too long: dropped
    settings = {"source": records, "shuffle": True, "seed": 5, "batch_size": 7}
    stream = problems(**settings)
    questions(stream, 6)  # into the second epoch
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(Position(1, 6), made_state(), stream.get_state())
    after, counts = questions(stream, 6), dict(stream.counts)
    assert counts["prompt_too_long"] >= 2
    checkpoints.close()  # saving goes on in the background until then
    checkpoints = Checkpoints(tmp_path)
    _, position = checkpoints.restore(Position(1, 6), abstract(made_state()))
    stream.set_state(position)
    assert (questions(stream, 6), dict(stream.counts)) == (after, counts)
    checkpoints.close()


def test_the_newest_is_the_furthest_along_the_curriculum(tmp_path):
    saved(tmp_path, Position(0, 300), Position(1, 2))
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest() == Position(stage=1, step=2)
    checkpoints.close()


def test_only_the_newest_are_kept(tmp_path):
    places = [Position(0, 8), Position(0, 12), Position(1, 4), Position(1, 6)]
    saved(tmp_path, *places, keep=2)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["01000004", "01000006"]
    checkpoints = Checkpoints(tmp_path)
    state, _ = checkpoints.restore(Position(1, 4), abstract(made_state()))
    assert_same(state, made_state(2))
    checkpoints.close()


@pytest.mark.parametrize("name", ["", "checkpoints"])
def test_params_alone_of_another_run(tmp_path, name):
    saved(tmp_path, Position(0, 2), Position(1, 2))
    params = checkpoint.restore_params(tmp_path / name, abstract(PARAMS))
    assert_same(params, made_state(1).params)


def test_params_are_placed_as_asked(tmp_path):
    saved(tmp_path, Position(0, 2))
    mesh = jax.make_mesh((2,), ("fsdp",), devices=jax.devices()[:2])
    spec = jax.sharding.PartitionSpec("fsdp")
    wanted = abstract(PARAMS)
    wanted["embedding"] = jax.ShapeDtypeStruct(
        (4, 3), jnp.float32, sharding=jax.sharding.NamedSharding(mesh, spec)
    )
    params = checkpoint.restore_params(tmp_path, wanted)
    assert params["embedding"].sharding.spec == spec
    assert_same(params, made_state().params)


def test_no_checkpoints_to_start_from(tmp_path):
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"checkpoint.init={path}"):
            checkpoint.restore_params(path, abstract(PARAMS))
    assert not list(tmp_path.iterdir())  # nothing is made on the way
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(FileNotFoundError, match="no checkpoint in "):
        checkpoint.restore_params(tmp_path, abstract(PARAMS))


def other_shape():
    return PARAMS | {"embedding": jnp.zeros((5, 3))}


def one_more():
    return PARAMS | {"head": jnp.zeros((4, 3))}


def one_less():
    return {"embedding": PARAMS["embedding"], "layer": {"norm": jnp.ones(3)}}


@pytest.mark.parametrize(
    "wanted, named",
    [
        (other_shape(), r"\['embedding'\] has shape \(4, 3\) there and \(5, 3\) here"),
        (one_more(), r"\['head'\] has shape None there and \(4, 3\) here"),
        (one_less(), r"\['layer'\]\['kernel'\] has shape \(3, 2\) there and None here"),
    ],
)
def test_checkpoint_of_another_model(tmp_path, wanted, named):
    saved(tmp_path, Position(0, 2))
    with pytest.raises(ValueError, match=named) as error:
        checkpoint.restore_params(tmp_path, abstract(wanted))
    assert f"checkpoint.init={tmp_path}" in str(error.value)


def test_the_best_are_kept_beside_the_newest(tmp_path):
    settings = {"keep": 1, "keep_best": 1, "best_metric": "rollout/accuracy"}
    checkpoints = Checkpoints(tmp_path, **settings)
    for step, accuracy in enumerate((0.1, 0.7, 0.3, None, 0.5)):
        found = {} if accuracy is None else {"rollout/accuracy": accuracy}
        checkpoints.save(Position(1, step), made_state(step), {}, found)
    checkpoints.close()
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["01000001", "01000004"]


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
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(DamagedError, match=str(folder)):
        checkpoints.restore(Position(0, 4), abstract(made_state()))
    aside = checkpoints.set_aside(Position(0, 4))
    assert aside.is_dir() and not folder.exists()
    assert checkpoints.latest() == Position(0, 2)
    state, _ = checkpoints.restore(Position(0, 2), abstract(made_state()))
    assert_same(state, made_state(0))
    checkpoints.close()


@pytest.mark.parametrize("lost", ["_CHECKPOINT_METADATA", "state", "metrics"])
def test_a_half_deleted_checkpoint_is_deleted(tmp_path, lost):
    """As after a kill while an old one was being deleted; the best one stays."""
    settings = {"keep_best": 1, "best_metric": "rollout/accuracy"}
    with contextlib.closing(Checkpoints(tmp_path, keep=3, **settings)) as checkpoints:
        for step, accuracy in ((1, 0.9), (2, 0.1), (3, 0.3), (4, 0.2)):  # 1 is best
            found = {"rollout/accuracy": accuracy}
            checkpoints.save(Position(0, step), made_state(), {}, found)
            checkpoints.wait()
    part = tmp_path / "checkpoints" / "00000002" / lost
    part.unlink() if part.is_file() else shutil.rmtree(part)
    with contextlib.closing(Checkpoints(tmp_path, keep=2, **settings)) as checkpoints:
        assert [checkpoints.has(Position(0, n)) for n in (1, 2, 3, 4)] == [1, 0, 1, 1]
        assert checkpoints.latest() == Position(0, 4)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["00000001", "00000003", "00000004"]


def test_a_half_written_checkpoint_is_none(tmp_path):
    saved(tmp_path, Position(0, 2))
    folder = tmp_path / "checkpoints"
    half = folder / "00000004.orbax-checkpoint-tmp-123"
    (half / "state").mkdir(parents=True)
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest() == Position(0, 2)
    checkpoints.close()


def test_another_model_or_tokenizer_is_refused_and_named(tmp_path):
    checkpoints = Checkpoints(tmp_path, about={"tokenizer": "of 9 tokens"})
    checkpoints.save(Position(0, 2), made_state(), {})
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path, about={"tokenizer": "of 8 tokens"})
    named = "00000002 was made with another tokenizer: of 9 tokens there, and of 8"
    with pytest.raises(ValueError, match=named):
        checkpoints.restore(Position(0, 2), abstract(made_state()))
    with pytest.raises(ValueError, match="of 9 tokens there, and of 8 tokens here"):
        checkpoint.check_params(
            tmp_path, abstract(PARAMS), about={"tokenizer": "of 8 tokens"}
        )
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path, about={"tokenizer": "of 9 tokens"})
    other = abstract(made_state(params=other_shape()))
    with pytest.raises(ValueError, match=r"is of another model: .*embedding"):
        checkpoints.restore(Position(0, 2), other)
    checkpoints.close()


def test_buckets_that_cannot_be_read(monkeypatch):
    with pytest.raises(ValueError, match="checkpoint.folder=s3://b/r: buckets are gs"):
        checkpoint.absolute("s3://b/r")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="checkpoint.init=gs://b/r needs a package: "):
        checkpoint.absolute("gs://b/r", "checkpoint.init")
