"""Traces in the shapes of other systems, brought into this one's grammar (docs/data.md).

Each of these systems has a plan before the paths, under its own names. As they are
published:

- ThreadWeaver (arXiv 2512.07843; github.com/facebookresearch/threadweaver,
  `data_generation/src/filter-format-correct-and-obtain-stats.py` checks the shape):
  `<Parallel><Outlines><Outline>1: …</Outline>…</Outlines><Thread>1: …</Thread>…
  [<Conclusion>…</Conclusion>]</Parallel>`.
- Multiverse (arXiv 2506.09991; `data/prompt/step3-prompt.txt` of its code and the traces on
  multiverse4fm.github.io): `<Parallel><Goal><Outline>1: …</Outline>…</Goal>
  <Path>1: …</Path>…<Conclusion>…</Conclusion></Parallel>`; a path may hold a block whose
  paths are numbered 1.1, 1.2, ….
- NPR (arXiv 2512.07461; github.com/bigai-nlco/Native-Parallel-Reasoner,
  `npr-beta/prompts/npr.txt`): `<guideline><plan>1: …</plan>…</guideline>
  <step>1: …</step>…<takeaway>…</takeaway>`; a guideline may have a single plan.

The words stay, and their order; numbers of plans and paths are taken off, since the
runtime writes labels of its own.
"""

import dataclasses
import re
from collections.abc import Sequence

from pr1_jax import tags
from pr1_jax.data.rows import Dropped

# Why a trace cannot be converted.
NESTED, ONE_PATH, NUMBERS = "nested_block", "one_path", "plans_and_paths_differ"
NUMBERING, STRAY_TEXT, EMPTY = "wrong_number", "stray_text", "empty_element"
TAG, UNCLOSED, OUR_TAG, NO_SUMMARY = "wrong_tag", "unclosed", "our_tag", "no_summary"

_OUR_TAGS = tags.Grammar(planned=True).tags
_THINK = ("<think>", "</think>", "<Think>", "</Think>")  # taken out
_NUMBER = re.compile(r"\s*((?:[0-9]+\.)*([0-9]+))[^\S\n]*:")
_MAX_DEPTH = 50  # of blocks in blocks; this is read by recursion
_END_OF_PARAGRAPH = re.compile(
    r"\n[^\S\n]*\n|\n(?=[ \t*_#]*final answer)", re.IGNORECASE
)


@dataclasses.dataclass(frozen=True)
class Shape:
    """The names of a published shape's elements.

    Attributes:
      block: encloses all of a block; "" where nothing does.
      plans: encloses the plans.
      has_summary: whether every block has one.
    """

    block: str
    plans: str
    plan: str
    path: str
    summary: str
    has_summary: bool = True

    @property
    def opening(self) -> str:
        """The tag that opens a block."""
        return f"<{self.block or self.plans}>"

    @property
    def tags(self) -> tuple[str, ...]:
        """All tags of the shape."""
        names = (self.block, self.plans, self.plan, self.path, self.summary)
        return tuple(tag for name in names if name for tag in _pair(name))


SHAPES = {
    "threadweaver": Shape(
        "Parallel", "Outlines", "Outline", "Thread", "Conclusion", has_summary=False
    ),
    "multiverse": Shape("Parallel", "Goal", "Outline", "Path", "Conclusion"),
    "npr": Shape("", "guideline", "plan", "step", "takeaway"),
}


def convert(
    text: str, shape: str, *, planned: bool = True, flatten: bool = False
) -> str:
    """Returns a response of a published shape in canonical text, without labels.

        >>> convert("A<guideline><plan>1: p</plan><plan>2: q</plan></guideline>"
        ...         "<step>1: x</step><step>2: y</step><takeaway>s</takeaway> B", "npr")
        'A<Parallel><Plan>p</Plan><Plan>q</Plan><Path> x</Path><Path> y</Path></Parallel>\\n<Summary>s</Summary> B'

    A block's conclusion becomes its summary. Where a ThreadWeaver block has none, the
    summary is the first paragraph behind the block: the main stream wrote it, as a
    summary, with all threads in sight. Tags `<think>` are taken out, and white space at
    the ends of the text and of plans, paths and summaries.

    Args:
      shape: one of `SHAPES`.
      planned: whether blocks have plans (`rollout.planned`); else these are left out.
      flatten: whether a block inside a path, and one of a single path, is kept as
        ordinary text, from which only the tags are taken; else it is refused.

    Raises:
      Dropped: the text cannot be converted; names the tag, its character offset and
        what was expected, or what is lacking.
      ValueError: there is no such shape.
    """
    if shape not in SHAPES:
        raise ValueError(f"shape={shape!r} is not one of {(*SHAPES,)}")
    reader = _Reader(text, SHAPES[shape])
    writer = _Writer(planned, flatten)
    return writer.main_stream(reader.content(None)).strip()


