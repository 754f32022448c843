"""Two processes of one job on this machine."""

import pathlib
import socket
import subprocess
from collections.abc import Callable, Sequence

from tests.helpers import compiling

ROOT = pathlib.Path(__file__).parents[2]


def run(
    command: Callable[[int, str], Sequence[str]], timeout_sec: float
) -> list[tuple[int, str, str]]:
    """Runs `command(process, address)` for processes 0 and 1, side by side.

    Returns:
      Of each its exit code, standard output and standard error.

    Raises:
      subprocess.TimeoutExpired: one has not ended; both are killed.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    jobs = [
        subprocess.Popen(
            command(i, address),
            cwd=ROOT,
            env=compiling.on_one_device(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        said = [job.communicate(timeout=timeout_sec) for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    return [(job.returncode, *texts) for job, texts in zip(jobs, said)]
