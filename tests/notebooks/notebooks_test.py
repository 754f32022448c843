"""Tests of notebooks/: they hold no outputs, and run from top to bottom as they are."""

import pathlib

import nbclient
import nbformat
import pytest

from tests.helpers import compiling

FOLDER = pathlib.Path(__file__).parents[2] / "notebooks"
RESULTS = FOLDER / "study" / "results.json"  # of a study that was run
FIGURES = {  # notebook -> figures that it draws
    "anatomy_of_a_block.ipynb": 6,
    "paper_in_miniature.ipynb": 5 * RESULTS.exists(),
    "quickstart.ipynb": 4,
    "sharding.ipynb": 5,
}
EVERY = pytest.mark.parametrize("name", FIGURES)


def read(name):
    return nbformat.read(FOLDER / name, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_every_notebook_is_tested():
    assert {path.name for path in FOLDER.glob("*.ipynb")} == set(FIGURES)


@EVERY
def test_nothing_that_was_run_is_stored(name):
    notebook = read(name)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in code_cells(notebook):
        assert not cell.outputs
        assert cell.execution_count is None


@EVERY
def test_it_runs_from_top_to_bottom(name, monkeypatch):
    monkeypatch.setenv("PR1_JAX_TRY", "1")  # quickstart: all of it, but hardly trained
    # One device, or as many as the notebook asks for.
    monkeypatch.setenv("XLA_FLAGS", compiling.on_one_device()["XLA_FLAGS"])
    notebook = read(name)
    nbclient.NotebookClient(
        notebook,
        timeout=300,  # seconds a cell
        kernel_name="python3",
        resources={"metadata": {"path": str(FOLDER)}},
    ).execute()
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    figures = [x for x in outputs if "image/png" in x.get("data", {})]
    assert len(figures) == FIGURES[name]
    assert not [x.text for x in outputs if x.get("name") == "stderr"]