def _pair(name: str) -> tuple[str, str]:
    """The tags that open and close an element."""
    return f"<{name}>", f"</{name}>"


@dataclasses.dataclass
class _Element:
    """A plan, path or summary: its opening tag, where that stands, and what follows."""

    tag: str
    offset: int
    content: "list[str | _Block | None]"

    @property
    def text(self) -> str:
        """What a plan or summary says."""
        return "".join(self.content)


@dataclasses.dataclass
class _Block:
    tag: str
    offset: int
    plans: list[_Element]
    paths: list[_Element]
    summary: _Element | None


class _Reader:
    """Reads a text of a shape from tag to tag."""

    def __init__(self, text: str, shape: Shape):
        known = dict.fromkeys((*shape.tags, *_THINK, *_OUR_TAGS))
        self._matches = re.finditer("|".join(map(re.escape, known)), text)
        self._text, self._shape, self._end = text, shape, 0
        self._depth = 0

    def content(self, closing: str | None, opened: str = "") -> list:
        """Reads up to a closing tag, or to the end: texts, blocks between two of them.

        None stands for a tag `<think>`, which only the main stream may have.
        """
        parts: list[str | _Block | None] = []
        while True:
            text, tag, offset = self._next()
            parts.append(text)
            if tag == closing:
                return parts
            if tag in _THINK and closing is None:
                parts.append(None)
            elif tag == self._shape.opening:
                parts.append(self._block(offset))
            elif closing is None:
                raise self._wrong(tag, offset, (self._shape.opening,))
            else:
                raise self._wrong(tag, offset, (closing,), opened)

    def _block(self, offset: int) -> _Block:
        shape = self._shape
        opening, (plan, end_plans) = (
            shape.opening,
            (f"<{shape.plan}>", f"</{shape.plans}>"),
        )
        path, summary, end_block = (
            f"<{shape.path}>",
            f"<{shape.summary}>",
            f"</{shape.block}>",
        )
        opened = f"{opening} at {offset}"
        block = _Block(opening, offset, [], [], None)
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise Dropped(NESTED, f"{opened}: expected at most {_MAX_DEPTH} levels")
        if shape.block:
            self._expect((f"<{shape.plans}>",), opened)
        tag, at = self._expect((plan,), opened)
        while tag == plan:
            block.plans.append(self._element(shape.plan, at))
            tag, at = self._expect((plan, end_plans), opened)
        tag, at = self._expect((path,), opened)
        ends = (summary,) if shape.has_summary else (summary, end_block)
        while tag == path:
            block.paths.append(self._element(shape.path, at))
            tag, at = self._expect((path, *ends), opened)
        if tag == summary:
            block.summary = self._element(shape.summary, at)
            if shape.block:
                self._expect((end_block,), opened)
        self._check_numbers(block)
        self._depth -= 1
        return block

    def _element(self, name: str, offset: int) -> _Element:
        opening, closing = _pair(name)
        content = self.content(closing, f"{opening} at {offset}")
        element = _Element(opening, offset, content)
        if len(content) > 1 and name != self._shape.path:
            block = content[1]
            raise self._wrong(block.tag, block.offset, (closing,))
        if not any(part.strip() if isinstance(part, str) else part for part in content):
            raise Dropped(EMPTY, f"{opening} at {offset}: expected a text in it")
        return element

    def _check_numbers(self, block: _Block) -> None:
        """Raises `Dropped` unless plan and path number i are numbered i alike."""
        plans, paths = len(block.plans), len(block.paths)
        if plans != paths:
            raise Dropped(
                NUMBERS,
                f"{block.tag} at {block.offset}: {plans} plans, but {paths} paths",
            )
        for number, pair in enumerate(zip(block.plans, block.paths, strict=True), 1):
            expected = None
            for element in pair:
                found = _NUMBER.match(element.content[0])
                wrong = not found or found[2] != str(number)
                if wrong or expected not in (None, found[1]):
                    behind = f"'{expected or number}:' behind it"
                    begins = element.content[0].strip()[:20]
                    raise Dropped(
                        NUMBERING,
                        f"{element.tag} at {element.offset}: expected {behind}, "
                        f"it begins with {begins!r}",
                    )
                expected = found[1]

    def _expect(self, allowed: Sequence[str], opened: str) -> tuple[str, int]:
        """The next tag, one of those allowed, with nothing but white space before it."""
        start = self._end
        text, tag, offset = self._next()
        if tag not in allowed:
            raise self._wrong(tag, offset, allowed, opened)
        if stray := text.strip():
            raise Dropped(
                STRAY_TEXT,
                f"{stray[:60]!r} at {start}: expected {' or '.join(allowed)}",
            )
        return tag, offset

    def _next(self) -> tuple[str, str | None, int]:
        """The text before the next tag, the tag, None at the end, and its offset."""
        match = next(self._matches, None)
        if match is None:
            return self._text[self._end :], None, len(self._text)
        before = self._text[self._end : match.start()]
        self._end = match.end()
        return before, match.group(), match.start()

    def _wrong(
        self, tag: str | None, offset: int, allowed: Sequence[str], opened: str = ""
    ) -> Dropped:
        """What to raise where another tag stands than those allowed."""
        expected = f"expected {' or '.join(allowed)}"
        if tag is None:
            text = f"{opened}: {expected} before the end of the text at {offset}"
            return Dropped(UNCLOSED, text)
        if tag not in (*self._shape.tags, *_THINK):
            text = f"{tag} at {offset}: no text may hold a tag of our own, {expected}"
            return Dropped(OUR_TAG, text)
        return Dropped(TAG, f"{tag} at {offset}: {expected}")


