r"""From a formula's text to a SymPy object, by the parser of math-verify.

`parse` takes a text whole or not at all: nothing of what it does not understand, such as
an ellipsis, a congruence or two numbers side by side, is skipped. Only workers import
this, as SymPy takes a second to import and may run for ever.
"""

import re
from functools import lru_cache

from latex2sympy2_extended.latex2sympy2 import (
    ConversionConfig,
    NormalizationConfig,
    convert_to_pct,
    latex2sympy,
    normalize_latex,
)
from latex2sympy2_extended.sets import FiniteSet
from math_verify.grader import should_treat_as_complex
from sympy import Basic, Eq, Expr, MatrixBase, Set, Symbol, false, true

_SETTINGS = NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none"
)
_CONVERSION = ConversionConfig(lowercase_symbols=False)
_KNOWN = """
alpha beta gamma Gamma delta Delta epsilon varepsilon zeta eta theta Theta vartheta iota
kappa lambda Lambda mu nu xi Xi omicron pi Pi varpi rho varrho sigma Sigma varsigma tau
upsilon Upsilon phi Phi varphi chi psi Psi omega Omega ell hbar infty frac sqrt binom
choose over times cdot div pm mp sum prod int lim partial nabla log ln exp sin cos tan
csc sec cot arcsin arccos arctan arccsc arcsec arccot sinh cosh tanh arsinh arcosh artanh
arcsinh arccosh arctanh gcd lcm max min det floor ceil lfloor rfloor lceil rceil lvert
rvert vert langle rangle lbrace rbrace lbrack rbrack cup cap setminus emptyset in notin
subseteq supseteq le ge ne begin end mathbb mathcal overline bar hat vec tilde dot ddot
boldsymbol mathbf circ degree prime to rightarrow angle triangle circle lor vee
"""
_COMMANDS = frozenset(_KNOWN.split())  # which the parser takes for what they are
_COMMAND = re.compile(r"(?<!\\)\\([A-Za-z]+)")
_NON_ASCII = re.compile(r"[^\x00-\x7f]")
_UNREADABLE = re.compile(
    r"!!|[0-9)]_|\\ldots|\\equiv|\\in(?![A-Za-z])\s*[0-9A-Za-z.+-]|'|\""
    r"|[0-9.]\s+\.?[0-9]|[0-9]*\.[0-9]*\.|[0-9]\s*:\s*[0-9]+\s*:"
    r"|\b[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}\b"
    r"|\b[0-9]{1,2}/[0-9]{1,2}/(?:19|20)[0-9]{2}\b"
    r"|\^\s*\{?\s*(?:T|\\top)\b|[?@#~`]"
    r"|(?:^|[^=<>!])==+(?!=)|[+*/^]\s*$|^[*/]"
)
_FUNCTION = re.compile(
    r"(?<![\\A-Za-z])(pi|ln|log|(?:arc)?(?:sin|cos|tan)|sec|csc|cot)(?![A-Za-z])"
)
_DEGREES = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*\^(?:\{\\circ\}|\\circ)")
_CASES = re.compile(r"\\begin\{cases\}(.*?)\\end\{cases\}", re.DOTALL)
_OR = re.compile(r",?\s*(?:\bor\b|\\lor\b|\\vee\b)\s*")
_AND = re.compile(r",?\s*\band\b\s*")
_BELOW = r"(?:<|\\le(?![a-z]))"
_ABOVE = r"(?:>|\\ge(?![a-z]))"
_RANGE = re.compile(
    rf"(?:([^<>=]+?)\s*({_BELOW}))?\s*([a-zA-Z])\s*({_BELOW}|{_ABOVE})\s*([^<>=]+)"
)
_FLIPPED = re.compile(rf"([^<>=]+?)\s*({_BELOW}|{_ABOVE})\s*([a-zA-Z])")
_CALLS = re.compile(  # a function with its index and power, but no bracket behind it
    r"\\(?:ln|log|(?:arc)?(?:sin|cos|tan)h?|sec|csc|cot)(?![A-Za-z])\s*"
    r"(?:_\s*(?:\{[^{}]*\}|[0-9A-Za-z])\s*)?(?:\^\s*(?:\{[^{}]*\}|[0-9A-Za-z])\s*)?"
    r"(?:_\s*(?:\{[^{}]*\}|[0-9A-Za-z])\s*)?(?!\s*(?:\(|[_^]))"
)
_GROUP = r"\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}"
_FACTORS = re.compile(
    rf"(?:\s|[0-9A-Za-z.!]|\^\s*(?:{_GROUP}|\\circ|[0-9A-Za-z])|_\s*(?:{_GROUP}|[0-9A-Za-z])"
    rf"|{_GROUP}|\\(?:frac\s*{_GROUP}\s*{_GROUP}|sqrt(?:\[[^\[\]]*\])?\s*{_GROUP}"
    r"|alpha|beta|gamma|delta|epsilon|theta|lambda|mu|omega|phi|varphi|psi|pi|tau|rho"
    r"|sigma|infty|circ)(?![A-Za-z]))*"
)
_OF_INTEGERS = re.compile(r"\\?(?:gcd|lcm)|\\mod(?![a-z])")
_SIGN = re.compile(r"\\(?:pm|mp)(?![a-z])")
_SET = re.compile(r"\\\{(.*)\\\}")
_TIMES = re.compile(
    r"((?<![\^_0-9])[0-9]+|\))\s*(?=\()|(\)|\^(?:[0-9]+\s|\{[^{}]*\}))\s*(?=[0-9])"
)
_TIMES_FRACTION = re.compile(r"([0-9})])\s*(?=\\frac\{([0-9]+)\}\{([0-9]+)\})")
_PERCENT = re.compile(r"(?<=[}\])A-Za-z])\s*\\?%\s*$")
_INDEX = re.compile(r"_([0-9A-Za-z])\s+")
_NAME = re.compile(
    r"(?:\\(?:overline|vec|hat|bar|tilde)\s*\{[A-Za-z]+\}|\\(?:angle|triangle)\s*[A-Z]+"
    r"|[A-Za-z]{1,2}(?:_(?:[A-Za-z0-9]|\{[A-Za-z0-9, ]+\}))?)(?:\([A-Za-z0-9, ]*\))?"
)
_LETTER = re.compile(r"[A-Za-z]{1,2}(?:_(?:\{[A-Za-z0-9]+\}|[A-Za-z0-9]))?")
_DECIMAL = re.compile(r"-?\s*[0-9]*\.?[0-9]+")
_APPROX = re.compile(r"\\approx(?![A-Za-z])")


