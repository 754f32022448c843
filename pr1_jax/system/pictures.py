"""The look of all pictures that matplotlib draws, and how they are saved.

Figures are made without pyplot, so that nothing global is touched and no display is
needed.
"""

import io
import os

import PIL.Image
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pr1_jax.system import files

INK, FAINT, GRID = "#1f2937", "#6b7280", "#e5e7eb"
BLUE, ORANGE, GREEN, VIOLET = "#2563eb", "#e8710a", "#059669", "#7c3aed"
GREY = "#9ca3af"
COLORS = (BLUE, ORANGE, GREEN, VIOLET)
_PALETTE = (
    128  # colours of a PNG: lines and letters need no more, at a third of the size
)


def figure(rows: int, columns: int, *, width: float, height: float) -> Figure:
    """A figure for panels [rows, columns] of so many inches each."""
    size = (width * columns, 0.5 * (rows > 1) + height * rows)
    made = Figure(figsize=size, layout="constrained")
    made.get_layout_engine().set(w_pad=0.11, h_pad=0.1)
    return made


def style(axes: Axes, title: str, *, size: float = 11, grid: str = "y") -> None:
    """Gives a panel its title and a quiet frame.

    Args:
      size: of the title's letters, in points. grid: of which axis, `x` or `y`.
    """
    axes.set_title(title, loc="left", fontsize=size, fontweight="bold", color=INK)
    axes.grid(axis=grid, color=GRID, linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", labelsize=size - 2, colors=FAINT, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)


def save(made: Figure, path: str | os.PathLike[str], *, dots_per_inch: int) -> None:
    """Writes a PNG with a small palette, whole or not at all."""
    drawn, small = io.BytesIO(), io.BytesIO()
    made.savefig(drawn, format="png", dpi=dots_per_inch, facecolor="white")
    image = PIL.Image.open(drawn).convert("RGB")
    image.quantize(_PALETTE, dither=PIL.Image.Dither.NONE).save(
        small, format="png", optimize=True
    )
    files.replace_file(path, small.getvalue())
