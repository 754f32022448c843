"""Whose a folder is, and what its run began with."""

import dataclasses
import pathlib
import subprocess
import sys
import types

import pytest

from configs import rl_alternating
from pr1_jax.system import digests, files
from pr1_jax.workdir import checkpoint, identity
from pr1_jax.workdir.checkpoint import Position
from pr1_jax.workdir.folder import RefusedError, not_shared, only_run, open_workdir
from pr1_jax.workdir.identity import Origin
from tests.workdir import checkpoint_test

ROOT = pathlib.Path(__file__).parents[2]
ABOUT = {"variant": "structured", "model": {"rope_base": 1e4}}
FIRST = Origin("checkpoint.init", "/runs/a", 60, lambda: "sha256 aaaa", ABOUT)
SECOND = Origin("checkpoint.init", "/runs/b", 80, lambda: "sha256 bbbb", ABOUT)
RANDOM = Origin("", "", None, lambda: "", ABOUT)


def config(**fields):
    c = rl_alternating.get_config("smoke")
    c.checkpoint.update(fields)
    return c.lock()


def begin(workdir, c=None, origin=RANDOM):
    """What a run does first in its workdir."""
    c = c or config()
    path = open_workdir(workdir, c)
    identity.check(path, c, origin).keep()
    files.write_json(path / "config.json", c.to_dict())
    return path


# --- What a run began with --------------------------------------------------------------


def test_other_weights_are_refused_and_both_are_named(tmp_path):
    for _ in range(2):  # and again with the same
        begin(tmp_path, origin=FIRST)
    named = (
        r"checkpoint.init=/runs/b \(checkpoint 80, sha256 bbbb\): but the run in "
        rf"{tmp_path} began with checkpoint.init=/runs/a \(checkpoint 60, sha256 aaaa\)"
    )
    before = (tmp_path / "run.json").read_text()
    with pytest.raises(RefusedError, match=named):
        begin(tmp_path, origin=SECOND)
    folder = dataclasses.replace(FIRST, field="model.path")
    for other in (RANDOM, folder):
        with pytest.raises(RefusedError, match="take another --workdir"):
            begin(tmp_path, origin=other)
    assert (tmp_path / "run.json").read_text() == before


def test_the_same_weights_elsewhere_are_taken(tmp_path, caplog):
    begin(tmp_path, origin=FIRST)
    begin(tmp_path, origin=dataclasses.replace(FIRST, path="/moved/a"))
    assert (
        "/moved/a (checkpoint 60) holds the weights that the run began" in caplog.text
    )
    begin(tmp_path, origin=dataclasses.replace(FIRST, path="/moved/a"))
    assert caplog.text.count("holds the weights") == 1


def test_a_model_folder_may_move_where_its_weights_are_known(tmp_path):
    def named(path):
        c = rl_alternating.get_config("smoke")
        c.model.path = path
        return c.lock()

    model = dataclasses.replace(FIRST, field="model.path", number=None)
    begin(tmp_path, named("/models/a"), model)
    begin(tmp_path, named("/models/b"), dataclasses.replace(model, path="/models/b"))
    (tmp_path / "run.json").unlink()
    with pytest.raises(ValueError, match="model.path='/models/c', but the run in"):
        open_workdir(tmp_path, named("/models/c"))


def test_the_same_weights_in_another_model_are_refused(tmp_path):
    begin(tmp_path, origin=FIRST)
    other = dataclasses.replace(FIRST, about=ABOUT | {"model": {"rope_base": 1e6}})
    with pytest.raises(
        RefusedError, match=r"another model.rope_base: 10000.0 there, an"
    ):
        begin(tmp_path, origin=other)


def test_a_run_of_before_goes_on_with_what_its_config_names(tmp_path, caplog):
    files.write_json(tmp_path / "config.json", config(init="/runs/a").to_dict())
    with pytest.raises(
        RefusedError, match=r"init=/runs/b: but the run .* with /runs/a,"
    ):
        begin(tmp_path, config(init="/runs/b"), SECOND)
    assert not (tmp_path / "run.json").exists()
    begin(tmp_path, config(init="/runs/a"), FIRST)
    assert "does not say which weights its run began with" in caplog.text
    with pytest.raises(RefusedError, match="began with checkpoint.init=/runs/a"):
        begin(tmp_path, config(init="/runs/b"), SECOND)


# --- A folder of its own for checkpoints ------------------------------------------------


