"""The control tags: format check, canonical text, number of blocks.

See docs/method.md, sections 1, 5 and 10. The grammar is over the sequence of tags alone:

    ( <Parallel> (<Path></Path>){2,} </Parallel> <Summary></Summary> )*

and with plans of the paths, of which a block has as many as it has paths:

    ( <Parallel> (<Plan></Plan>){k} (<Path></Path>){k} </Parallel> <Summary></Summary> )*

Departs from the paper's Algorithm 1, which is laxer: that one overlooks paths
outside a block and summaries that are never closed.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence

PARALLEL, END_PARALLEL = "<Parallel>", "</Parallel>"
PATH, END_PATH = "<Path>", "</Path>"
SUMMARY, END_SUMMARY = "<Summary>", "</Summary>"
TAGS = (PARALLEL, END_PARALLEL, PATH, END_PATH, SUMMARY, END_SUMMARY)
PLAN, END_PLAN = "<Plan>", "</Plan>"
PLAN_TAGS = (PLAN, END_PLAN)  # tags where blocks are planned, and else ordinary text

MIN_PATHS = 2  # of a block, and so the fewest plans


@dataclasses.dataclass(frozen=True)
class Grammar:
    """What differs between the grammars of responses.

    Attributes:
      labels: texts that a block's paths begin with, in order; () = none.
      planned: whether the plans of a block's paths stand before them.
    """

    labels: tuple[str, ...] = ()
    planned: bool = False

    @property
    def tags(self) -> tuple[str, ...]:
        """Its tags: six, or eight with plans."""
        return TAGS + PLAN_TAGS * self.planned

    @property
    def unlabelled(self) -> "Grammar":
        """The same without labels."""
        return dataclasses.replace(self, labels=())

    @property
    def tag(self) -> re.Pattern[str]:
        """Matches a tag."""
        return _PLANNED_TAG if self.planned else _TAG


_TAG, _PLANNED_TAG = (
    re.compile("|".join(Grammar(planned=x).tags)) for x in (False, True)
)
PLAIN = Grammar()


class _Checker:
    """Reads tags one by one; `faults` says what was wrong with them.

    Open elements hold the offset of their opening tag, None when closed. After a
    fault it takes the state that the tag itself implies, so that one slip gives
    one fault, or a few, and not one for every later tag.
    """

    def __init__(self, grammar: Grammar) -> None:
        self.planned = grammar.planned
        self.faults: list[str] = []
        self.num_paths = self.num_plans = 0
        self.block: int | None = None  # <Parallel> … </Parallel>
        self.plan: int | None = None
        self.path: int | None = None
        self.joined: int | None = None  # a </Parallel> that awaits its <Summary>
        self.summary: int | None = None

    def allowed(self) -> tuple[str, ...]:
        """The tags that the grammar allows next."""
        if self.plan is not None:
            return (END_PLAN,)
        if self.path is not None:
            return (END_PATH,)
        if self.block is not None:
            return self._allowed_in_block()
        if self.joined is not None:
            return (SUMMARY,)
        if self.summary is not None:
            return (END_SUMMARY,)
        return (PARALLEL,)

    def _allowed_in_block(self) -> tuple[str, ...]:
        """The same between the plans and paths of a block."""
        if self.planned and self.num_paths == 0:
            return (PLAN, PATH) if self.num_plans >= MIN_PATHS else (PLAN,)
        if self.num_paths < max(self.num_plans, MIN_PATHS):
            return (PATH,)
        return (END_PARALLEL,) if self.planned else (PATH, END_PARALLEL)

    def _fault(self, tag: str, offset: int, allowed: tuple[str, ...]) -> str:
        counts = ""
        if allowed == (PLAN,):
            counts = f" ({self.num_plans} of at least {MIN_PATHS} plans so far)"
        elif self.num_plans >= MIN_PATHS and self.num_paths:
            counts = f" ({self.num_paths} of {self.num_plans} planned paths so far)"
        elif allowed == (PATH,):
            counts = f" ({self.num_paths} of at least {MIN_PATHS} paths so far)"
        return f"{tag} at {offset}: expected {' or '.join(allowed)}{counts}"

    def read(self, tag: str, offset: int) -> None:
        allowed = self.allowed()
        if tag not in allowed:
            self.faults.append(self._fault(tag, offset, allowed))
        self.plan = None
        if tag == PARALLEL:
            self.block, self.num_paths, self.num_plans = offset, 0, 0
            self.path = self.joined = self.summary = None
        elif tag == PLAN:
            self.plan, self.path = offset, None
            self.num_plans += not self.num_paths
        elif tag == PATH:
            self.path = offset
            self.num_paths += 1
        elif tag == END_PATH:
            self.path = None
        elif tag == END_PARALLEL:
            if self.block is not None:
                self.joined = offset
            self.block = self.path = None
        elif tag == SUMMARY:
            self.summary = offset
            self.block = self.path = self.joined = None
        elif tag == END_SUMMARY and self.block is None:  # inside, it is passed over
            self.summary = self.joined = self.path = None

    def finish(self, length: int) -> None:
        """Reports what is still open at the end of a text of `length` characters."""
        closing = (
            (PLAN, self.plan, END_PLAN),
            (PATH, self.path, END_PATH),
            (PARALLEL, self.block, END_PARALLEL),
            (END_PARALLEL, self.joined, SUMMARY),
            (SUMMARY, self.summary, END_SUMMARY),
        )
        for tag, offset, expected in closing:
            if offset is not None:
                self.faults.append(
                    f"{tag} at {offset}: expected {expected} before the end of the "
                    f"text at {length}"
                )


def check_format(text: str, grammar: Grammar = PLAIN) -> list[str]:
    """Returns the faults of the tag sequence in `text`, none if it is well formed.

    With labels of paths (docs/method.md, section 3) it is a fault if a path lacks its
    own. Each fault names the tag, its character offset and what was expected there:

        >>> check_format("<Parallel><Path>a</Path></Parallel>")
        ['</Parallel> at 24: expected <Path> (1 of at least 2 paths so far)',
         '</Parallel> at 24: expected <Summary> before the end of the text at 35']
    """
    checker = _Checker(grammar)
    for match in grammar.tag.finditer(text):
        checker.read(match.group(), match.start())
    checker.finish(len(text))
    return checker.faults + _label_faults(text, grammar.labels)


def _label_faults(text: str, labels: Sequence[str]) -> list[str]:
    """Says which paths lack their labels."""
    faults = []
    for start, path in _paths(text) if labels else ():
        what = f"{PATH} at {start - len(PATH)}: "
        if path >= len(labels):
            what += f"is path {path + 1} of its block, there are {len(labels)} labels"
            faults.append(what)
        elif not _has_label(text, labels[path], start):
            faults.append(f"{what}expected the label {labels[path]!r} behind it")
    return faults


def _paths(text: str) -> Iterator[tuple[int, int]]:
    """Where the text of each path begins, and the path's number in its block, from 0."""
    path = 0
    for match in _TAG.finditer(text):
        if match.group() == PARALLEL:
            path = 0
        elif match.group() == PATH:
            yield match.end(), path
            path += 1


