"""A response drawn in a terminal while it is sampled: columns for the paths of a block.

What cannot change any more is printed once and for all, so that the terminal's
scrollback holds the response as it is; only the rest is drawn anew. A line of wrapped
text is final as soon as the next one has begun, and a row across the columns as soon
as every path that is still open has passed it.
"""

import dataclasses
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Self

import rich.console
import rich.live
from rich.text import Text

from pr1_jax import tags
from pr1_jax.data.tokenizer import Tokenizer
from pr1_jax.trajectory import Trajectory

MAIN, BLOCK, SUMMARY = "main", "block", "summary"

_MAX_PROSE = 100  # columns of the main stream and of a path: longer lines read badly
_MIN_PATH = 16  # columns of a path; with less the paths stand below each other
# Names of the terminal's own palette, which fits its background; no yellow or white.
_COLORS = ("cyan", "magenta", "green", "blue", "red")
_FRAME = "dim"
_UNICODE = {name: name for name in "╭╮╰╯├┬┴│▸─·▌"}
_ASCII = dict(zip(_UNICODE, "+++++++|>-|_"))
_CONTROLS = {
    **{code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"},
    **dict.fromkeys([*range(0x7F, 0xA0)], "\ufffd"),
    **dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A)], "\ufffd"),
    ord("\t"): "    ",
}


@dataclasses.dataclass
class Section:
    """A part of a response: of the main stream, a block's paths, or a summary."""

    kind: str
    # Token ids of its one stream, or of each path; but for the first stream of a
    # response they begin with the tag that opens (or, in the main stream, precedes) it.
    streams: list[list[int]]
    closed: list[bool]  # whether nothing more will be written, by stream
    labels: list[int] = dataclasses.field(
        default_factory=list
    )  # tokens of paths' labels
    # Token ids of a block's plans, each with its tags.
    plans: list[list[int]] = dataclasses.field(default_factory=list)


def sections(
    trajectory: Trajectory, tag_ids: Mapping[str, int], eos_ids: Collection[int]
) -> list[Section]:
    """Parts of a response, complete or not, in order.

    The recorded labels say what is in a path, not the text: a model may write tags
    where they mean nothing.
    """
    parts = [Section(MAIN, [[]], [False])]
    fields = (trajectory.tokens, trajectory.path, trajectory.forced)
    for token, path, forced in zip(*(x.tolist() for x in fields), strict=True):
        last = parts[-1]
        if path:
            while len(last.streams) < path:
                last.streams.append([])
                last.closed.append(False)
                last.labels.append(0)
            stream, is_end = last.streams[path - 1], token == tag_ids[tags.END_PATH]
            # What the runtime writes behind <Path> is the path's label.
            if (
                stream
                and forced
                and not is_end
                and len(stream) == 1 + last.labels[path - 1]
            ):
                last.labels[path - 1] += 1
            stream.append(token)
            last.closed[path - 1] = is_end
        elif last.kind == BLOCK and not last.streams:
            if token == tag_ids.get(tags.PLAN) or not last.plans:
                last.plans.append([])
            last.plans[-1].append(token)
        elif last.kind == BLOCK:  # </Parallel>, newline, <Summary>
            last.closed = [True] * len(last.closed)
            if token == tag_ids[tags.SUMMARY]:
                parts.append(Section(SUMMARY, [[token]], [False]))
        elif last.kind == MAIN and token == tag_ids[tags.PARALLEL]:
            last.closed = [True]
            parts.append(Section(BLOCK, [], []))
        elif last.kind == SUMMARY and token == tag_ids[tags.END_SUMMARY]:
            last.closed = [True]
            parts.append(Section(MAIN, [[token]], [False]))
        else:
            last.streams[0].append(token)
            last.closed = [token in eos_ids]
    return parts


_HEADS = {MAIN: tags.END_SUMMARY, BLOCK: tags.PATH, SUMMARY: tags.SUMMARY}


