"""Runs the notebooks and stores what they show, as they are committed:

    python -m tests.notebooks.execute                  all
    python -m tests.notebooks.execute sharding         some

Pictures are reduced to 256 colours; times and versions of this machine are left out.
"""

import argparse
import base64
import io
import pathlib
import time

import nbclient
import nbformat
from PIL import Image

FOLDER = pathlib.Path(__file__).parents[2] / "notebooks"
SHOWN = {"anatomy_of_a_block": (1, "mask.png")}  # a figure of it that README shows


def execute(path: pathlib.Path) -> nbformat.NotebookNode:
    """The notebook with its outputs; raises what a cell raises."""
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(
        notebook,
        timeout=1800,  # seconds a cell
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(FOLDER)}},
    ).execute()
    notebook.metadata.pop("language_info", None)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = _reduced(output.data["image/png"])
    return notebook


def figures(notebook: nbformat.NotebookNode) -> list[str]:
    """Its pictures in order, base64."""
    outputs = [x for cell in notebook.cells for x in cell.get("outputs", [])]
    found = [x.get("data", {}).get("image/png") for x in outputs]
    return [png for png in found if png]


def _reduced(png: str) -> str:
    """A picture as base64 with a palette, where that makes it smaller."""
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGBA")
    reduced = io.BytesIO()
    image.quantize(256, Image.Quantize.FASTOCTREE).save(reduced, "png", optimize=True)
    smaller = base64.b64encode(reduced.getvalue()).decode()
    return min(png, smaller, key=len)


def main() -> None:
    """Executes notebooks in place."""
    parser = argparse.ArgumentParser(description="Executes notebooks in place.")
    parser.add_argument("names", nargs="*", help="without .ipynb; default all")
    names = parser.parse_args().names
    for path in sorted(FOLDER.glob("*.ipynb")):
        if names and path.stem not in names:
            continue
        began = time.perf_counter()
        notebook = execute(path)
        nbformat.write(notebook, path)
        if path.stem in SHOWN:
            number, name = SHOWN[path.stem]
            picture = base64.b64decode(figures(notebook)[number])
            (FOLDER / "pictures" / name).write_bytes(picture)
        took, size = time.perf_counter() - began, path.stat().st_size
        print(f"{path.name}: {took:.0f} s, {size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    main()
