"""A short run of the kill test; `bash tests/programs/soak.sh` is the long one."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def test_jobs_that_were_killed_end_as_one_that_was_not(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.programs.soak",
            "--kills=2",
            f"--out={tmp_path / 'soak'}",
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = (tmp_path / "soak" / "table.md").read_text()
    assert "jobs that differ from one left alone: 0" in said
    assert "same as alone: True" in done.stdout
    assert "same as alone: False" not in done.stdout
