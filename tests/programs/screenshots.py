"""Pictures of a run's report, as they are in notebooks/pictures:

    bash launch/quickstart.sh
    .venv/bin/python -m tests.programs.screenshots runs/quickstart

Needs Chromium and its driver. Colours are reduced to 256, so that a picture stays below
100 kB.
"""

import argparse
import io
import pathlib
import sys

from PIL import Image

from tests.helpers import browser

_PICTURES = pathlib.Path(__file__).parents[2] / "notebooks" / "pictures"
_LARGEST_BYTES = 100_000
_BLOCK = """
  const picker = document.querySelector("#filter-group");
  picker.value = picker.options[1].value;  // the newest
  picker.dispatchEvent(new Event("change"));
  const choose = (name, value) =>
    document.querySelector(`[data-filter="${name}"][data-value="${value}"]`).click();
  const first = () => document.querySelector("#list button");
  choose("verdict", "correct");
  choose("blocks", "with");
  if (!first()) choose("verdict", "");  // an untrained model is never correct
  if (!first()) choose("blocks", "");
  if (first()) first().click();
"""
_RESPONSES = "document.querySelector('#responses').scrollIntoView();"
_SHOTS = {  # name: height, what is done first
    "report": (885, ""),
    "response": (760, _BLOCK + _RESPONSES),
}
_WIDTH = 1240


def main() -> None:
    """Writes all pictures."""
    parser = argparse.ArgumentParser(description="Pictures of a run's report.")
    parser.add_argument("workdir", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, default=_PICTURES)
    asked = parser.parse_args()
    page = asked.workdir / "report.html"
    if not page.exists():
        sys.exit(f"error: {page} does not exist: python -m pr1_jax.report makes it")
    if browser.find() is None:
        sys.exit("error: Chromium and its driver are needed (Debian: chromium-driver)")
    asked.out.mkdir(parents=True, exist_ok=True)
    with browser.opened(scale=1.5) as chrome:
        for name, (height, script) in _SHOTS.items():
            browser.look(chrome, _WIDTH, height)
            browser.visit(chrome, page)
            chrome.execute_script(script)
            path = asked.out / f"{name}.png"
            size = _save(chrome.get_screenshot_as_png(), path)
            print(f"{path}: {size / 1000:.0f} kB")
            if size > _LARGEST_BYTES:
                sys.exit(f"error: {path} has over {_LARGEST_BYTES / 1000:.0f} kB")


def _save(png: bytes, path: pathlib.Path) -> int:
    image = Image.open(io.BytesIO(png)).convert("RGB")
    rare_too, plain = Image.Quantize.MAXCOVERAGE, Image.Dither.NONE
    image.quantize(256, rare_too, dither=plain).save(path, optimize=True)
    return path.stat().st_size


if __name__ == "__main__":
    main()
