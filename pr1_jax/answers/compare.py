r"""What two answers decide by themselves, and what is left for a worker.

`quick` decides within microseconds where spellings, words, choices or plain numbers
settle it. The rest are two formulas for `pool`. The policy is the table of
docs/method.md, section 5.
"""

import re
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache

from pr1_jax.answers import prose, spelling, words
from pr1_jax.answers.extract import MAX_CHARS
from pr1_jax.answers.prose import Reading
from pr1_jax.answers.verdicts import CORRECT, INCORRECT, UNDECIDED, Result

_NUMBER = re.compile(r"([+-]?) ?([1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]*)(\.[0-9]+)?")
_FRACTION = re.compile(
    r"([+-]?) ?([0-9]*)(?:(?<![0-9])([0-9]+)/([0-9]+)|\\frac\{(-?[0-9]+)\}\{([0-9]+)\})"
)
_DECIMAL_COMMA = re.compile(r"([+-]?[0-9]+),([0-9]+)")
_IN_BASE = re.compile(r"([0-9][0-9A-Z]*)_(?:([0-9])|\{([0-9]{1,2})\})")
_SYMBOL = rf"(?:{words.SYMBOL.pattern})(?:\s*\^\{{?-?[123]\}}?)?"
_UNIT = re.compile(
    r"(?P<value>.*(?:[0-9})\]!]|\\pi))\s*(?P<unit>"
    rf"{_SYMBOL}(?:\s*(?:/|\\cdot)\s*{_SYMBOL})*|\^\{{?\\(?:circ|degree)\}}?\s*[CF]?)",
    re.DOTALL,
)
_ANGLE = re.compile(r"\\(?:sin|cos|tan|sec|csc|cot)(?![a-z])")
_THOUSANDS = re.compile(r"(?P<value>[+-]? ?[0-9]+(?:\.[0-9]+)?)[kK]")
_LETTER = re.compile(r"(?<![A-Za-z\\])[A-Za-z]")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_SPACING = re.compile(  # not between digits, where 1 2 is not 12
    r"(?<![0-9\s])\s+|\s+(?![0-9\s])"
)
_ONE_CHARACTER = re.compile(r"(?<=[^A-Za-z])\{([A-Za-z0-9])\}|\{([0-9])\}")
_STRING = re.compile(r'"((?:[^"\\]|\\.)+)"|\'((?:[^\'\\]|\\.)+)\'')
_STRINGS = re.compile(
    rf"\[\s*(?:{_STRING.pattern})(?:\s*,\s*(?:{_STRING.pattern}))*\s*\]"
)
_CURRENCY = re.compile(r"\\\$|[$€£¥₹¢]|\b(?:USD|EUR|GBP|INR|Rs)\b")
_CURRENCIES = {"$": "dollar", "€": "euro", "£": "gbp", "¥": "yen", "₹": "rupee"}
_CURRENCIES |= {"¢": "cent", "USD": "dollar", "EUR": "euro", "GBP": "gbp"}
_CURRENCIES |= {"INR": "rupee", "Rs": "rupee"}
_PLACES = Fraction(5, 10_000_000)


def quick(answer: str, reference: str) -> Result | tuple[str, str]:
    """The verdict on two answers, or the formulas of both for a worker.

    Args:
      answer, reference: as `extract` gives them.
    """
    for name, text in (("answer", answer), ("reference", reference)):
        if len(text) > MAX_CHARS:
            return Result(UNDECIDED, f"the {name} has over {MAX_CHARS} characters")
    if not reference.strip():
        return Result(UNDECIDED, "the reference is blank")
    if result := _same_numbers(answer, reference):
        return result
    paid = [_currency(x) for x in (answer, reference)]
    if all(paid) and paid[0] != paid[1]:
        return Result(UNDECIDED, f"{paid[0]} and {paid[1]} are not converted")
    text, wanted = spelling.plain(answer), _plain_reference(reference)
    if _spelling(text) == _spelling(wanted):
        return Result(CORRECT, "the answer is spelled as the reference")
    if result := _same_choice(text, wanted):
        return result
    one, other = _readings(text, wanted)
    one, other = (
        replace(x, unit=x.unit or currency) for x, currency in zip((one, other), paid)
    )
    if one.unit and other.unit and one.unit != other.unit:
        return Result(UNDECIDED, f"{one.unit} and {other.unit} are not converted")
    if _spelling(one.formula) == _spelling(other.formula) != "" and (
        one.known == other.known
    ):
        return Result(CORRECT, "the answer reads as the reference")
    for name, reading in (("answer", one), ("reference", other)):
        if not reading.known:
            return Result(UNDECIDED, f"the {name} is a sentence that is not understood")
    if one.wordy or other.wordy:
        return Result(UNDECIDED, "words are compared as a whole alone")
    return (
        _same_digits(one.formula, other.formula)
        or _same_numbers(one.formula, other.formula)
        or (one.formula, other.formula)
    )


@lru_cache(maxsize=64)  # one reference has many answers
def _plain_reference(reference: str) -> str:
    """The reference in one spelling; a list of strings, as of JSON, is a list."""
    if _STRINGS.fullmatch(reference):
        listed = [one or other for one, other in _STRING.findall(reference)]
        return ", ".join(spelling.plain(x.replace("\\\\", "\\")) for x in listed)
    return spelling.plain(reference)


