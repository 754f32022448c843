"""Commands of the package as a user runs them."""

import pathlib
import subprocess
import sys

from tests.helpers import compiling

ROOT = pathlib.Path(__file__).parents[2]


def run(module: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs `python -m MODULE ARGUMENTS` on one device in the root of the repository."""
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=compiling.on_one_device(),
    )