def _has_label(text: str, label: str, start: int = 0) -> bool:
    """Whether a label stands at `start`, and no letter or digit goes on with it."""
    return text.startswith(label, start) and not _meet(label, text, start + len(label))


def _meet(label: str, text: str, at: int) -> bool:
    """Whether a label would run into a letter or digit at `at`."""
    return label[-1].isalnum() and text[at : at + 1].isalnum()


def unlabelled(text: str, grammar: Grammar, index: int) -> str:
    """Returns the text of a block's path number `index`, from 0, without its label.

    >>> unlabelled(" 2 from the right", Grammar((" 1", " 2")), 1)
    ' from the right'
    """
    label = "".join(grammar.labels[index : index + 1])
    return text[len(label) :] if label and _has_label(text, label) else text


def split_labels(text: str, grammar: Grammar) -> list[tuple[str, int | None]]:
    """Returns a text in pieces: what is no label, and labels of paths, with their numbers.

    >>> split_labels("<Parallel><Path> 1 a</Path>", Grammar((" 1", " 2")))
    [('<Parallel><Path>', None), (' 1', 0), (' a</Path>', None)]
    """
    labels = grammar.labels
    pieces: list[tuple[str, int | None]] = []
    end = 0
    for start, path in _paths(text):
        if path < len(labels) and _has_label(text, labels[path], start):
            pieces += (text[end:start], None), (labels[path], path)
            end = start + len(labels[path])
    return [*pieces, (text[end:], None)]


def canonical(text: str, grammar: Grammar = PLAIN) -> str:
    """Returns `text` in canonical form; ValueError with the reason if it has none.

    Nothing stays between the structural tags of a block but one newline before
    `<Summary>`. A path that lacks its label gets it, with a blank behind it where the
    two would run together. The text of plans, paths, summaries and main stream is left
    alone:

        >>> canonical("A<Parallel> <Path> x</Path>\\n<Path>y</Path>\\n</Parallel>"
        ...           "<Summary>s\\n</Summary>\\n B")
        'A<Parallel><Path> x</Path><Path>y</Path></Parallel>\\n<Summary>s\\n</Summary>\\n B'
    """
    faults = check_format(text, grammar.unlabelled)
    if faults:
        more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
        raise ValueError("text has format faults: " + "; ".join(faults[:3]) + more)
    pieces, previous, end = [], None, 0
    for match in grammar.tag.finditer(text):
        gap = text[end : match.start()]
        if previous in (PARALLEL, END_PLAN, END_PATH, END_PARALLEL):
            if gap.strip():
                raise ValueError(
                    f"text has stray text between {previous} and {match.group()} at "
                    f"{end}: {gap.strip()[:60]!r}, expected none"
                )
            gap = "\n" if previous == END_PARALLEL else ""
        pieces += (gap, match.group())
        previous, end = match.group(), match.end()
    return _with_labels("".join(pieces) + text[end:], grammar.labels)


def _with_labels(text: str, labels: Sequence[str]) -> str:
    """A well-formed text in which every path has its label."""
    pieces, end = [], 0
    for start, path in _paths(text) if labels else ():
        if path >= len(labels):
            raise ValueError(
                f"text has a block of {path + 1} paths, but there are only "
                f"{len(labels)} labels for paths"
            )
        label = labels[path]
        if not _has_label(text, label, start):
            gap = " " if _meet(label, text, start) else ""
            pieces += text[end:start], label, gap
            end = start
    return "".join(pieces) + text[end:]


def count_blocks(text: str) -> int:
    """Returns how many `<Parallel>` tags a text has, in blocks that are well formed or not."""
    return text.count(PARALLEL)
