"""A run and its export, which all tests of the chat ask."""

import pytest

from pr1_jax import export
from pr1_jax.system import files
from pr1_jax.workdir.checkpoint import Position
from tests.helpers import small_run


@pytest.fixture(scope="package")
def workdir(tmp_path_factory):
    """A run with checkpoint 4, of an older version that lacked some fields."""
    folder = tmp_path_factory.mktemp("run")
    config, _ = small_run.write(folder, {Position(0, 4): 1.0})
    written = config.to_dict()
    del written["alarms"], written["model"]["remat_policy"]
    written["mesh"]["fsdp"] = 64  # of the machine that it ran on
    files.write_json(folder / "config.json", written)
    return folder


@pytest.fixture(scope="package")
def exported(workdir, tmp_path_factory):
    """The same as a Hugging Face folder."""
    out = tmp_path_factory.mktemp("exported") / "model"
    export.export(workdir, out)
    return out
