"""Targets that read text: layout, format check, canonical form, answers."""

import json
import re
from collections.abc import Sequence

import numpy as np

from pr1_jax import layout, tags
from pr1_jax.answers import pool, published
from pr1_jax.answers.extract import extract
from pr1_jax.answers.verdicts import CORRECT, INCORRECT, UNDECIDED, Result
from pr1_jax.answers.verify import FAILED, check
from tests.programs.fuzz.base import one_line

VERDICTS = (CORRECT, INCORRECT, UNDECIDED)


# --- Bytes to text ------------------------------------------------------------------

_TAG_PIECES = (
    *tags.TAGS,
    *("\n", " ", "a", "<", ">", "/", "<Path", "Parallel>", "</", "\u2028", "\x1f"),
)
_ANSWER_PIECES = (
    *("Final Answer:", "final answer** :", "\n", "\\boxed{", "\\fbox {", "{", "}"),
    *("$", "$$", "\\(", "\\)", "\\", "\\\\", "**", "`", "<|im_end|>", "<|", "|>"),
    *("0", "1", "12", "999", ".", ",", "/", "%", "-", "+", "e", "E", "_", "^", "="),
    *("\\frac{", "\\dfrac", "}{", "\\text{", "\\mathrm{", "\\sqrt", "\\pi", "\\circ"),
    *(" ", "  ", "\\,", "{,}", "\\%", "\\$", "€", "½", "²", "₈", "π", "√", "−", "٣"),
    *("x", "y=", "i", " or ", " and ", "is ", "meters", " cm", "\\pm ", "<", "\\le"),
    *("(", ")", "[", "]", "\\{", "\\}", "\\begin{cases}", "&", "\\end{cases}", ";"),
    *(
        "five ",
        "hundred ",
        "million",
        "half ",
        "dozen",
        "-",
        "minus ",
        "times ",
        " of ",
    ),
    *("squared", "at least ", "not ", "She has ", "apples", " km", "m/s", "answer is "),
    *("...", "\\ldots", "\\dot ", "\\approx ", "\\equiv ", "\\in ", "B. ", "(B) ", ":"),
    *("US$", "k", "°C", '["', '", "', '"]', "：", "\n$$\n", "```\n", "exp(", "sqrt("),
    *("\\overline{", "an ", "a ", "square", "mbox", "frac", "sqrt", "\ud800", "\x00"),
    *tags.TAGS,
)
_MAX_CHARS = 3_000
_TAG_LETTERS = "PpTtSsQq"  # in the order of `Grammar.tags`
_PLANNED = tags.Grammar(planned=True)


