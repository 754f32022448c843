"""Tests of notebooks/: they hold what they show, and run from top to bottom as they are."""

import nbclient
import nbformat
import pytest

from tests.helpers import compiling
from tests.notebooks import execute

FOLDER = execute.FOLDER
_STUDY = FOLDER / "study" / "results.json"
FIGURES = {  # notebook -> figures that it draws
    "anatomy_of_a_block.ipynb": 6,
    "paper_in_miniature.ipynb": 5 if _STUDY.exists() else 0,  # not run yet
    "quickstart.ipynb": 4,
    "sharding.ipynb": 5,
}
EVERY = pytest.mark.parametrize("name", FIGURES)


def read(name):
    return nbformat.read(FOLDER / name, as_version=4)


def messages(notebook):
    """What was written to standard error."""
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return [output.text for output in outputs if output.get("name") == "stderr"]


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_every_notebook_is_tested():
    assert {path.name for path in FOLDER.glob("*.ipynb")} == set(FIGURES)


@EVERY
def test_what_was_run_is_stored(name):
    """From top to bottom, without errors and progress, in small pictures."""
    notebook = read(name)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert {output.output_type for cell in cells for output in cell.outputs} <= {
        *("display_data", "execute_result", "stream")
    }
    assert max(len(cell.outputs) for cell in cells) < 10
    pictures = execute.figures(notebook)
    assert len(pictures) == FIGURES[name]
    assert max(map(len, pictures), default=0) < 100_000 * 4 / 3  # as base64
    assert not messages(notebook)


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
    assert len(execute.figures(notebook)) == FIGURES[name]
    assert not messages(notebook)