@dataclasses.dataclass(frozen=True)
class _Writer:
    """Writes what was read as canonical text."""

    planned: bool
    flatten: bool

    def main_stream(self, parts: Sequence[str | _Block | None]) -> str:
        """Text and blocks outside every path."""
        written = parts[0]
        for item, text in zip(parts[1::2], parts[2::2], strict=True):
            if item is None:
                written = _joined(written.rstrip(), text.lstrip(), gap="\n\n")
            elif len(item.paths) > 1:
                summary, rest = _summary(item, text)
                written += self._block(item, summary) + rest
            else:
                self._check(item, ONE_PATH, "two paths or more")
                written = _joined(written, self._sequence(item)) + _spaced(text)
        return written

    def _sequence(self, block: _Block) -> str:
        """A block of one path as text, in which blocks of its path stay blocks."""
        pieces = [block.plans[0].text, self.main_stream(block.paths[0].content)]
        return _lines(pieces, block.summary)

    def _block(self, block: _Block, summary: str) -> str:
        plans = [_unnumbered(plan.text).strip() for plan in block.plans]
        paths = [_unnumbered(self._path(path.content)).rstrip() for path in block.paths]
        for element, text in zip(
            (*block.plans, *block.paths), (*plans, *paths), strict=True
        ):
            if not text.strip():
                where = f"{element.tag} at {element.offset}"
                raise Dropped(EMPTY, f"{where}: expected a text behind its number")
        plans = (
            [tags.PLAN + plan + tags.END_PLAN for plan in plans] if self.planned else []
        )
        paths = [tags.PATH + path + tags.END_PATH for path in paths]
        body = "".join((tags.PARALLEL, *plans, *paths, tags.END_PARALLEL))
        return f"{body}\n{tags.SUMMARY}{summary}{tags.END_SUMMARY}"

    def _path(self, parts: Sequence[str | _Block | None]) -> str:
        """What a path says, with the text of blocks inside."""
        written = parts[0]
        for block, text in zip(parts[1::2], parts[2::2], strict=True):
            self._check(block, NESTED, "no block inside a path")
            pieces = [plan.text for plan in block.plans]
            pieces += [self._path(path.content) for path in block.paths]
            inside = _lines(pieces, block.summary)
            written = _joined(written, inside) + _spaced(text)
        return written

    def _check(self, block: _Block, reason: str, expected: str) -> None:
        if not self.flatten:
            where = f"{block.tag} at {block.offset}"
            raise Dropped(reason, f"{where}: expected {expected} (or flatten)")


def _lines(pieces: Sequence[str], summary: _Element | None) -> str:
    """The texts of a block, each from a new line."""
    pieces = [*pieces, summary.text] if summary else pieces
    return "\n".join(piece.strip() for piece in pieces)


def _unnumbered(text: str) -> str:
    return text[_NUMBER.match(text).end() :]


def _joined(before: str, text: str, gap: str = "\n") -> str:
    """Two texts, with a gap where nothing parts them."""
    apart = not before or before[-1].isspace()
    return before + ("" if apart else gap) + text


def _spaced(text: str) -> str:
    """A text that follows another: it begins with white space, or is empty."""
    return text if not text or text[0].isspace() else "\n" + text


def _summary(block: _Block, behind: str) -> tuple[str, str]:
    """A block's summary, and what is left of the text behind it."""
    if block.summary:
        return block.summary.text.strip(), behind
    behind = behind.lstrip()
    end = _END_OF_PARAGRAPH.search("\n" + behind)
    cut = max(end.start() - 1, 0) if end else len(behind)
    if not (paragraph := behind[:cut].strip()):
        raise Dropped(
            NO_SUMMARY,
            f"{block.tag} at {block.offset}: it has no conclusion, expected a paragraph "
            "behind it",
        )
    return paragraph, behind[len(behind[:cut].rstrip()) :]