@lru_cache(maxsize=64)  # one reference has many answers
def parse(text: str) -> tuple[Basic | MatrixBase | None, Basic | None, int]:
    r"""What `text` stands for, its rounding, and the rounding's number of decimals.

    The first is None where `text` is not understood from its first to its last
    character; the second is that of `1/3 \approx 0.33`, None where there is none.
    """
    exact, *rounded = (part.strip() for part in _APPROX.split(text))
    if rounded and _LETTER.fullmatch(exact):  # x \approx 5
        exact, *rounded = rounded
    if len(rounded) > 1:
        return None, None, 0
    value = _parse(exact)
    if value is None or not rounded:
        return value, None, 0
    decimals = len(rounded[0].partition(".")[2])
    rounding = _parse(rounded[0]) if _DECIMAL.fullmatch(rounded[0]) else None
    return (None, None, 0) if rounding is None else (value, rounding, decimals)


def _parse(text: str) -> Basic | MatrixBase | None:
    text = _called(_FUNCTION.sub(r"\\\1 ", _INDEX.sub(r"_{\1} ", text)))
    text = _TIMES.sub(r"\1\2 \\cdot ", text)  # 2(3), 2^5 3^2
    if _UNREADABLE.search(text) or _NON_ASCII.search(text):
        return None
    if not _COMMANDS.issuperset(_COMMAND.findall(text)):
        return None
    if _OF_INTEGERS.search(text) and re.search("[A-Za-z]", _OF_INTEGERS.sub("", text)):
        return None  # it takes the greatest common divisor of polynomials
    percent = _PERCENT.search(text) if text.count("%") == 1 else None
    if percent:
        text = text[: percent.start()]
    latex = normalize_latex(_spelled(text), config=_SETTINGS)
    value = _latex(latex)
    if value is None and latex.count("=") == 1:
        # Some names, such as those with a bar, are beyond it; the value need not be.
        name, _, behind = latex.partition("=")
        value = _latex(behind) if _NAME.fullmatch(name.strip()) else None
        if isinstance(value, Expr):
            value = Eq(Symbol(name.replace(" ", "")), value, evaluate=False)
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
            conversion_config=_CONVERSION,
        )
    except RecursionError:
        raise
    except Exception:  # noqa: BLE001 (it raises bare ones)
        return None
    known = isinstance(value, (Basic, MatrixBase))
    if not known or value in (true, false):
        return None
    return value


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
    for link, sign in ((_OR, r"\cup "), (_AND, r"\cap ")):
        ranges = [_interval(part) for part in link.split(text)]
        if len(ranges) > 1 and all(ranges) and len({name for name, _ in ranges}) == 1:
            return sign.join(interval for _, interval in ranges)
    text = _CASES.sub(lambda x: re.sub(r"\\\\", ", ", x[1].replace("&", "")), text)
    if re.search(r"\\(?:sin|cos|tan|sec|csc|cot)\b", text):
        text = _DEGREES.sub(r"\\frac{\1\\pi}{180}", text)
    text = re.sub(r"\bI_", "J_", text)  # with a subscript it is no root of -1
    text = re.sub(r"^f\s*\(\s*x\s*\)\s*=", "y=", text)
    text = _TIMES_FRACTION.sub(
        lambda x: x[0] if _is_mixed(*x.groups()) else x[1] + r" \cdot ", text
    )
    return _both_signs(re.sub(r"(?<!\\);", ",", text))


def _is_mixed(whole: str, over: str, under: str) -> bool:
    return whole.isdigit() and int(over) < int(under)


def _called(text: str) -> str:
    r"""`\sin 2x \cdot 3` with `\sin (2x)`: the parser takes all factors for one argument."""
    done, end = [], 0
    for match in _CALLS.finditer(text):
        if match.start() < end:
            continue
        argument = _FACTORS.match(text, match.end())
        if argument[0].strip():
            done += [text[end : match.end()], f"({argument[0].strip()}) "]
            end = argument.end()
    return "".join([*done, text[end:]])


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
