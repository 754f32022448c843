r"""What blocks are used for, read off the text of responses (docs/method.md, section 8).

The functions take rollout records, the dicts in `rollouts/*.jsonl`; `summarize` takes the
labels of paths out of their texts. Whatever a model wrote is read as far as it goes
(`diversity.read_blocks`).

A *conclusion* is what two texts are compared by: the answer in a path's `\boxed{}` or
`Final Answer:` line, else its last number; in the language of a task made by code what
`tasks.conclusion` reads. All that follows from conclusions is read from words, and
is a heuristic.
"""

import dataclasses
import functools
import itertools
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from pr1_jax import diversity, tags
from pr1_jax.answers.extract import bare, boxes, extract
from pr1_jax.data import tasks
from pr1_jax.diversity import Block

Record = Mapping[str, Any]

_NUMBER = re.compile(
    r"(?:(?<![\w)\]])-)?"  # a minus, not a difference
    r"(?:[0-9]{1,3}(?:,[0-9]{3}){1,12}(?![0-9])|[0-9]{1,40})(?:\.[0-9]{1,40})?"
    r"(?:/[1-9][0-9]{0,11})?"
)
_VERIFIES = re.compile(
    r"\b(?:verif|double.?check|re.?check|check(?:s|ed|ing)?\b|confirm|validat|sanity)",
    re.IGNORECASE,
)
_LEAD = 200  # characters that announce a block


def read_blocks(record: Record) -> list[Block]:
    """The blocks of a response in order, well formed or not.

    Where the record has a trace, they start at a share of its tokens, else of its
    characters.

        >>> read_blocks({"response": "So: <Parallel><Path>1</Path><Path>2</Path>"
        ...              "</Parallel>\\n<Summary>It is 2.</Summary> Thus 2."})
        [Block(start=0.044..., lead='So: ', paths=('1', '2'), summary='It is 2.')]
    """
    blocks = diversity.read_blocks(record["response"])
    pieces = (record.get("trace") or {}).get("pieces", [])
    tokens = [i for i, piece in enumerate(pieces) if piece == tags.PARALLEL]
    if len(tokens) != len(blocks):
        return blocks
    starts = [i / len(pieces) for i in tokens]
    return [dataclasses.replace(b, start=x) for b, x in zip(blocks, starts)]


def _blocks(records: Iterable[Record]) -> Iterable[Block]:
    return itertools.chain.from_iterable(map(read_blocks, records))


def relative_positions(records: Iterable[Record]) -> list[float]:
    """Where each block starts, as a share of its response (the paper's figure 3).

        >>> relative_positions([{"response": "0123456789<Parallel>"}])
        [0.5]

    Returns:
      One number a block, from 0 to 1.
    """
    return [block.start for block in _blocks(records)]


def path_diversity(
    records: Iterable[Record],
    embed: Callable[[list[str]], np.ndarray] | None = None,
) -> list[float]:
    """How alike the paths of each block are; lower is more diverse.

    The mean over ordered pairs of sibling paths of sentence BLEU (sacrebleu, its
    `13a` words, exponential smoothing, up to four words in a row, fewer in a shorter
    path), from 0 to 1; or, with `embed`, of their cosine. Blank paths are left out.

        >>> path_diversity([{"response": "<Parallel><Path>a b c d</Path>"
        ...                              "<Path>a b c d</Path></Parallel>"}])
        [1.0]

    Args:
      embed: texts -> [texts, features], by an embedding model of your choice.

    Returns:
      One number a block with two or more paths.
    """
    groups = [[p for p in block.paths if p.strip()] for block in _blocks(records)]
    groups = [paths for paths in groups if len(paths) >= 2]
    alike = _bleu if embed is None else _cosines(groups, embed)
    return [
        float(np.mean([alike(a, b) for a, b in itertools.permutations(paths, 2)]))
        for paths in groups
    ]


@functools.lru_cache(maxsize=4096)
def _bleu(hypothesis: str, reference: str) -> float:
    if hypothesis == reference:
        return 1.0
    score = _sentence_bleu().sentence_score(hypothesis, [reference]).score
    return score / 100


@functools.cache
def _sentence_bleu():
    from sacrebleu.metrics import BLEU  # a tenth of a second, and not always needed

    return BLEU(effective_order=True)


def _cosines(
    groups: Sequence[Sequence[str]], embed: Callable[[list[str]], np.ndarray]
) -> Callable[[str, str], float]:
    texts = list(dict.fromkeys(itertools.chain.from_iterable(groups)))
    vectors = np.asarray(embed(texts), np.float64) if texts else np.zeros((0, 1))
    if vectors.ndim != 2 or len(vectors) != len(texts):
        raise ValueError(
            f"embed returned an array of shape {vectors.shape} for {len(texts)} texts: "
            "it must be [texts, features]"
        )
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    units = dict(zip(texts, vectors / np.maximum(lengths, 1e-12), strict=True))
    return lambda a, b: float(units[a] @ units[b])


def conclusion(text: str) -> str | None:
    r"""What a path concludes, in a form that can be compared; None if nothing.

    >>> conclusion("So 2 * 600 = 1,200.00 dollars.")
    '1200'
    >>> conclusion(r"Hence \boxed{x+1} for all 3")
    'x+1'
    >>> conclusion("left 4+21 no 13+12 yes"), conclusion("left 4+21 no ")
    ('12+13', 'no')
    """
    if (reached := tasks.conclusion(text)) is not None:
        return reached
    spans = boxes(text)
    answer = bare(text[slice(*spans[-1])]) if spans else extract(text)
    if answer:
        number = _NUMBER.fullmatch(answer)
        return _plain(number.group()) if number else "".join(answer.split())
    number = _last(_NUMBER, text)
    return _plain(number.group()) if number else None


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    return max(pattern.finditer(text), key=lambda match: match.start(), default=None)


