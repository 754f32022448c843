r"""From a formula's text to a SymPy object, by the parser of math-verify.

`parse` takes a text whole or not at all: nothing of what it does not understand, such as
an ellipsis, a congruence or two numbers side by side, is skipped. Only workers import
this, as SymPy takes a second to import and may run for ever.
"""

import re
from functools import lru_cache

from latex2sympy2_extended.latex2sympy2 import (
    NormalizationConfig,
    convert_to_pct,
    latex2sympy,
    normalize_latex,
)
from latex2sympy2_extended.sets import FiniteSet
from math_verify.grader import should_treat_as_complex
from sympy import Basic, MatrixBase, Set, false, true

_SETTINGS = NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none"
)
_UNREADABLE = re.compile(
    r"\\ldots|\\equiv|\\in(?![A-Za-z])\s*[0-9A-Za-z.+-]|'|\"|[0-9.]\s+\.?[0-9]|[0-9]*\.[0-9]*\.|[0-9]\s*:\s*[0-9]+\s*:"
    r"|\b[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}\b|[0-9]/[0-9]+/[0-9]|[?@#~`]"
    r"|(?:^|[^=<>!])==+(?!=)|[+*/^]\s*$|^[*/]"
)
_FUNCTION = re.compile(
    r"(?<![\\A-Za-z])(pi|ln|log|(?:arc)?(?:sin|cos|tan)|sec|csc|cot)(?![A-Za-z])"
)
_DEGREES = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*\^(?:\{\\circ\}|\\circ)")
_CASES = re.compile(r"\\begin\{cases\}(.*?)\\end\{cases\}", re.DOTALL)
_OR = re.compile(r",?\s*(?:\bor\b|\\lor\b|\\vee\b)\s*")
_BELOW = r"(?:<|\\le(?![a-z]))"
_ABOVE = r"(?:>|\\ge(?![a-z]))"
_RANGE = re.compile(
    rf"(?:([^<>=]+?)\s*({_BELOW}))?\s*([a-zA-Z])\s*({_BELOW}|{_ABOVE})\s*([^<>=]+)"
)
_FLIPPED = re.compile(rf"([^<>=]+?)\s*({_BELOW}|{_ABOVE})\s*([a-zA-Z])")
_SIGN = re.compile(r"\\(?:pm|mp)(?![a-z])")
_SET = re.compile(r"\\\{(.*)\\\}")
_TIMES = re.compile(
    r"((?<![\^_0-9])[0-9]+|\))\s*(?=\()|(\)|\^(?:[0-9]+\s|\{[^{}]*\}))\s*(?=[0-9])"
)
_TIMES_FRACTION = re.compile(r"([0-9])\s*(?=\\frac\{([0-9]+)\}\{([0-9]+)\})")
_PERCENT = re.compile(r"(?<=[}\])A-Za-z])\s*\\?%\s*$")
_INDEX = re.compile(r"_([0-9A-Za-z])\s+")
_NAME = re.compile(r"\\?[A-Za-z][A-Za-z0-9_{}\\,' ]*(?:\([A-Za-z0-9_{}\\,' ]*\))?")
_LETTER = re.compile(r"\\?[A-Za-z]+(?:_(?:\{[A-Za-z0-9]+\}|[A-Za-z0-9]))?")
_APPROX = re.compile(r"\\approx(?![A-Za-z])")


@lru_cache(maxsize=64)  # one reference has many answers
def parse(text: str) -> list[Basic | MatrixBase]:
    r"""The objects that `text` stands for, all of them the same: two for `1/3 \approx 0.33`.

    Empty where `text` is not understood from its first to its last character.
    """
    parts = [part.strip() for part in _APPROX.split(text)]
    if len(parts) > 1 and _LETTER.fullmatch(parts[0]):  # x \approx 5
        parts = parts[1:]
    objects = [_parse(part) for part in parts]
    return [] if any(x is None for x in objects) else objects


