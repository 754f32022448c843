r"""What the spelling of two answers decides, and how it is prepared for math-verify.

`normal` brings an answer into a spelling that math-verify reads as a person would.
`quick` decides within microseconds where the spellings, words or plain numbers are the
same, or where both are plain numbers. The rest goes to a worker (`pool`).

Where public suites of equal answers contradict each other, math-verify is followed:

- Decimals agree to six places, small ones to six digits: 0.333333 is 1/3, 0.33 is
  not; 40\pi is not 125.66. Whole numbers and fractions agree exactly.
- 50% is 0.5 and also 50. Units, degree signs and currencies are ignored.
- A list is a set and has no order; a tuple has one: (1,2) is not (2,1), but either
  may answer for the list 1,2. (1,2) may be an open interval; [1,2] is never a set.
- 1 \pm 2 is the list 3,-1; several such signs in one item are not written out.
- x=5 is 5, but not y=5. An inequality is its interval, `x<1 or x>3` their union.
- A base may be left out: 25_8 is 25, not 25_7. The letter i may be the root of -1.
- Words count as a whole, without case; other sentences are undecided.
"""

import re
import unicodedata
from fractions import Fraction

from pr1_jax.answers.extract import MAX_CHARS, bare, boxes
from pr1_jax.answers.verdicts import CORRECT, INCORRECT, UNDECIDED, Result

_NUMBER = re.compile(r"([+-]?)([1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]*)(\.[0-9]+)?")
_FRACTION = re.compile(
    r"([+-]?)(?:([0-9]+)/([0-9]+)|\\[dt]?frac\{(-?[0-9]+)\}\{([0-9]+)\})"
)
_DECIMAL_COMMA = re.compile(r"([+-]?[0-9]+),([0-9]+)")
_IN_BASE = re.compile(r"([0-9A-Za-z]+)_(?:([0-9])|\{([0-9]{1,2})\})")
_SEPARATOR = r"(?:,|\{,\}|\\,|\\ |~|\\!,\\!|,\\!|[ \u00a0\u2009\u202f])"
_THOUSANDS = re.compile(
    rf"[+-]?[1-9][0-9]{{0,2}}(?:{_SEPARATOR}[0-9]{{3}})+(?=$|\.[0-9]|\s*[A-Za-z%\\])"
)
_CURRENCY = re.compile(r"^([+-]?)(?:\\\$|[$€£¥₹])\s*(?=[0-9.])")
_MIXED = re.compile(r"([+-]?[0-9]+) ([0-9]+)/([0-9]+)")
_SCIENTIFIC = re.compile(r"([+-]?[0-9.]+)[eE]([+-]?[0-9]+)")
_LEADING_WORDS = re.compile(
    r"(?:[A-Za-z ,'’]*\b)?(?:is|are|be|equals|equal to|about|approximately)\b:?\s+"
)
_UNIT = re.compile(  # words after a number; short ones may be products of variables
    r"(?:(?<=[0-9})\]])|(?<=\\pi))\s+(?!(?:percent|percentage|sqrt|choose)\b)"
    r"(?:[A-Za-z]{4,}|cup|day|hrs?|mins?|secs?|[cmk]?m|k?g|mg|lbs?|oz|ft|in|[mk]ph|USD)"
    r"\b[A-Za-z /.-]*(?:\^?\{?[23]\}?)?$"
)
_TEXT = re.compile(r"\\(?:text|mathrm|mathbf)(?:bf|rm)?\{([^{}]*)\}")
_NON_ASCII = re.compile(r"[^\x00-\x7f]")
_ROOT = re.compile(r"√\s*([0-9]+|[A-Za-z]|\([^()]*\))")
_SYMBOLS = str.maketrans(
    {
        "−": "-",
        "⁄": "/",
        "÷": "/",
        "×": r"\times ",
        "·": r"\cdot ",
        "⋅": r"\cdot ",
        "±": r"\pm ",
        "√": r"\sqrt ",
        "°": r"^{\circ}",
        "≤": r"\le ",
        "≥": r"\ge ",
        "≠": r"\ne ",
        "∞": r"\infty ",
        "∪": r"\cup ",
        "∩": r"\cap ",
        "∈": r"\in ",
        "∅": r"\emptyset ",
    }
)
_SPACING = re.compile(  # not between digits, where 1 2 is not 12
    r"\\(?:left|right)(?![a-z])|\\[,;!:]|(?<![0-9\s])\s+|\s+(?![0-9\s])"
)
_LISTS = re.compile(r"[,;]|\b(?:and|or)\b")
_DOUBLE_ESCAPED = re.compile(r"(?:[^\\]|\\\\)*\\\\[A-Za-z](?:[^\\]|\\\\)*")


def _ascii(char: str) -> str:
    """LaTeX or ASCII for a digit, letter or power outside ASCII, else `char`."""
    form, *codes = unicodedata.decomposition(char).split() or [""]
    if form in ("<super>", "<sub>"):
        plain = "".join(chr(int(code, 16)) for code in codes)
        return ("^" if form == "<super>" else "_") + f"{{{plain}}}"
    if form == "<fraction>":
        return r"\frac{{{}}}{{{}}}".format(
            *unicodedata.normalize("NFKC", char).split("⁄")
        )
    if form.startswith("<"):
        return unicodedata.normalize("NFKC", char)
    greek = re.fullmatch(
        r"GREEK (SMALL|CAPITAL) LETTER ([A-Z]+)", unicodedata.name(char, "")
    )
    if greek:
        name = greek[2].lower()
        return f"\\{name if greek[1] == 'SMALL' else name.capitalize()} "
    return str(unicodedata.decimal(char, char))