def stream_text(section: Section, number: int, tokenizer: Tokenizer) -> str:
    """Text of one stream, without tags around it and label, and safe to print."""
    tokens = section.streams[number]
    if section.kind == BLOCK:
        tokens = [*tokens[:1], *tokens[1 + section.labels[number] :]]
    text = tokenizer.decode(tokens)
    text = text.removeprefix(_HEADS[section.kind])
    if section.kind == BLOCK and section.closed[number]:
        text = text.removesuffix(tags.END_PATH)
    if not section.closed[number]:
        text = text.rstrip("\ufffd")  # a character of which some bytes are to come
    return printable(text)


def plan_text(section: Section, number: int, tokenizer: Tokenizer) -> str:
    """Text of a block's plan without its tags, safe to print."""
    text = tokenizer.decode(section.plans[number]).removeprefix(tags.PLAN)
    if text.endswith(tags.END_PLAN):
        return printable(text.removesuffix(tags.END_PLAN))
    return printable(text.rstrip("\ufffd"))


def printable(text: str) -> str:
    """`text` without what would steer a terminal; its control characters show."""
    return text.replace("\r\n", "\n").translate(_CONTROLS)


def glyphs(console: rich.console.Console) -> Mapping[str, str]:
    """Characters to draw with, by the ones that are meant."""
    return _UNICODE if console.encoding.lower().startswith("utf") else _ASCII