def _spelling(text: str) -> str:
    """`text` without what changes only how its formulas look; words without case."""
    text = _SPACING.sub("", _ONE_CHARACTER.sub(r"\1\2", text))
    word = text.isalpha() and (len(text) > 2 or text.lower() == "no")
    return text.casefold() if word else text  # AB is not ab


def _same_choice(answer: str, reference: str) -> Result | None:
    """The verdict on the letters of choices, None where the reference is none."""
    one, other = prose.label(answer), prose.label(reference)
    if one is None or other is None:
        return None
    if one[0] != other[0]:
        return Result(INCORRECT, f"choice {one[0]} is not {other[0]}")
    if one[1] and other[1] and _spelling(one[1].lower()) != _spelling(other[1].lower()):
        return Result(UNDECIDED, "the choice has another text")
    return Result(CORRECT, "the choices are the same")


def _readings(answer: str, reference: str) -> tuple[Reading, Reading]:
    """What both say; letters behind a number are its unit where the other has none."""
    texts = []
    for text, beside in ((answer, reference), (reference, answer)):
        choice = prose.label(text)
        named = prose.label(beside)
        texts.append(choice[1] if choice and choice[1] and not named else text)
    one, other = map(prose.read, texts)
    return _measured(one, other), _measured(other, one)


def _currency(answer: str) -> str:
    """The currency that a sign in `answer` names; dollars around a formula are none."""
    sign = _CURRENCY.search(answer)
    if not sign or sign[0] == "$" and answer.count("$") % 2 == 0:
        return ""
    return _CURRENCIES[sign[0].lstrip("\\")]


def _measured(reading: Reading, beside: Reading) -> Reading:
    """`reading` without the unit, or the k for a thousand, behind its number."""
    if not reading.known or reading.wordy or not beside.known:
        return reading
    match = _UNIT.fullmatch(reading.formula)
    if _THOUSANDS.fullmatch(reading.formula):
        match = None
    if not match or _ANGLE.search(match["value"]):
        thousands = _THOUSANDS.fullmatch(reading.formula)
        if thousands and not _has_letters(beside.formula):
            return Reading(rf"{thousands['value']} \cdot 1000")
        return reading
    other = _UNIT.fullmatch(beside.formula)
    degrees = "\\" in match["unit"] and match["unit"][-1] not in "CF"
    unit = "degree" if degrees else words.unit([match["unit"].replace(" ", "")])
    same = other and _spelling(other["unit"]) == _spelling(match["unit"])
    worded = beside.unit and beside.unit == unit
    both = other and (unit, words.unit([other["unit"].replace(" ", "")]))
    measures = both and all(both) and any(len(x) > 1 and "/" not in x for x in both)
    same = same or both and both[0] == both[1] != ""
    if same or worded or measures or not _has_letters(beside.formula):
        return Reading(match["value"].strip(), unit=unit)
    return reading


def _has_letters(formula: str) -> bool:
    return bool(_LETTER.search(_COMMAND.sub(" ", formula)))


# --- Numbers --------------------------------------------------------------------------


def _number(text: str) -> Fraction | None:
    """The value of a plain number or fraction of at most 12 digits, else None."""
    if (
        len(text) > 30
        or not 0 < sum(map(str.isdigit, text)) <= 12
        or not text.isascii()
    ):
        return None
    if _NUMBER.fullmatch(text):
        return Fraction(text.replace(",", "").replace(" ", ""))
    if not (match := _FRACTION.fullmatch(text)):
        return None
    sign, whole, *parts = match.groups()
    over, under = (int(part) for part in parts if part is not None)
    if under == 0 or whole and not (0 < over < under and "\\" in text):
        return None
    value = int(whole or 0) + Fraction(over, under)
    return -value if sign == "-" else value


def _same_numbers(answer: str, reference: str) -> Result | None:
    """The verdict on two plain numbers, None of others."""
    value, wanted = _number(answer), _number(reference)
    if value is None or wanted is None:
        return None
    exact = "." not in answer + reference
    # Of small numbers six digits, lest all of them be 0.
    most = 0 if exact else min(_PLACES, 4 * _PLACES * abs(wanted))
    if abs(value - wanted) <= most:
        return Result(CORRECT, "the numbers are equal")
    return Result(INCORRECT, f"{answer} is not {reference}")


def _same_digits(answer: str, reference: str) -> Result | None:
    """The verdict on numbers in a base or with a decimal comma, None of others.

    A base may be left out; a comma is decimal only beside a decimal point.
    """
    same = _in_one_base(answer, reference)
    for one, other in ((answer, reference), (reference, answer)):
        if (comma := _DECIMAL_COMMA.fullmatch(one)) and "." in other:
            value, wanted = _number("{}.{}".format(*comma.groups())), _number(other)
            same = True if value is not None and value == wanted else None
    if same is None:
        return None
    verdict = CORRECT if same else INCORRECT
    return Result(verdict, "the digits or their values are compared")


def _in_one_base(answer: str, reference: str) -> bool | None:
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
    return None
