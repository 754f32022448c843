"""A disk that is full, or may not be written: a clear end, and nothing is lost."""

import pathlib
import subprocess

import pytest

from tests.programs import soak

ROOT = pathlib.Path(__file__).parents[2]


def mount(folder, options):
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "none", folder],
        check=False,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip(f"needs leave to mount a small disk: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path):
    """A disk of its own, small."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount(folder, "size=400k")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def run(workdir, cache):
    """Exit code of a job, and what it said."""
    with (cache.parent / "log").open("w+") as log:
        code = soak.start(workdir, cache, log).wait(timeout=300)
        log.seek(0)
        return code, log.read()


@pytest.mark.slow
def test_a_run_goes_on_when_there_is_room_again(disk, tmp_path):
    cache, alone = tmp_path / "compiled", tmp_path / "alone"
    assert run(alone, cache)[0] == 0
    workdir = disk / "run"
    size = 400
    said = []
    for _ in range(8):  # full at one place after another
        code, text = run(workdir, cache)
        if code == 0:
            break
        assert code == 1, text
        last = text.strip().splitlines()[-1]  # orbax has much to say before it
        assert last.startswith(f"error: cannot write to {workdir}: No space left on")
        assert "make room or take its cause away, and the same command goes on" in last
        said.append(text)
        size *= 4
        mount(disk, f"remount,size={size}k")
    assert said
    assert code == 0
    assert not soak.differences(workdir, alone)


def test_a_disk_that_may_not_be_written(disk, tmp_path):
    mount(disk, "remount,ro,size=400k")
    code, text = run(disk / "run", tmp_path / "compiled")
    assert code == 1
    assert "Read-only file system" in text and str(disk) in text
    assert "Traceback" not in text
