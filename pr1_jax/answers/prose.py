r"""Reads the words of an answer: numbers in words, operators in words, units, sentences.

`read` gives the formula that an answer is, if it is one: `five million` is 5000000,
`She has 12 apples left` is 12. Whatever is not understood whole is said to be so, and
never stands for a part of itself.
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from pr1_jax.answers import words
from pr1_jax.answers.numerals import (
    Token,
    text_of,
    tokens_of,
    with_numbers,
    with_operators,
)

_ANSWERS = frozenset(("answer", "it", "this", "result", "solution", "correct"))
_BOUNDS = {("at", "least"), ("at", "most"), ("and", "more"), ("no", "more")}
_LETTERS = [[letter] for letter in "ABCDEFGHIJ"]
_LINKS = frozenset(("and", "or", "&"))
_JOINED = re.compile(r"\s*(?:,\s*)?(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])\s*")
_LABEL = re.compile(
    r"(?:(?:(?:so|thus|hence|therefore),? )?(?:the |it is |it's )?"
    r"(?:(?:correct|right|best|final) )?(?:answer|option|choice)?(?: is| would be)?"
    r"(?: option| choice)?[ :]*)?"
    r"(?P<open>[(\[{]\s*)?(?P<letter>[A-J])(?P<close>\s*[)\]}])?"
    r"(?P<delimiter>\s*[.:)])?(?P<rest>\s.*)?",
    re.IGNORECASE | re.DOTALL,
)
_CORRECT = re.compile(
    r"^\s+is (?:the )?(?:correct|right|best)(?: answer| option| choice)?$"
)
_OTHER_CHOICE = re.compile(
    r"^(?:wrong|incorrect|perhaps|maybe|never)\b|"
    r"(?<![A-Za-z\\])(?:[B-J](?![A-Za-z'])|A(?! [a-z]|[A-Za-z']))|^(?:or|and|not)\b"
    r"|^(?:is|isn't|was|can|cannot|could|may|might|does|doesn't|seems|looks|fails|if)\b"
)
_BOUND = re.compile(r"[<>]|\\[lg]e(?![A-Za-z])")
_OR = re.compile(r"(?<=[)\]])\s*\bor\b\s*(?=[(\[])")
_PART_OF = re.compile(
    r"([0-9]*)\\frac\{([0-9]+)\}\{([0-9]+)\}\s+(dozen|hundred|thousand|million|billion)\b"
)
_STATES = re.compile(r"\banswer\s*(?:is:?|=|:)\s*", re.IGNORECASE)
_NEXT_SENTENCE = re.compile(r"(?<=\S)[.!]\s+(?=[A-Z])")
_HOPE = re.compile(r"I hope (?:it|this|that) is (?:correct|right|clear|helpful)[.! ]*")
_NAMED = re.compile(r"[A-Za-z ,']*[A-Za-z]{3}\s*:\s+(?=[^A-Za-z\s])")
_TWICE = re.compile(r"([A-Za-z0-9 .-]+) \(([A-Za-z0-9 .-]+)\)")
_REMARK = re.compile(r"(?<=\S)\s+\(([A-Za-z][A-Za-z ,'.-]*)\)$")
_PUNCTUATION = ",.;:!?'\"`*- "
_MATH = re.compile(r"[0-9A-Za-z\\]")


@dataclass(frozen=True)
class Reading:
    """What an answer says.

    formula: the text that remains, of a formula or of words.
    known: whether all of it was understood.
    wordy: it is words alone, in lower case.
    unit: the unit that was left out, in its first spelling; "" for none or many.
    """

    formula: str
    known: bool = True
    wordy: bool = False
    unit: str = ""


def label(text: str) -> tuple[str, str] | None:
    """The letter of a choice and what follows it, as ("B", "12") of `(B) 12`."""
    match = _LABEL.fullmatch(text.strip())
    if not match or match["letter"].islower() or match["open"] and not match["close"]:
        return None
    if match["close"] and not match["open"] and match["close"].strip() != ")":
        return None
    rest = _CORRECT.sub("", match["rest"] or "").strip()
    if rest and not (match["close"] or match["delimiter"]):
        return None
    if _OTHER_CHOICE.search(rest):
        return None
    return match["letter"], rest


def read(text: str) -> Reading:
    """What `text`, as `spelling.plain` writes it, says."""
    whole, text = text, _said(text)
    if text is None:
        return Reading(whole, known=False)
    if twice := _TWICE.fullmatch(text):  # twelve (12)
        one, other = map(read, twice.groups())
        if one.known and one == other:
            return one
    if remark := _REMARK.search(text):
        inner = read(remark[1])
        outer = text[: remark.start()]
        if not (inner.known and not inner.wordy and inner.formula != outer) and (
            re.search("[0-9]", outer)
        ):
            text = outer if _harmless(remark[1].split()) else text
    text = _PART_OF.sub(_multiplied, text)
    tokens = with_operators(with_numbers(tokens_of(text)))
    if any(
        len(one.text) > 1
        and one.kind == "word"
        and one.low not in _LINKS
        and other.text == "("
        and not other.spaced
        for one, other in pairwise(tokens)
    ):  # a function that nobody knows
        return Reading(whole, known=False)
    if not _has_prose(tokens):
        return _formula(text_of(tokens))
    return _sentence(tokens)


def _multiplied(match: re.Match) -> str:
    """`2\\frac{1}{2} million` as 2500000."""
    whole, over, under, scale = match.groups()
    if int(under) == 0 or whole and int(over) >= int(under):
        return match[0]
    value = (int(whole or 0) + Fraction(int(over), int(under))) * words.SCALES[scale]
    return str(value) if value.denominator == 1 else match[0]


def _said(text: str) -> str | None:
    """`text` behind its one `answer is`, or behind words and a colon.

    None where more is said that may take it back.
    """
    starts = list(_STATES.finditer(text))
    if len(starts) == 1 and text[starts[0].end() :].strip():
        before = re.split(r"[.!?]\s", text[: starts[0].start()])[-1]
        said, *more = _NEXT_SENTENCE.split(text[starts[0].end() :], maxsplit=1)
        if not _harmless(before.split()) or more and not _HOPE.fullmatch(more[0]):
            return None
        return said.rstrip(" .")
    named = _NAMED.match(text)
    if named and _names(named[0].split()) and _labels(named[0].split()):
        text = text[named.end() :]
    return text.removeprefix("\\approx").strip()


def _formula(text: str) -> Reading:
    if "\\infty" in text:
        text = _OR.sub(r"\\cup ", text)
    if not _BOUND.search(text):  # there, words join ranges
        text = _JOINED.sub(", ", text)
    return Reading(text.strip().removeprefix("=").strip())


# --- Sentences ------------------------------------------------------------------------


def _has_prose(tokens: list[Token]) -> bool:
    """Whether some letters are words, rather than a product of variables."""
    runs = [x for x in tokens if x.kind == "word" and len(x.text) > 1]
    if any(_is_word(x) for x in runs):
        return True
    return any(
        one.kind == other.kind == "word"
        and other.spaced
        and min(len(one.text), len(other.text)) > 1
        for one, other in pairwise(tokens)
    )


def _is_word(token: Token) -> bool:
    """Whether these letters are a word of English or a unit, whatever is beside them."""
    low = token.low
    if low in _LINKS:
        return False
    return len(low) > 3 or low in words.SHORT or (words.is_unit(low) and token.spaced)


def _plain(said: list[str]) -> list[str]:
    return [word.strip(_PUNCTUATION + "()").lower() for word in said]


def _harmless(said: list[str]) -> bool:
    """Whether none of these words changes a number or denies it."""
    return not any(
        x in words.CHANGES or x in words.PARTS or _denies(x) for x in _plain(said)
    )


def follows(said: list[str]) -> bool:
    """Whether these words may follow a number, and leave it as it is."""
    if not said:
        return True
    if (
        said[0] in ("and", "or", "to", "of", "in", "out")
        or len(said[0]) < 3
        and (said[0] not in words.UNITS and said[0] not in words.BEHIND)
    ):
        return False
    near = {*said[:5]}
    changed = words.CHANGES - words.HARMLESS | words.PARTS.keys() | words.SCALES.keys()
    return not near & changed and not _BOUNDS & set(pairwise(said))


def _names(said: list[str]) -> bool:
    """Whether these words may name a quantity, as those before `is` do."""
    said = _plain(said)
    return not (
        any(x in words.ALTERS or _denies(x) for x in said)
        or _BOUNDS & set(pairwise(said))
    )


def _labels(said: list[str]) -> bool:
    """Whether these words before a colon only name what follows it."""
    said = _plain(said)
    changes = words.CHANGES - words.QUANTITIES - words.NOUNS
    return not any(x in changes or x in words.SCALES or x in words.PARTS for x in said)


def _denies(word: str) -> bool:
    return word in words.NEGATIONS or word.endswith("n't")


def _sentence(tokens: list[Token]) -> Reading:
    """The one formula of a sentence, or its words, or nothing that is understood."""
    tokens = _behind_subject(tokens)
    if tokens is None:
        return Reading("", known=False)
    pieces = _pieces(tokens)
    formulas = [k for k, (kind, _) in enumerate(pieces) if kind == "math"]
    if not formulas:
        said = " ".join(x.low for x in tokens if x.kind == "word")
        if said in ("all real numbers", "all reals"):
            return Reading(r"(-\infty, \infty)")
        return Reading(said, wordy=True)
    whole = Reading(text_of(tokens), known=False)
    if len(tokens) > 1 and [x.text for x in pieces[formulas[0]][1]] in _LETTERS:
        return whole  # not every sentence about B chooses it
    said = [x.low for kind, piece in pieces if kind == "words" for x in piece]
    first, last = formulas[0], formulas[-1]
    between = pieces[first + 1 : last]
    if any(kind == "words" and [x.low for x in p] != ["and"] for kind, p in between):
        return _same_noun(pieces) or whole
    before = [x.low for _, piece in pieces[:first] for x in piece]
    behind = [x.low for _, piece in pieces[last + 1 :] for x in piece]
    number = text_of(pieces[last][1])
    if not _states(said, before, behind, number):
        return whole
    if last + 1 < len(pieces) and not _counts(pieces[last + 1][1]):
        return whole
    texts = [text_of(pieces[k][1]) for k in formulas]
    unit = words.unit(behind)
    return Reading(_formula(", ".join(texts)).formula, unit=unit)


def _behind_subject(tokens: list[Token]) -> list[Token] | None:
    """What follows `The total is` or `Answer:`; None where the subject denies it."""
    for k in reversed(range(len(tokens) - 1)):
        if tokens[k].low not in words.COPULAS and tokens[k].text not in ("=", ":"):
            continue
        subject = tokens[:k]
        if any(x.kind == "number" or _computes(x.text) for x in subject):
            continue
        if not subject:
            continue
        follows = k + 1
        while follows < len(tokens) and tokens[follows].low in words.ABOUT | {":", "="}:
            follows += 1
        if follows == len(tokens):
            return tokens
        said = [x.low for x in subject]
        if not _names(said) or tokens[k].text == ":" and not _labels(said):
            return None
        rest = tokens[follows:]
        first = 1 if rest[0].text == "-" and len(rest) > 1 else 0
        choice = len(rest) == 1 and rest[0].kind == "word"
        if choice and subject[-1].low not in _ANSWERS:
            continue
        if _is_math(rest[first], rest, first):
            return rest
        if not _any_math(rest) and subject[-1].low in _ANSWERS:
            return rest
    return tokens


def _computes(text: str) -> bool:
    return (
        text[0] in "=<>:^*/!"
        or text[0] == "\\"
        and text not in ("\\angle", "\\triangle")
    )


def _any_math(tokens: list[Token]) -> bool:
    return any(_is_math(x, tokens, k) for k, x in enumerate(tokens))


def _is_math(token: Token, tokens: list[Token], k: int) -> bool:
    """Whether a token of a sentence belongs to a formula in it."""
    if token.kind == "number" or token.text.startswith("\\"):
        return True
    if token.kind == "word":
        if len(token.text) > 1:
            return False
        article = token.low in ("a", "i")
        beside = tokens[k + 1 : k + 2]
        around = [*tokens[max(0, k - 1) : k], *beside]
        if (
            token.text.isupper()
            and len(around) == 2
            and (all(x.kind == "word" and len(x.text) > 1 for x in around))
        ):  # Building C has
            return False
        return not (article and (not beside or beside[0].kind == "word"))
    return token.text not in _PUNCTUATION


def _pieces(tokens: list[Token]) -> list[tuple[str, list[Token]]]:
    """Runs of words and of formulas, in turn, without the punctuation around formulas."""
    runs = []
    for k, token in enumerate(tokens):
        word = token.kind == "word" and not _is_math(token, tokens, k)
        kind = "words" if word else "math"
        if not runs or runs[-1][0] != kind:
            runs.append((kind, []))
        runs[-1][1].append(token)
    pieces = []
    for kind, run in runs:
        if kind == "math":
            run = _trimmed(run)
            if not any(_MATH.search(x.text) for x in run):
                if any(x.text not in _PUNCTUATION + "()[]" for x in run):
                    pieces.append(("math", run))
                continue
        if pieces and kind == "words" and pieces[-1][0] == "words":
            pieces[-1][1].extend(run)
        else:
            pieces.append((kind, run))
    return pieces


def _trimmed(run: list[Token]) -> list[Token]:
    """A formula without punctuation, and without brackets that open or close in words."""
    while run and (run[-1].text in ",.;:?'\"`* " or _unbalanced(run, -1)):
        run = run[:-1]
    while run and (run[0].text in ",;:.?'\"`* " or _unbalanced(run, 0)):
        run = run[1:]
    return run


def _unbalanced(run: list[Token], at: int) -> bool:
    depth = sum((x.text == "(") - (x.text == ")") for x in run)
    return run[at].text == ("(" if at == 0 else ")") and depth == (1 if at == 0 else -1)


def _states(said: list[str], before: list[str], behind: list[str], number: str) -> bool:
    """Whether a sentence with these words around its formula just states it."""
    if any(x == "than" or x in words.PARTS or _denies(x) for x in said):
        return False
    if _BOUNDS & set(pairwise(said)) or {"at", "least"} <= set(behind):
        return False
    if "and" in (before[-1:] + behind[:1]) or behind[:1] == ["to"]:
        return False  # something else belongs to it
    if len(before) == 1 and before[0] not in words.LEADS:
        return False  # sine 30, point 5
    before = [
        x
        for last, x in zip(["", *before], before)
        if not (x == "up" and last in words.RAISED)
    ]
    if behind and not _is_counted(behind, number):
        return False
    *_, article, noun, link = ["", "", "", *before]
    named = noun in words.QUANTITIES or article in ("a", "an", "the")
    sums_up = link == "to" and noun in ("comes", "came", "amounts", "adds", "out")
    if (link == "of" and named) or sums_up:
        before = before[:-1]
    if behind[-2:] == ["left", "over"]:
        behind = behind[:-1]
    if behind[:1] == ["times"] and (len(behind) == 1 or behind[1] in ("a", "per")):
        behind = behind[1:]
    if any(x in words.CHANGES - words.HARMLESS for x in before[-3:] + behind):
        return False
    return not any(x in words.CHANGES for x in before[-1:])


def _is_counted(behind: list[str], number: str) -> bool:
    """Whether these words go on about what a number counts, as red apples do."""
    if (number == "1" or number.startswith(("0.", "\\frac"))) and (
        behind[0] not in words.CHANGES
    ):  # one apple
        return True
    if behind in (["square"], ["cubic"]):
        return False
    known = words.is_unit(behind[0]) or behind[0] in words.BEHIND
    if known or not behind[0].isalpha():
        return True
    nouns = behind[:4]
    return any(
        x.endswith("s") and not x.endswith("ss") or x in words.BEHIND for x in nouns
    )


def _counts(noun: list[Token]) -> bool:
    """Whether the words behind a formula may name what it counts or measures.

    A word without a space before it may be a product of letters.
    """
    if noun[0].spaced:
        return True
    return words.is_unit(re.match("[a-z]*", noun[0].low)[0])


def _same_noun(pieces: list[tuple[str, list[Token]]]) -> Reading | None:
    """The list of `3 cm and 4 cm`; None where things differ."""
    formulas = [text_of(piece) for kind, piece in pieces if kind == "math"]
    nouns = [[x.low for x in piece] for kind, piece in pieces if kind == "words"]
    if pieces[0][0] == "words" or pieces[-1][0] == "math":
        return None
    plain = [[x for x in noun if x not in _LINKS] for noun in nouns]
    unit = words.UNITS.get(plain[0][0]) if len(plain[0]) == 1 else None
    if unit is None or any(noun != plain[0] for noun in plain):
        return None
    return Reading(", ".join(formulas), unit=unit)
