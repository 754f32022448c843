"""What the command is asked for, checked before anything is read."""

import os
from collections.abc import Sequence

from pr1_jax.report import page


def write(workdirs: Sequence[str], out: str | None, steps: Sequence[str]) -> str:
    """Writes the page that was asked for.

    Args:
      out: file to write; None: `report.html` in the only workdir.
      steps: whose responses are embedded in full, as texts.

    Returns:
      The path of the page.

    Raises:
      ValueError, OSError: names the argument and what is wrong with it.
    """
    if not workdirs:
        raise ValueError(
            "name the workdir of a run: python -m pr1_jax.report runs/quickstart"
        )
    if len(workdirs) > 1 and not out:
        raise ValueError(
            "--out is missing: several runs need a file to go to, --out=compare.html"
        )
    out = out or os.path.join(workdirs[0], "report.html")
    if os.path.isdir(out):
        raise ValueError(f"--out={out} is a folder; name a file")
    if wrong := [step for step in steps if not step.strip().isdecimal()]:
        given = ",".join(steps)
        raise ValueError(f"--steps={given}: {wrong[0]!r} is not the number of a step")
    page.write(workdirs, out, steps=[int(step) for step in steps])
    return out
