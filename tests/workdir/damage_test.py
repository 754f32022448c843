"""A checkpoint of several processes, of which one cannot read its part."""

import json
import pathlib
import socket
import subprocess
import sys

from tests.helpers import compiling

ROOT = pathlib.Path(__file__).parents[2]


def test_a_part_that_one_process_cannot_read_is_damage_to_all(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "tests.helpers.damaged", address]
    jobs = [
        subprocess.Popen(
            [*command, str(i), str(tmp_path)],
            cwd=ROOT,
            env=compiling.on_one_device(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        said = [job.communicate(timeout=60) for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    assert [job.returncode for job in jobs] == [0, 0], said
    for out, _ in said:
        saw = json.loads(out.splitlines()[-1])  # gloo says something before
        assert "checkpoints/00000002: process 1 of 2: " in saw["error"]
        assert saw["latest"] == [0, 1] and saw["restored"]
        assert "checkpoints_reference: process 1 of 2: " in saw["reference"]
    assert len(list((tmp_path / "checkpoints_damaged").iterdir())) == 1