def as_text(content: bytes, pieces: Sequence[str]) -> str:
    """A text made of raw UTF-8, or of pieces, maybe of one part many times over."""
    if not content:
        return ""
    mode, rest = content[0], content[1:]
    if mode & 1:
        text = rest.decode("utf-8", "surrogateescape" if mode & 4 else "replace")
    else:
        text = "".join(pieces[byte % len(pieces)] for byte in rest)
    if mode >= 224 and text:
        third = len(text) // 3
        start, middle, end = text[:third], text[third : -third or None], text[-third:]
        times = min(4 << mode % 16, _MAX_CHARS // len(middle))
        text = start + middle * times + (end if third else "")
    return text


def _letters(text: str, grammar: tags.Grammar = tags.PLAIN) -> str:
    """The tags of a text, one letter each."""
    letters = dict(zip(grammar.tags, _TAG_LETTERS))
    return "".join(letters[tag] for tag in re.findall("|".join(grammar.tags), text))


# --- Layout, format, canonical form -------------------------------------------------

_TAG_IDS = {tag: 10 + i for i, tag in enumerate(_PLANNED.tags)}
_SYMBOLS = dict(zip(_TAG_LETTERS, _TAG_IDS.values())) | {"n": 2, ".": 3}
_BLOCK = re.compile("P(?P<plans>(?:Q[.n]*q)*)(?:T[.n]*t){2,}p[.n]S[.n]*s")


def _is_whole(symbols: str, planned: bool, between: str = "[.n]") -> bool:
    """Whether symbols follow the grammar: as many plans as paths, or none.

    Args:
      between: pattern of what is no tag.
    """
    rest = _BLOCK.sub(
        lambda block: (
            "" if block[0].count("Q") == block[0].count("T") * planned else "bad"
        ),
        symbols,
    )
    return bool(re.fullmatch(f"{between}*", rest))


def _positions(symbols: str, start: int) -> list[tuple[int, int, int]]:
    """Position, block and path of each symbol, as docs/method.md, sections 2 and 10."""
    found, at, number = [], start, 0
    index = 0
    while index < len(symbols):
        block = _BLOCK.match(symbols, index)
        if not block:
            found.append((at, 0, 0))
            at, index = at + 1, index + 1
            continue
        number += 1
        before = 1 + len(block["plans"])  # <Parallel> and the plans
        found += [(at + i, 0, 0) for i in range(before)]
        at += before - 1
        paths = re.findall("T[.n]*t", block.group())
        for path, text in enumerate(paths, 1):
            found += [(at + 1 + i, number, path) for i in range(len(text))]
        at += 1 + max(map(len, paths))
        rest = len(block.group()) - before - sum(map(len, paths))
        found += [(at + i, 0, 0) for i in range(rest)]
        at, index = at + rest, block.end()
    return found


def _sees(symbols: str, labels: Sequence[tuple[int, int, int]], q: int, k: int) -> bool:
    """Section 2: whether query q sees key k."""
    _, block, path = labels[k]
    if k > q or not block or labels[q][1:] == (block, path):
        return k <= q
    ends = [i for i, symbol in enumerate(symbols) if symbol == "p"]
    return ends[block - 1] <= q


def check_layout(content: bytes, grammar: tags.Grammar = tags.PLAIN) -> None:
    """The parser accepts the grammar, nothing else, and labels it as docs/method.md says."""
    prompt_length = content[0] % 5 if content else 0
    letters = "PpTtSsn." + "Qq" * grammar.planned
    symbols = "".join(letters[byte % len(letters)] for byte in content[1:])
    tokens = [_SYMBOLS[symbol] for symbol in symbols]
    tag_ids = {tag: _TAG_IDS[tag] for tag in grammar.tags}
    is_whole = _is_whole(symbols, grammar.planned)
    try:
        parsed = layout.structured(tokens, tag_ids, prompt_length)
    except ValueError as error:
        one_line(error, "malformed response")
        assert not is_whole, f"{symbols} is refused: {error}"
        return
    assert is_whole, f"{symbols} is accepted"
    expected = [(i, 0, 0) for i in range(prompt_length)]
    expected += _positions(symbols, prompt_length)
    assert np.stack(parsed, axis=1).reshape(-1, 3).tolist() == [*map(list, expected)]
    if len(symbols) <= 40:
        labels = expected[prompt_length:]
        dense = layout.visible(parsed)[prompt_length:, prompt_length:]
        for q, k in np.ndindex(dense.shape):
            assert dense[q, k] == _sees(symbols, labels, q, k), (symbols, q, k)


def _pieces(grammar: tags.Grammar) -> tuple[str, ...]:
    return _TAG_PIECES + tags.PLAN_TAGS * grammar.planned


def check_format(content: bytes, grammar: tags.Grammar = tags.PLAIN) -> None:
    """The format check never raises, and finds no fault in the grammar alone."""
    text = as_text(content, _pieces(grammar))
    faults = tags.check_format(text, grammar)
    letters = _letters(text, grammar).replace("pS", "p.S")  # where the newline stands
    well_formed = _is_whole(letters, grammar.planned, between="(?!)")
    assert (not faults) == well_formed, (text, faults)
    for fault in faults:
        named = re.match(r"(</?\w+>) at (\d+): expected ", fault)
        assert named and text.startswith(named[1], int(named[2])), fault


def check_canonical(content: bytes, grammar: tags.Grammar = tags.PLAIN) -> None:
    """Canonical text is canonical, well formed, and only white space was removed."""
    text = as_text(content, _pieces(grammar))
    try:
        found = tags.canonical(text, grammar)
    except ValueError as error:
        one_line(error, "text has")
        stray = "stray text" in str(error)
        assert bool(tags.check_format(text, grammar)) != stray, (text, error)
        return
    assert tags.check_format(found, grammar) == [] == tags.check_format(text, grammar)
    assert tags.canonical(found, grammar) == found
    assert tags.count_blocks(found) == tags.count_blocks(text)
    same = _letters(found, grammar) == _letters(text, grammar)
    assert found.replace("\n", "") in text or same
    assert "".join(found.split()) == "".join(text.split())


# --- Answers ------------------------------------------------------------------------


class NoWorkers:
    """Stands in for the worker processes: all that needs one is undecided."""

    def ask(self, answer: str, reference: str, timeout_sec: float) -> Result:
        """Checks that both can be sent to a worker."""
        json.dumps([answer, reference, timeout_sec])
        return Result(UNDECIDED, "not asked")

    def close(self) -> None:
        """Nothing to close."""


def _response_and_reference(content: bytes) -> tuple[str, str]:
    cut = 1 + content[0] * len(content) // 256 if content else 0
    return (
        as_text(content[1:cut], _ANSWER_PIECES),
        as_text(content[cut:], _ANSWER_PIECES),
    )


def check_answer_parser(content: bytes) -> None:
    """What is decided in this process: extraction, spelling, numbers; both checkers."""
    response, reference = _response_and_reference(content)
    kept, pool._pool = pool._pool, NoWorkers()
    try:
        result = check(response, reference)
        itself = check(f"Final Answer: {reference}", reference)
    finally:
        pool._pool = kept
    assert result.verdict in VERDICTS and FAILED not in result.reason
    assert itself.verdict in VERDICTS and FAILED not in itself.reason
    found = extract(response)
    assert found is None or found.strip(), (response, found)
    assert found is not None or result.verdict == INCORRECT
    assert isinstance(published.check(response, reference), bool)


def check_answer(content: bytes) -> None:
    """The whole check, worker process included, within its time limit."""
    response, reference = _response_and_reference(content)
    result = check(response, reference, timeout_sec=1.0)
    assert result.verdict in VERDICTS and FAILED not in result.reason


def answer_seeds() -> list[bytes]:
    """Answers with their references."""
    pairs = [
        ("Final Answer: 1,000", "1000"),
        (r"so \boxed{\frac{1}{2}} cm", "0.5"),
        ("Final Answer: $x \\le 3$", "(-\\infty, 3]"),
        ("**Final Answer:** 3 meters<|im_end|>", "3"),
        ("Final Answer: two and a half million", "2500000"),
        ("**Final Answer:**\nShe has 5 times 2 apples", '["10"]'),
    ]
    seeds = []
    for response, reference in pairs:
        parts = b"\x01" + response.encode(), b"\x01" + reference.encode()
        size = sum(map(len, parts)) + 1
        seeds.append(bytes([-(-256 * len(parts[0]) // size)]) + b"".join(parts))
    return seeds