def _plain(number: str) -> str:
    """1,200.50 -> 2401/2, the same for equal numbers."""
    over, _, under = number.replace(",", "").partition("/")
    return str(Fraction(over) / int(under or 1))


def _conclusions(block: Block) -> list[tuple[str, str]]:
    """Paths that reach a conclusion, each with it."""
    pairs = [(path, conclusion(path)) for path in block.paths]
    return [(path, reached) for path, reached in pairs if reached is not None]


def path_agreement(records: Iterable[Record]) -> list[float]:
    """Do the paths of a block reach the same conclusion?

        >>> path_agreement([{"response": "<Parallel><Path>so 4</Path><Path>or 5</Path>"
        ...                              "<Path>= 4.0</Path></Parallel>"}])
        [0.333...]

    Returns:
      The share of pairs of sibling paths that do, one number a block with two or more
      paths that reach a conclusion.
    """
    shares = []
    for block in _blocks(records):
        reached = [c for _, c in _conclusions(block)]
        if len(reached) >= 2:
            pairs = itertools.combinations(reached, 2)
            shares.append(float(np.mean([a == b for a, b in pairs])))
    return shares


def summaries_follow_majority(records: Iterable[Record]) -> list[bool]:
    """Does a summary follow most of its paths, where paths disagree?

    A summary follows the conclusion that it names last.

        >>> summaries_follow_majority([{"response":
        ...     "<Parallel><Path>so 4</Path><Path>or 5</Path><Path>4</Path></Parallel>"
        ...     "\\n<Summary>Not 5 but 4.</Summary>"}])
        [True]

    Returns:
      One answer for each block with a summary whose paths disagree and of which more
      come to one conclusion than to any other.
    """
    follow = []
    for block in _blocks(records):
        reached = Counter(c for _, c in _conclusions(block)).most_common(2)
        if len(reached) < 2 or not block.summary.strip():
            continue
        (top, most), (_, second) = reached
        if most > second:
            known = {c for _, c in _conclusions(block)}
            follow.append(_named_last(block.summary, known) == top)
    return follow


def _summarized(summary: str) -> str | None:
    """What a summary concludes."""
    reached = tasks.conclusion(summary, summary=True)
    return conclusion(summary) if reached is None else reached


def _named_last(summary: str, known: set[str]) -> str | None:
    """The last of the known conclusions that a summary names."""
    named = [_plain(match.group()) for match in _NUMBER.finditer(summary)]
    candidates = (_summarized(summary), *reversed(named))
    return next((c for c in candidates if c in known), None)


def verifies(block: Block, known: Collection[str] = ()) -> bool:
    """Whether a block verifies something rather than explores. A heuristic.

    It does if a word for it (verify, check, confirm, validate, ...) stands in the last
    200 characters before it or in the first sentence of a path; or if half or more of
    its conclusions are known: by an earlier block of the response (by a path or by the
    summary), or by the main stream just before it.

        >>> paths = ("With C cats and 2 dogs, C = 4.", "6 - 2 = 4")
        >>> verifies(Block(0.2, "Now the cats. ", paths, ""))
        False
        >>> verifies(Block(0.2, "So there are 4 cats. ", paths, ""))
        True

    Args:
      known: conclusions of earlier blocks.
    """
    openings = [re.split(r"[.\n]", path.strip(), maxsplit=1)[0] for path in block.paths]
    if any(_VERIFIES.search(text) for text in (block.lead[-_LEAD:], *openings)):
        return True
    reached = [c for _, c in _conclusions(block)]
    known = {*known, conclusion(block.lead)} - {tasks.NOTHING}
    return bool(reached) and 2 * sum(c in known for c in reached) >= len(reached)


def verifications(records: Iterable[Record]) -> list[bool]:
    """Whether each block verifies something (`verifies`)."""
    judged = []
    for record in records:
        known: set[str] = set()
        for block in read_blocks(record):
            judged.append(verifies(block, known))
            known |= {c for _, c in _conclusions(block)}
            known |= {_summarized(block.summary)} - {None}
    return judged


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def figures_of_paths(
    record: Record, grammar: tags.Grammar = tags.PLAIN
) -> list[diversity.Diversity]:
    """Whether the paths of each block did different things, in order of the blocks.

    A record states it, too, but one of an older version does not.
    """
    return diversity.of_response(record["response"], tasks.work, grammar)


def _unlabelled(record: Record, grammar: tags.Grammar) -> Record:
    """A record whose paths have no labels in its text."""
    pieces = tags.split_labels(record["response"], grammar)
    return {**record, "response": "".join(x for x, path in pieces if path is None)}


def asked(question: str) -> str:
    """What a question asks for in plain words, "" where only it says so."""
    return tasks.asked(question) or ""


def summarize(
    records: Sequence[Record], grammar: tags.Grammar = tags.PLAIN
) -> dict[str, float | None]:
    """One figure for each analysis, a mean over blocks; None where there is none.

    Args:
      grammar: of responses; labels of paths are taken out first.
    """
    records = [_unlabelled(record, grammar) for record in records]
    paths = [x for record in records for x in figures_of_paths(record)]
    return {
        "relative_position": _mean(relative_positions(records)),
        "path_bleu": _mean(path_diversity(records)),
        "path_agreement": _mean(path_agreement(records)),
        "summary_follows_majority": _mean(summaries_follow_majority(records)),
        "verification_share": _mean(verifications(records)),
        **{n: _mean([getattr(x, n) for x in paths]) for n in diversity.FIGURES},
    }