def _parse(text: str) -> Basic | MatrixBase | None:
    text = _TIMES.sub(r"\1\2 \\cdot ", _INDEX.sub(r"_{\1} ", text))  # 2(3), 2^5 3^2
    if _UNREADABLE.search(text):
        return None
    percent = _PERCENT.search(text) if text.count("%") == 1 else None
    if percent:
        text = text[: percent.start()]
    latex = normalize_latex(_spelled(text), config=_SETTINGS)
    value = _latex(latex)
    if value is None and latex.count("=") == 1:
        # Some names, such as those with a bar, are beyond it; the value need not be.
        name, _, behind = latex.partition("=")
        value = _latex(behind) if _NAME.fullmatch(name.strip()) else None
    if percent and value is not None:
        value = convert_to_pct(value) if isinstance(value, Basic) else None
    return value


def _latex(text: str) -> Basic | MatrixBase | None:
    try:
        value = latex2sympy(
            text,
            is_real=not should_treat_as_complex(text),
            convert_degrees=False,
            normalization_config=None,
        )
    except RecursionError:
        raise
    except Exception:  # noqa: BLE001 (it raises bare ones)
        return None
    known = isinstance(value, (Basic, MatrixBase))
    return value if known and value not in (true, false) else None


def items(value: Basic) -> list | None:
    """The elements of a list, set or tuple in the order of the text, None of others."""
    if isinstance(value, FiniteSet):
        return list(value._unsorted_args)
    if isinstance(value, Set) and value.is_empty:
        return []
    return None


# --- What the parser misreads ---------------------------------------------------------


def _spelled(text: str) -> str:
    """`text` with what the parser misreads spelled so that it does not."""
    ranges = [_interval(part) for part in _OR.split(text)]
    if len(ranges) > 1 and all(ranges) and len({name for name, _ in ranges}) == 1:
        return r"\cup ".join(interval for _, interval in ranges)
    text = _CASES.sub(lambda x: re.sub(r"\\\\", ", ", x[1].replace("&", "")), text)
    text = _FUNCTION.sub(r"\\\1 ", text)
    if re.search(r"\\(?:sin|cos|tan|sec|csc|cot)\b", text):
        text = _DEGREES.sub(r"\\frac{\1\\pi}{180}", text)
    text = re.sub(r"\bI_", "J_", text)  # with a subscript it is no root of -1
    text = re.sub(r"^f\s*\(\s*x\s*\)\s*=", "y=", text)
    text = _TIMES_FRACTION.sub(
        lambda x: x[0] if int(x[2]) < int(x[3]) else x[1] + r" \cdot ", text
    )
    return _both_signs(re.sub(r"(?<!\\);", ",", text))


def _interval(text: str) -> tuple[str, str] | None:
    """The variable of a range such as `1 < x \\le 2`, and its interval."""
    text = text.strip()
    if flipped := _FLIPPED.fullmatch(text):
        end, sign, name = flipped.groups()
        below = not re.fullmatch(_BELOW, sign)
        return name, _bounded(end if below else None, sign, None if below else end)
    match = _RANGE.fullmatch(text)
    if not match:
        return None
    low, first, name, second, end = match.groups()
    if re.fullmatch(_BELOW, second):
        return name, _bounded(end, second, low, first)
    return None if low else (name, _bounded(None, second, end))


def _bounded(high: str | None, sign: str, low: str | None, first: str = "") -> str:
    """The interval; `first` is the sign after the lower end, should they differ."""
    closed_low, closed_high = ("e" in x for x in (first or sign, sign))
    start = f"{'[' if closed_low else '('}{low}" if low else r"(-\infty"
    return (
        f"{start},{high}{']' if closed_high else ')'}" if high else rf"{start},\infty)"
    )


def _both_signs(text: str) -> str:
    """`text` with each item that has one plus-minus sign written out twice."""
    if not _SIGN.search(text):
        return text
    if inner := _SET.fullmatch(text.strip()):
        text = inner[1]
    name, equals, values = text.rpartition("=")
    listed, depth = [""], 0
    for char in values:
        depth += (char in "([{") - (char in ")]}")
        listed += [""] if char == "," and depth == 0 else []
        listed[-1] += char if char != "," or depth else ""
    signed = []
    for item in listed:
        signs = "+-" if len(_SIGN.findall(item)) == 1 else [r"\g<0>"]
        signed += [_SIGN.sub(sign, item) for sign in signs]
    return name + equals + ", ".join(signed)
