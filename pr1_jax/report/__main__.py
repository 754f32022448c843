"""The report of a run, or of several in one page: `python -m pr1_jax.report`.

    python -m pr1_jax.report runs/quickstart
    python -m pr1_jax.report runs/quickstart --steps=140,141
    python -m pr1_jax.report runs/a runs/b --out=compare.html

Every run keeps `report.html` in its workdir anyway; this writes it anew, adds all
responses of the steps that are named, or lays several runs over each other. Runs may be
unfinished. The exit code is 0, or 2 for a mistake.
"""

import os

from absl import flags

from pr1_jax.report import page
from pr1_jax.system import cli

_OUT = flags.DEFINE_string(
    "out", None, "File to write; default report.html in the workdir of a single run."
)
_STEPS = flags.DEFINE_list(
    "steps", [], "Steps whose responses are embedded in full: 140,141."
)


def main(argv: list[str]) -> None:
    """Writes the page and says where it is."""
    try:
        out = page.write(argv[1:], _OUT.value, _STEPS.value)
    except (ValueError, OSError) as error:
        cli.stop(error)
    print(f"{out}: {os.path.getsize(out) / 1e6:.1f} MB")


if __name__ == "__main__":
    cli.run(main, most_arguments=None)
