"""Commands of the package as a user runs them."""

import pathlib
import subprocess
import sys

import ml_collections
from absl import flags
from ml_collections import config_flags

from tests.helpers import compiling

ROOT = pathlib.Path(__file__).parents[2]


def config_of(file: str, *arguments: str) -> ml_collections.ConfigDict:
    """The config that `pr1_jax.main` gets from `--config=FILE` and these flags."""
    argv = ["main", f"--config={ROOT / file}", *arguments]
    values = flags.FlagValues()
    flag = config_flags.DEFINE_config_file(
        "config", None, lock_config=True, flag_values=values, sys_argv=argv
    )
    values(argv)
    return flag.value


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
