"""Checkpoints in a bucket, against an emulator of Google Cloud Storage."""

import os
import socket

import jax
import pytest

from pr1_jax.workdir import checkpoint
from pr1_jax.workdir.checkpoint import Checkpoints, Position
from pr1_jax.workdir.folder import RefusedError
from tests.workdir import checkpoint_test, identity_test

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bucket():
    """A bucket on this machine; the address is read when a bucket is first used."""
    reason = "pip install -e '.[test]'"
    server = pytest.importorskip("gcp_storage_emulator.server", reason=reason)
    pytest.importorskip("gcsfs", reason=reason)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    emulator = server.create_server("localhost", port, in_memory=True)
    names = ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL")
    os.environ |= dict.fromkeys(names, f"http://localhost:{port}")
    os.environ["GCE_METADATA_ROOT"] = "localhost:1"  # nobody is asked who we are
    emulator.start()
    emulator._storage.create_bucket("pr1", {"kind": "storage#bucket", "name": "pr1"})
    yield "gs://pr1/run"
    emulator.stop()


def test_checkpoints_come_back_and_damaged_ones_are_set_aside(bucket):
    places = [Position(0, 1), Position(0, 2), Position(1, 1)]
    checkpoint_test.saved(bucket, *places)
    checkpoints = Checkpoints(bucket)
    assert checkpoints.latest() == places[2]
    assert not checkpoints.has(places[0])  # the newest two are kept
    abstract = checkpoint_test.abstract(checkpoint_test.made_state())
    newest, position = checkpoints.restore(places[2], abstract)
    before, _ = checkpoints.restore(places[1], abstract)
    assert position
    aside = checkpoints.set_aside(places[2])
    assert str(aside).startswith(f"{bucket}/checkpoints_damaged/")
    assert checkpoints.latest() == places[1]
    checkpoints.close()
    params = checkpoint.restore_params(bucket, abstract.params)
    checkpoint_test.assert_same(params, before.params)
    assert jax.tree.leaves(newest.params)[0].shape == (4, 3)


def test_no_checkpoint_in_a_bucket(bucket):
    abstract = checkpoint_test.abstract(checkpoint_test.PARAMS)
    with pytest.raises(FileNotFoundError, match=r"checkpoint.init=gs://pr1/none: no "):
        checkpoint.check_params("gs://pr1/none", abstract)


def test_a_bucket_says_whose_checkpoints_it_holds(bucket, tmp_path):
    kept = bucket.replace("run", "mine")
    c = identity_test.config(folder=kept)
    for _ in range(2):
        identity_test.begin(tmp_path / "a", c)
    named = f"checkpoint.folder={kept} is of the run in {tmp_path}/a"
    with pytest.raises(RefusedError, match=named):
        identity_test.begin(tmp_path / "b", c)
    checkpoint_test.saved(kept, Position(0, 2))
    checkpoint_test.saved(tmp_path / "here", Position(0, 2))
    params = checkpoint_test.abstract(checkpoint_test.PARAMS)
    found = [
        checkpoint.digest(checkpoint.check_params(folder, params))
        for folder in (kept, tmp_path / "here")
    ]
    assert found[0] == found[1]