def test_the_folder_of_another_runs_checkpoints_is_refused(tmp_path):
    c = config(folder=str(tmp_path / "kept"))
    for _ in range(2):
        begin(tmp_path / "a", c)
    named = rf"checkpoint.folder={tmp_path}/kept is of the run in {tmp_path}/a, and not"
    with pytest.raises(RefusedError, match=named):
        begin(tmp_path / "b", c)
    assert not list((tmp_path / "b").iterdir())
    with pytest.raises(RefusedError, match=f"checkpoint.folder={tmp_path}/a is of the"):
        begin(tmp_path / "b", config(folder=str(tmp_path / "a")))
    # Its own workdir, by another name, is no folder apart.
    (tmp_path / "link").symlink_to(tmp_path / "a")
    begin(tmp_path / "a", config(folder=str(tmp_path / "link")))


def test_a_run_of_another_config_with_the_same_id_is_refused(tmp_path):
    """As where a workdir was copied, and its config changed."""
    c = config(folder=str(tmp_path / "kept"))
    begin(tmp_path / "a", c)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "run.json").write_bytes((tmp_path / "a/run.json").read_bytes())
    other = config(folder=str(tmp_path / "kept")).unlock()
    other.seed = 7
    with pytest.raises(
        RefusedError, match=r"kept: seed=7, but the run in .*kept has 0"
    ):
        begin(tmp_path / "b", other.lock())


def test_of_two_runs_that_begin_at_once_one_has_the_folder(tmp_path):
    """As in a bucket, which cannot be held."""
    kept = tmp_path / "kept"
    c = config(folder=str(kept))
    first, second = (
        identity.check(open_workdir(tmp_path / name, c), c, RANDOM) for name in "ab"
    )
    first.keep()
    written = (kept / "run.json").read_text()
    with pytest.raises(RefusedError, match=f"{kept} is taken by another run just now"):
        second.keep()
    assert (kept / "run.json").read_text() == written
    first.keep()


def test_a_run_whose_workdir_is_lost_goes_on_with_its_own_weights(tmp_path):
    kept = tmp_path / "kept"
    c = config(folder=str(kept))
    begin(tmp_path / "a", c, FIRST)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "run.json").write_bytes((kept / "run.json").read_bytes())
    with pytest.raises(RefusedError, match="began with checkpoint.init=/runs/a"):
        begin(tmp_path / "b", c, SECOND)
    begin(tmp_path / "b", c, FIRST)


def test_checkpoints_of_nobody_knows_whom_are_refused_by_a_new_run(tmp_path):
    kept = tmp_path / "kept"
    checkpoint_test.saved(kept, Position(0, 2))
    c = config(folder=str(kept))
    with pytest.raises(
        RefusedError, match="kept holds checkpoints, of another run tha"
    ):
        begin(tmp_path / "new", c)
    files.write_json(tmp_path / "old" / "config.json", c.to_dict())
    begin(tmp_path / "old", c)  # of before, when nothing was written there
    with pytest.raises(RefusedError, match=f"is of the run in {tmp_path}/old"):
        begin(tmp_path / "new", c)
    # Killed when its own folder alone had been written.
    (kept / "run.json").unlink()
    begin(tmp_path / "old", c)
    (kept / "run.json").unlink()
    begin(tmp_path / "third")
    with pytest.raises(
        RefusedError, match="kept holds checkpoints, of another run tha"
    ):
        begin(tmp_path / "third", c)


def test_a_run_does_not_begin_anew_where_its_checkpoints_are_elsewhere(tmp_path):
    first = config(folder=str(tmp_path / "kept"))
    begin(tmp_path / "run", first)
    begin(tmp_path / "run")  # there is none yet
    begin(tmp_path / "run", first)
    checkpoint_test.saved(tmp_path / "kept", Position(0, 2))
    named = f"are in {tmp_path}/kept, and there is none in {tmp_path}/run: give"
    with pytest.raises(RefusedError, match=named):
        begin(tmp_path / "run")
    (tmp_path / "kept").rename(tmp_path / "moved")
    begin(tmp_path / "run", config(folder=str(tmp_path / "moved")))


def test_a_run_whose_workdir_is_lost_goes_on_in_a_new_one(tmp_path):
    c = config(folder=str(tmp_path / "kept"))
    begin(tmp_path / "a", c)
    with pytest.raises(RefusedError) as error:
        begin(tmp_path / "b", c)
    advice = f"copy {tmp_path}/kept/run.json into {tmp_path}/b"
    assert advice in str(error.value)
    (tmp_path / "b" / "run.json").write_bytes((tmp_path / "kept/run.json").read_bytes())
    begin(tmp_path / "b", c)


