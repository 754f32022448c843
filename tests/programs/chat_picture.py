"""Draws what `pr1_jax.chat` shows: a response half written, and the whole of it.

    python -m tests.programs.chat_picture --checkpoint=runs/quickstart --seed=1 \\
        --columns=84 --out=notebooks/pictures/chat.svg

The SVG asks for nothing from the network; any browser makes a .png of it.
"""

import argparse
import io
import pathlib
import re

import rich.console
import rich.terminal_theme

from pr1_jax.chat import view
from pr1_jax.chat.opening import load
from pr1_jax.chat.session import Chat

_DARK = rich.terminal_theme.SVG_EXPORT_THEME
_LIGHT = rich.terminal_theme.DEFAULT_TERMINAL_THEME


def _draw(console, tokenizer, trajectory, *, is_done: bool) -> None:
    """Prints a response, or as much of it as there is, once."""
    painter = view.Painter(console, tokenizer)
    parts = view.sections(trajectory, tokenizer.tag_ids, tokenizer.eos_ids)
    size = console.width, console.height
    for part in parts:
        lines, _ = painter.lines(part, *size, is_open=part is parts[-1] and not is_done)
        console.print(*lines, sep="\n", soft_wrap=True)


def svg(
    asked: Chat,
    question: str,
    command: str,
    *,
    columns: int,
    at: float,
    light: bool,
) -> str:
    """The picture.

    Args:
      columns: width of the terminal. at: how far the first drawing is, from 0 to 1.
    """
    console = rich.console.Console(
        record=True,
        width=columns,
        height=100,
        force_terminal=True,
        color_system="standard",
        file=io.StringIO(),
        highlight=False,
        markup=False,
        _environ={},
    )
    seen = []
    record = asked.ask(question, watch=seen.append)
    steps = record["sequential_steps"]
    half = next(t for t in seen if t.sequential_steps >= at * steps)
    console.print(f"$ {command}", style="dim")
    console.print(f"> {question}", style="bold")
    _draw(console, asked.tokenizer, half, is_done=False)
    console.print(f"\n… {steps - half.sequential_steps} steps later", style="dim")
    _draw(console, asked.tokenizer, seen[-1], is_done=True)
    console.print(f"\n{view.figures(record, console)}", style="dim")
    found = console.export_svg(
        title="pr1_jax.chat", theme=_LIGHT if light else _DARK, unique_id="chat"
    )
    found = found.replace("<!-- Generated with Rich https://www.textualize.io -->", "")
    found = re.sub(r"@font-face \{.*?\}\s*", "", found, flags=re.DOTALL)
    return found.replace(
        "Fira Code,", "ui-monospace, Menlo, Consolas, DejaVu Sans Mono,"
    )


def main() -> None:
    """Reads the flags and writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--question", help="default: an example")
    parser.add_argument("--columns", type=int, default=90)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_paths", type=int)
    parser.add_argument("--at", type=float, default=0.4, help="of the first drawing")
    parser.add_argument("--light", action="store_true")
    given = parser.parse_args()
    asked = load(
        given.checkpoint,
        num_paths=given.num_paths,
        seed=given.seed,
        steps_per_chunk=1,
    )
    drawn = svg(
        asked,
        given.question or asked.example(),
        "python -m pr1_jax.chat runs/quickstart",
        columns=given.columns,
        at=given.at,
        light=given.light,
    )
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(drawn)


if __name__ == "__main__":
    main()
