"""Whether the paths of a block do different things (docs/method.md, section 8).

Three figures of a block, read off the text of a response:

  * *Identical paths*: two of its paths are the same text, or more of them.
  * *Path likeness*, 0 to 1: the mean over pairs of paths of the share of word pairs that both
    have. Of the sets of pairs of neighbouring words, A and B, that is
    2 |A ∩ B| / (|A| + |B|) (Dice, Ecology 26, 1945; on distinct pairs Adamson and
    Boreham, Information Storage and Retrieval 10, 1974). The beginning and the end of a
    path count as words.
  * *Work division*, 0 to 1: of the distinct steps of work that its paths do, the share that
    one path alone does; where the steps of some path cannot be read, 1 − likeness.

Paths are compared without their labels. Whatever a model wrote is read as far as it
goes: a path that was never closed ends where the next tag of its block begins, and a
path outside a block is not counted.
"""

import dataclasses
import itertools
import statistics
from collections import Counter
from collections.abc import Callable, Sequence

from pr1_jax import tags

# The distinct steps of work of a path; None where they cannot be read.
Work = Callable[[str], Sequence[str] | None]

_MOST_PATHS = 8  # that are compared; a sampled block has no more


@dataclasses.dataclass(frozen=True)
class Block:
    """A block as it stands in a response.

    Attributes:
      start: where its `<Parallel>` is, as a share of the response.
      lead: the main stream before it, since the last tag.
      paths: texts between `<Path>` and `</Path>`, without their labels.
      summary: text of its summary, "" where there is none.
    """

    start: float
    lead: str
    paths: tuple[str, ...]
    summary: str


def read_blocks(text: str, grammar: tags.Grammar = tags.PLAIN) -> list[Block]:
    """The blocks of a response in order, well formed or not.

        >>> read_blocks("So: <Parallel><Path> 1 a</Path><Path> 2 b</Path></Parallel>"
        ...             "\\n<Summary>It is b.</Summary> Thus b.",
        ...             tags.Grammar((" 1", " 2")))
        [Block(start=0.042..., lead='So: ', paths=(' a', ' b'), summary='It is b.')]

    Args:
      grammar: whose labels are taken off where they are; plans are no paths.
    """
    blocks: list[tuple[int, str, list[str], list[str]]] = []  # last, the summary
    into: list[str] | None = None  # what the text goes to
    where, end = "main", 0  # or in a "block", "joined" after one
    for match in grammar.tag.finditer(text):
        between = text[end : match.start()]
        if into is not None:
            into.append(between)
        tag, end, into = match.group(), match.end(), None
        if tag == tags.PARALLEL:
            blocks.append((match.start(), between, [], []))
            where = "block"
        elif tag == tags.PATH and where == "block":
            into = blocks[-1][2]
        elif tag == tags.END_PARALLEL and where == "block":
            where = "joined"
        elif tag == tags.SUMMARY and where == "joined":
            into, where = blocks[-1][3], "main"
    if into is not None:
        into.append(text[end:])
    return [
        Block(
            start=start / len(text),
            lead=lead,
            paths=tuple(tags.unlabelled(p, grammar, i) for i, p in enumerate(paths)),
            summary="".join(summary),
        )
        for start, lead, paths, summary in blocks
    ]


@dataclasses.dataclass(frozen=True)
class Diversity:
    """The figures of one block; see the module."""

    identical_paths: bool
    path_likeness: float
    work_division: float


FIGURES = tuple(field.name for field in dataclasses.fields(Diversity))


def of_response(
    text: str, work: Work, grammar: tags.Grammar = tags.PLAIN
) -> list[Diversity]:
    """The figures of each block with two or more paths, in order.

    Args:
      work: what a path did, such as `tasks.work`.
      grammar: of the response, with the labels of its paths.
    """
    blocks = read_blocks(text, grammar)
    return [of_paths(b.paths, work) for b in blocks if len(b.paths) >= 2]


def of_paths(paths: Sequence[str], work: Work) -> Diversity:
    """The figures of a block.

    Where no path did a step, none is divided:

        >>> steps = lambda path: path.replace("no", "").split()
        >>> of_paths(["4+21 no 7+18 no", "7+18 no"], steps)
        Diversity(identical_paths=False, path_likeness=0.5, work_division=0.5)
        >>> of_paths(["no", "no no"], steps).work_division
        0.0

    Args:
      paths: two texts or more, without labels; of more than eight the first are compared.
      work: what a path did, such as `tasks.work`.
    """
    paths = paths[:_MOST_PATHS]
    likeness = _likeness(paths)
    done = [work(path) for path in paths]
    if any(steps is None for steps in done):
        division = 1 - likeness
    else:
        counts = Counter(itertools.chain.from_iterable(map(set, done)))
        division = sum(n == 1 for n in counts.values()) / max(len(counts), 1)
    return Diversity(len({*paths}) < len(paths), likeness, division)


def _likeness(paths: Sequence[str]) -> float:
    pairs = itertools.combinations(map(_word_pairs, paths), 2)
    return statistics.fmean(2 * len(a & b) / (len(a) + len(b)) for a, b in pairs)


def _word_pairs(path: str) -> set[tuple[str, str]]:
    words = ["", *path.split(), ""]
    return {*itertools.pairwise(words)}