def test_a_folder_of_checkpoints_is_held_like_the_workdir(tmp_path):
    kept = str(tmp_path / "kept")
    with only_run(tmp_path / "a", kept):
        assert (
            not_shared(tmp_path / "a", kept) == ""
        )  # a look at it does not give it up
        code = (
            "from pr1_jax.workdir.folder import only_run\n"
            f"with only_run({str(tmp_path / 'b')!r}, {kept!r}): pass"
        )
        other = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False
        )
    named = f"checkpoint.folder={kept} is in use by process "
    assert named in other.stderr.decode()


def test_folders_that_other_processes_do_not_share_are_named(tmp_path, monkeypatch):
    here, other, kept = tmp_path / "here", tmp_path / "other", str(tmp_path / "kept")
    (tmp_path / "link").symlink_to(here)
    with only_run(here, kept):
        assert not_shared(tmp_path / "link", kept) == ""
    holder = (here / "run.lock").read_text().strip()
    holders = {"--workdir": holder, "checkpoint.folder": "process 7 on another"}
    stand_in = types.SimpleNamespace(of_first=lambda look: holders)
    monkeypatch.setattr("pr1_jax.workdir.folder.processes", stand_in)
    named = f"checkpoint.folder={kept} is not the folder that process 0 has"
    assert named in not_shared(here, kept, 0)
    other.mkdir()
    assert f"--workdir={other} is not" in not_shared(other, kept, 0)
    (other / "run.lock").write_text("process 7 on another")
    assert f"--workdir={other} is not" in not_shared(other, kept, 0)


@pytest.mark.parametrize(
    "text",
    ['{"id": "7', "", "null", "7", "[" * 100_000, '{"origin": 3}', '{"checkpoints": 3}']
    + ['{"id": "7", "origin": {"field": "", "weights": ""}}'],
)
def test_a_torn_record_is_named(tmp_path, text):
    c = config(folder=str(tmp_path / "kept"))
    begin(tmp_path / "a", c)
    for folder in ("kept", "a"):
        (tmp_path / folder / "run.json").write_text(text)
        named = f"{tmp_path}/{folder}/run.json .*; put a copy of it back, or delete it"
        with pytest.raises(ValueError, match=named):
            begin(tmp_path / "a", c)


def test_first_weights_that_cannot_be_read_are_named(tmp_path):
    def digest():
        raise OSError("process 1 of 2: the disk is gone")

    begin(tmp_path / "went on", origin=FIRST)
    for name in ("went on", "new"):
        with pytest.raises(
            RefusedError, match=r"init=/runs/a \(.*\) cannot be .* gone"
        ):
            begin(tmp_path / name, origin=dataclasses.replace(FIRST, digest=digest))


# --- Digests ----------------------------------------------------------------------------


def test_digests_of_files_tell_bytes_and_not_names(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "PIECE", 4)
    paths = [tmp_path / name for name in "abc"]
    paths[0].write_bytes(b"0123456789")
    paths[1].write_bytes(b"abcdefgh")
    digest = digests.of_files(paths[:2])
    paths[2].write_bytes(b"0123456789")
    assert digests.of_files([paths[2], paths[1]]) == digest
    for changed in (b"0123456780", b"4567012389", b"01234567890", b""):
        paths[0].write_bytes(changed)
        assert digests.of_files(paths[:2]) != digest


def test_a_digest_is_the_same_by_any_number_of_processes(monkeypatch):
    pieces = {str(i): lambda i=i: bytes([i]) * i for i in range(9)}
    alone = digests.of_pieces(pieces)
    said = []
    for number in range(3):
        stand_in = types.SimpleNamespace(
            share=lambda items, n=number: items[n::3],
            first_fault=lambda fault: fault,
            exchange=lambda text: said.append(text) or said,
        )
        monkeypatch.setattr(digests, "processes", stand_in)
        together = digests.of_pieces(pieces)
    assert together == alone


def test_a_piece_that_cannot_be_read_is_named(tmp_path):
    def read():
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        digests.of_pieces({"a": read})


def test_parameters_are_told_apart_and_copies_are_not(tmp_path):
    def digest(folder):
        params = checkpoint_test.abstract(checkpoint_test.PARAMS)
        return checkpoint.digest(checkpoint.check_params(folder, params))

    checkpoint_test.saved(tmp_path / "a", Position(0, 2))
    first = digest(tmp_path / "a")
    (tmp_path / "mo[").mkdir()
    (tmp_path / "a").rename(tmp_path / "mo[" / "v]ed %20 #?")
    checkpoint_test.saved(tmp_path / "again", Position(0, 2))
    assert digest(tmp_path / "mo[" / "v]ed %20 #?") == first
    assert digest(tmp_path / "again") == first
    checkpoint_test.saved(tmp_path / "other", Position(0, 1), Position(0, 2))
    assert digest(tmp_path / "other") != first