class Painter:
    """Turns sections into lines of a console."""

    def __init__(self, console: rich.console.Console, tokenizer: Tokenizer):
        self._console, self._tokenizer = console, tokenizer
        self._glyphs = glyphs(console)

    def lines(
        self, section: Section, width: int, height: int, *, is_open: bool
    ) -> tuple[list[Text], int]:
        """Lines of a section.

        Args:
          width, height: of the terminal.
          is_open: whether more may be written. Where it is not, all lines are final.

        Returns:
          The lines, and how many of them, the first ones, are final.
        """
        if section.kind != BLOCK:
            return self._prose(section, width, is_open)
        if not (section.streams or section.plans):
            return [], 0
        plans = [Text(), *self._plans(section, width)]
        if not section.streams:  # the last line of the last plan may still grow
            return plans, len(plans) - is_open
        inner = (width - 1) // len(section.streams) - 3
        if inner < _MIN_PATH:
            lines, final = self._stacked(section, width, height - len(plans), is_open)
        else:
            lines, final = self._columns(section, min(inner, _MAX_PROSE), is_open)
        return plans + lines, len(plans) + final

    def _wrapped(self, text: Text, width: int) -> list[Text]:
        return list(text.wrap(self._console, width, overflow="fold"))

    def _prose(
        self, section: Section, width: int, is_open: bool
    ) -> tuple[list[Text], int]:
        g, text = self._glyphs, stream_text(section, 0, self._tokenizer).strip()
        width = min(width, _MAX_PROSE) - 1  # the last column is the cursor's
        if section.kind == MAIN:
            lines = [Text(), *self._wrapped(_answer_bold(text), width)] if text else []
        else:
            body = Text.assemble(("summary  ", "bold green"), (text, "italic"))
            lines = [Text("   ") + line for line in self._wrapped(body, width - 3)]
            lines[0] = Text.assemble((g["╰"] + g["▸"] + " ", _FRAME), lines[0][3:])
        return lines, max(len(lines) - 1, 0) if is_open else len(lines)

    def _texts(self, section: Section, width: int) -> list[list[Text]]:
        """Wrapped lines of every path."""
        texts = (
            stream_text(section, i, self._tokenizer).strip()
            for i in range(len(section.streams))
        )
        return [self._wrapped(Text(text), width) or [Text()] for text in texts]

    def _plans(self, section: Section, width: int) -> list[Text]:
        """Lines of a block's plans, each below the other, with names as its paths have."""
        found: list[Text] = []
        for number in range(len(section.plans)):
            text = plan_text(section, number, self._tokenizer).strip()
            name = f"   plan {number + 1}  "
            lines = self._wrapped(Text(text), min(width, _MAX_PROSE) - 1 - len(name))
            for i, line in enumerate(lines or [Text()]):
                head = " " * len(name) if i else name
                found.append(Text.assemble((head, _color(number)), line))
        return found

    def _name(self, section: Section, number: int) -> Text:
        """`path 1`, with its label where that says something else, and with its plan."""
        label = section.streams[number][1 : 1 + section.labels[number]]
        text = self._tokenizer.decode(label, continues=True)
        text = " ".join(printable(text).split())
        own = f" ({text})" if text not in ("", str(number + 1)) else ""
        if number < len(section.plans):
            plan = plan_text(section, number, self._tokenizer)
            own += ": " + " ".join(plan.split())
        return Text(f"path {number + 1}{own}", style=_color(number))

    def _count(self, section: Section, number: int) -> Text:
        """`12 tokens`, and whether the path is closed."""
        count, done = len(section.streams[number]), section.closed[number]
        words = f"{count} token{'s' * (count != 1)}"
        if done:
            words += ", closed"
        return Text(words, style=_color(number) if done else f"bold {_color(number)}")

    def _columns(
        self, section: Section, width: int, is_open: bool
    ) -> tuple[list[Text], int]:
        """Paths side by side, each `width` columns wide."""
        texts = self._texts(section, width)
        height = max(map(len, texts))
        names = [self._name(section, i) for i in range(len(texts))]
        lines = [self._rule("╭┬╮", names, width)]
        lines += [self._row(section, texts, row, width) for row in range(height)]
        counts = [self._count(section, i) for i in range(len(texts))]
        # The summary hangs on the corner of a block that is closed.
        lines.append(self._rule("╰┴╯" if is_open else "├┴╯", counts, width))
        if not is_open:
            return lines, len(lines)
        paths = zip(texts, section.closed, strict=True)
        passed = [len(text) - 1 for text, closed in paths if not closed]
        return lines, 1 + min(passed, default=height)

    def _rule(self, corners: str, labels: Sequence[Text], width: int) -> Text:
        """A line across the columns with a label in each."""
        left, middle, right, dash = (self._glyphs[c] for c in corners + "─")
        line = Text()
        for number, label in enumerate(labels):
            label.truncate(width - 1, overflow="ellipsis")
            line.append((middle if number else left) + dash, _FRAME)
            line.append(" ").append_text(label).append(" ")
            line.append(dash * (width - 1 - label.cell_len), _FRAME)
        return line.append(right, _FRAME)

    def _row(
        self, section: Section, texts: Sequence[Sequence[Text]], row: int, width: int
    ) -> Text:
        """Line `row` of every path, with a cursor where a path is being written."""
        edge, line = self._glyphs["│"], Text()
        for number, wrapped in enumerate(texts):
            cell = wrapped[row].copy() if row < len(wrapped) else Text()
            writing = not section.closed[number] and row == len(wrapped) - 1
            if writing and cell.cell_len < width:
                cell.append(self._glyphs["▌"], style=_color(number))
            line.append(edge, _FRAME).append(" ").append_text(cell)
            line.append(" " * (width - cell.cell_len + 1))
        return line.append(edge, _FRAME)

    def _stacked(
        self, section: Section, width: int, height: int, is_open: bool
    ) -> tuple[list[Text], int]:
        """Paths below each other; while they are open, the ends of them that fit."""
        g, texts = self._glyphs, self._texts(section, width - 3)
        if is_open:
            rows = max(1, (height - 2) // len(texts) - 1)
            texts = [text[-rows:] for text in texts]
        lines = []
        for number, wrapped in enumerate(texts):
            corner = g["├" if number else "╭"] + g["─"]
            name = self._name(section, number)
            count = self._count(section, number)
            dot = f" {g['·']} "
            if section.plans:  # they may be long
                name.truncate(width - count.cell_len - 7, overflow="ellipsis")
            lines.append(Text.assemble((corner, _FRAME), " ", name, dot, count))
            if not section.closed[number]:
                wrapped[-1].append(g["▌"], style=_color(number))
            lines += [Text.assemble((g["│"], _FRAME), " ", line) for line in wrapped]
        lines.append(Text(g["╰" if is_open else "├"] + g["─"] * 2, style=_FRAME))
        return lines, 0 if is_open else len(lines)


class Screen:
    """Draws one response as it grows; a context manager.

    with Screen(console, tokenizer) as screen:
        chat.ask(question, watch=screen.show)
        screen.finish(trajectory)
    """

    def __init__(
        self,
        console: rich.console.Console,
        tokenizer: Tokenizer,
        *,
        every_sec: float = 1 / 30,
    ):
        """`every_sec`: time between two drawings, at least; 0 = draws all it is told."""
        self._console, self._tokenizer = console, tokenizer
        self._painter = Painter(console, tokenizer)
        self._every_sec, self._next_sec = every_sec, 0.0
        self._at = self._printed = 0  # the open section, and its lines printed so far
        self._width = console.width
        # Not `redirect_*`: nothing else writes while a response is drawn.
        self._live = rich.live.Live(
            console=console,
            auto_refresh=False,
            transient=True,
            vertical_overflow="crop",
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *exc_info) -> None:
        self._live.stop()

    def show(self, trajectory: Trajectory) -> None:
        """Draws a response as far as it is written; may leave a drawing out."""
        began = time.monotonic()
        if began < self._next_sec:
            return
        self._draw(trajectory, is_done=False)
        if self._every_sec:  # drawing takes a quarter of the time at most
            took = time.monotonic() - began
            self._next_sec = began + max(self._every_sec, 4 * took)

    def finish(self, trajectory: Trajectory) -> None:
        """Draws all that there is, for good."""
        self._draw(trajectory, is_done=True)

    def _draw(self, trajectory: Trajectory, *, is_done: bool) -> None:
        tokenizer = self._tokenizer
        parts = sections(trajectory, tokenizer.tag_ids, tokenizer.eos_ids)
        rest: Sequence[Text] = ()
        final: list[Text] = []
        for i in range(self._at, len(parts)):
            is_open = i == len(parts) - 1 and not is_done
            if not self._printed:  # a width holds for a whole section
                self._width = self._console.width
            lines, count = self._painter.lines(
                parts[i], self._width, self._console.height, is_open=is_open
            )
            final += lines[self._printed : count]
            if is_open:
                self._at, self._printed, rest = i, count, lines[count:]
            else:
                self._at, self._printed = i + 1, 0
        fits = max(self._console.height - 2, 1)
        # At once: what is printed is drawn with the new rest below it.
        rest = rich.console.Group(*rest[-fits:])
        self._live.update(rest, refresh=not final)
        if final:
            self._console.print(*final, sep="\n", soft_wrap=True)


def figures(record: Mapping[str, Any], console: rich.console.Console) -> str:
    """What a response took, in one line.

    Args:
      record: of `session.Chat.ask`; also `stopped`, whether someone did that.
    """
    g = glyphs(console)
    total, steps = record["total_tokens"], record["sequential_steps"]
    parts = [f"{total} tokens in {steps} steps"]
    parts.append(_work(record) if record["num_blocks"] else "no block")
    if record["seconds"] > 0:
        parts.append(f"{total / record['seconds']:,.0f} tokens/s")
    if record.get("stopped"):
        parts.append("stopped")
    elif record.get("cut_off") == "deadline":
        parts.append(f"cut off at its deadline of {steps} steps (/steps, --max_steps)")
    elif not record["finished"]:
        parts.append("cut off at its limit (--max_tokens)")
    return f" {g['·']} ".join(parts)


def _work(record: Mapping[str, Any]) -> str:
    """What the paths of a response did apart from each other."""
    blocks = record["num_blocks"]
    text = f"{blocks} block{'s' * (blocks > 1)}"
    if paths := record.get("num_paths"):
        text += f" of {' and '.join(map(str, paths))} paths"
    if shares := record.get("work_division"):
        share = sum(shares) / len(shares)
        text += f", {100 * share:.0f}% of the paths' work distinct"
    if same := sum(record.get("identical_paths", ())):
        text += ", paths identical" + (f" in {same}" if blocks > 1 else "")
    return text


def _answer_bold(text: str) -> Text:
    """Main stream with its `Final Answer:` lines in bold."""
    out = Text(text)
    out.highlight_regex(r"(?im)^.*final answer[*_` ]*:.*$", style="bold")
    return out


def _color(number: int) -> str:
    return _COLORS[number % len(_COLORS)]