def _without_boxes(text: str) -> str:
    """The last boxes of `text` that make one list, if there are several boxes."""
    spans, listed = boxes(text), []
    if len(spans) < 2:
        return text
    for start, end in reversed(spans):
        gap = text[end + 1 : listed[0][0]] if listed else ""
        if listed and end >= listed[0][0]:  # around another box
            continue
        if len(gap) > 60 or (len(gap) > 20 and not _LISTS.search(gap)):
            break
        listed.insert(0, (start, end))
    return ", ".join(dict.fromkeys(text[slice(*box)] for box in listed))


def normal(answer: str) -> str:
    """`answer` in the spelling that math-verify reads as a person would."""
    text = _without_boxes(bare(answer))
    if not text.isascii():
        text = _ROOT.sub(r"\\sqrt{\1}", text).translate(_SYMBOLS)
        text = _NON_ASCII.sub(lambda x: _ascii(x[0]), text).replace("}^{", "")
    if _DOUBLE_ESCAPED.fullmatch(text):
        text = text.replace("\\\\", "\\")
    if inner := _TEXT.fullmatch(text):
        text = inner[1]
    text = _CURRENCY.sub(r"\1", text)
    text = text.replace(r"\$", "")
    if text.count("$") % 2:
        text = text.replace("$", "")
    if words := _LEADING_WORDS.match(text):
        text = _CURRENCY.sub(r"\1", text[words.end() :])
    if number := _THOUSANDS.match(text):
        text = re.sub(r"[^0-9+-]", "", number.group()) + text[number.end() :]
    if mixed := _MIXED.fullmatch(text):
        return r"{}\frac{{{}}}{{{}}}".format(*mixed.groups())
    if scientific := _SCIENTIFIC.fullmatch(text):
        return r"{} \times 10^{{{}}}".format(*scientific.groups())
    return _UNIT.sub("", text).strip()


def _number(text: str) -> Fraction | None:
    """The value of a plain number or fraction of at most 12 digits, else None."""
    if len(text) > 30 or not 0 < sum(map(str.isdigit, text)) <= 12:
        return None
    if _NUMBER.fullmatch(text):
        return Fraction(text.replace(",", ""))
    if not (match := _FRACTION.fullmatch(text)):
        return None
    sign, *parts = match.groups()
    over, under = (int(part) for part in parts if part is not None)
    if under == 0:
        return None
    return Fraction(-over if sign == "-" else over, under)


def _spelling(text: str) -> str:
    """`text` without what changes only how its formulas look."""
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    return _SPACING.sub("", text)


def _same_digits(answer: str, reference: str) -> bool | None:
    """Whether numbers in a base or with a decimal comma agree, None without them.

    A base may be left out; a comma is decimal only beside a decimal point.
    """
    based = [_IN_BASE.fullmatch(text) for text in (answer, reference)]
    if all(based):
        (one, base), (other, other_base) = ((x[1], int(x[2] or x[3])) for x in based)
        try:
            return int(one, base) == int(other, other_base)
        except ValueError:  # a name such as x_1, or not digits of that base
            return (one, base) == (other, other_base)
    if any(based):
        digits = [x[1] if x else y for x, y in zip(based, (answer, reference))]
        return True if digits[0] == digits[1] else None
    for one, other in ((answer, reference), (reference, answer)):
        if (comma := _DECIMAL_COMMA.fullmatch(one)) and "." in other:
            value, wanted = _number("{}.{}".format(*comma.groups())), _number(other)
            return True if value is not None and value == wanted else None
    return None


def quick(answer: str, reference: str) -> Result | None:
    """The verdict on two answers as `normal` spells them; None if a worker must decide.

    Args:
      answer, reference: as they are where they are too long for `normal`.
    """
    for name, text in (("answer", answer), ("reference", reference)):
        if len(text) > MAX_CHARS:
            return Result(UNDECIDED, f"the {name} has over {MAX_CHARS} characters")
    if not reference:
        return Result(UNDECIDED, "the reference is blank")
    if answer == reference:
        return Result(CORRECT, "the answer is the reference")
    if _spelling(answer) == _spelling(reference):
        return Result(CORRECT, "the answer is spelled as the reference")
    if answer.replace(" ", "").isalpha() and answer.casefold() == reference.casefold():
        return Result(CORRECT, "the words are the same")
    if (same := _same_digits(answer, reference)) is not None:
        verdict = CORRECT if same else INCORRECT
        return Result(verdict, "the digits or their values are compared")
    value, wanted = _number(answer), _number(reference)
    if value is None or wanted is None:
        return None
    places = Fraction(5, 10_000_000)
    if wanted:  # of a small number six digits, lest all of them be 0
        places = min(places, 4 * places * abs(wanted))
    exact = "." not in answer + reference
    if abs(value - wanted) <= (0 if exact else places):
        return Result(CORRECT, "the numbers are equal")
    return Result(INCORRECT, f"{answer} is not {reference}")
