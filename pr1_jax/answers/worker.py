"""The process that asks math-verify for `pr1_jax.answers`, which never imports it.

It is run as a script, so that it imports neither the package nor the training program.
Each line of the input is a JSON object with `answer`, `reference` and `limit_sec`, each
of the output one with `verdict` and `reason`; the first of them says whether it started.
"""

import cmath
import json
import os
import re
import resource
import signal
import sys
from functools import lru_cache

_MEMORY_BYTES = 2 << 30
_FUNCTION = re.compile(
    r"(?<![\\A-Za-z])(pi|ln|log|(?:arc)?(?:sin|cos|tan)|sec|csc|cot)(?![A-Za-z])"
)
_POWER = re.compile(r"(?<=[\w)])\*\*(?=[\w(-])")
_CONSTANT = re.compile(r"\\(?:mathrm|text|operatorname)\{([ei])\}")
_REPEATING = re.compile(
    r"([0-9]{0,15})\.([0-9]{0,15})\\(?:overline|bar)\{([0-9]{1,15})\}"
)
_DEGREES = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*\^(?:\{\\circ\}|\\circ)")
_CASES = re.compile(r"\\begin\{cases\}(.*?)\\end\{cases\}", re.DOTALL)
_ROOT = re.compile(r"(?<![A-Za-z\\])sqrt\s*\(([^()]*)\)")
_SUBSCRIPT = re.compile(
    r"_\{\s*\\(?:(max|min)\s*|(?:text|mathrm|rm)\s*\{([A-Za-z0-9]+)\})\s*\}"
)
_OR = re.compile(r",?\s*(?:\\text\{\s*or\s*\}|\bor\b|\\lor\b|\\vee\b)\s*")
_BELOW = r"(?:<=?|\\l(?:eqslant|eq|e|t)(?![a-z]))"
_ABOVE = r"(?:>=?|\\g(?:eqslant|eq|e|t)(?![a-z]))"
_RANGE = re.compile(
    rf"(?:([^<>=]+?)\s*({_BELOW}))?\s*([a-zA-Z])\s*({_BELOW}|{_ABOVE})\s*([^<>=]+)"
)
_FLIPPED = re.compile(rf"([^<>=]+?)\s*({_BELOW}|{_ABOVE})\s*([a-zA-Z])")
_CLAUSE = re.compile(  # words that say more than the formula before them
    r"\b(?:and|or|but|not|if|except|unless)\s+"
    r"(?!(?:and|or|pi|ln|log|sqrt|a?r?c?(?:sin|cos|tan)h?|infinity)\b)[A-Za-z]{2}"
)
_TEXT_NUMBER = re.compile(r"\\text\{([^{}]*[0-9][^{}]*)\}")
_SIGN = re.compile(r"\\(?:pm|mp)(?![a-z])")
_SET = re.compile(r"(?:\\left)?\\\{(.*)\\\}")
_POINTS = (  # for up to eight letters; of both signs, as sqrt(x^2) is not x
    (0.731, 1.377, 0.419, 1.913, 0.577, 1.129, 0.263, 1.641),
    (-0.613, -1.291, 0.877, -0.353, 1.453, -1.187, 0.941, -0.719),
)
_PROSE = re.compile(r"\b(?!arc|sqrt|sinh|cosh|tanh|infinity|percent)[A-Za-z]{4}")
_NUMBER = re.compile(r"[0-9][0-9.,/]*")


def _repeating(match: re.Match) -> str:
    whole, fixed, repeated = match.groups()
    over = int(whole + fixed + repeated) - int(whole + fixed or "0")
    under = 10 ** len(fixed) * (10 ** len(repeated) - 1)
    return rf"\frac{{{over}}}{{{under}}}"


def _interval(text: str) -> tuple[str, str] | None:
    """The variable of a range such as `1 < x \\le 2`, and its interval."""
    text = text.replace("$", "").strip()
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
    # The open signs <, >, \lt and \gt have neither of these two.
    closed_low, closed_high = ("=" in x or "e" in x for x in (first or sign, sign))
    start = f"{'[' if closed_low else '('}{low}" if low else r"(-\infty"
    return (
        f"{start},{high}{']' if closed_high else ')'}" if high else rf"{start},\infty)"
    )


def _both_signs(text: str) -> str:
    """`text` with each item that has one plus-minus sign written out twice."""
    if not _SIGN.search(text):
        return text
    if inner := _SET.fullmatch(text.replace("\\right", "").strip()):
        text = inner[1]
    name, equals, values = text.rpartition("=")
    items, depth = [""], 0
    for char in values:
        depth += (char in "([{") - (char in ")]}")
        items += [""] if char == "," and depth == 0 else []
        items[-1] += char if char != "," or depth else ""
    signed = []
    for item in items:
        signs = "+-" if len(_SIGN.findall(item)) == 1 else [r"\g<0>"]
        signed += [_SIGN.sub(sign, item) for sign in signs]
    return name + equals + ", ".join(signed)


def _spelled(text: str) -> str:
    """`text` with what math-verify misreads in LaTeX spelled so that it does not."""
    ranges = [_interval(part) for part in _OR.split(text)]
    if len(ranges) > 1 and all(ranges) and len({name for name, _ in ranges}) == 1:
        return r"\cup ".join(interval for _, interval in ranges)
    text = _TEXT_NUMBER.sub(r" \1 ", text)
    text = _CASES.sub(lambda x: re.sub(r"\\\\", ", ", x[1].replace("&", "")), text)
    text = _REPEATING.sub(_repeating, text)
    text = _CONSTANT.sub(r"\1", _POWER.sub("^", text))
    text = _FUNCTION.sub(r"\\\1 ", text).replace(r"\varnothing", r"\emptyset")
    if re.search(r"\\(?:sin|cos|tan|sec|csc|cot)\b", text):
        text = _DEGREES.sub(r"\\frac{\1\\pi}{180}", text)
    text = _SUBSCRIPT.sub(r"_{\1\2}", _ROOT.sub(r"\\sqrt{\1}", text))
    text = re.sub(r"\bI_", "J_", text)  # with a subscript it is no root of -1
    text = re.sub(r"^f\s*\(\s*x\s*\)\s*=", "y=", text)
    return _both_signs(re.sub(r"(?<!\\);", ",", text))


@lru_cache(maxsize=64)  # one reference has many answers
def _parse(text: str) -> list:
    """What math-verify reads in `text`: SymPy objects first, then its string."""
    text = _spelled(text)
    if _CLAUSE.search(text):
        return []
    parsed = _parse_as_is(text)
    if all(isinstance(part, str) for part in parsed) and "=" in text:
        # Some names, such as I_{max}, are beyond it; the value need not be.
        parsed = _parse_as_is(text.rpartition("=")[2]) or parsed
    return parsed


def _parse_as_is(text: str) -> list:
    from math_verify import parse

    if "$" in text:
        forms = [text]
    else:  # dollars for LaTeX, but prose would be a product of letters between them
        latex, prose = "\\" in text, _PROSE.search(text)
        forms = [f"${text}$"] if latex or not prose else []
        if not latex and len(_NUMBER.findall(text)) == 1:
            forms.append(text)
    parsed = []
    for form in forms:
        parsed = parse(form, parsing_timeout=None, raise_on_error=True) or parsed
        if any(not isinstance(part, str) for part in parsed):
            break
    return parsed


def _close(gold: list, target: list) -> bool:
    """Whether two expressions have the same values, to as many digits as decimals.

    math-verify compares so only lone decimals, and those not with integers; and it
    misses identities that SymPy cannot simplify, such as Euler's.
    """
    from sympy import Expr, Float

    pair = [parts[0].doit() for parts in (gold, target) if isinstance(parts[0], Expr)]
    if len(pair) < 2:
        return False
    letters, others = (sorted({x.name for x in part.free_symbols}) for part in pair)
    if letters != others or not (letters or any(part.has(Float) for part in pair)):
        return False
    for point in _POINTS if letters else ((),):
        at = {letter: point[k % 8] + k // 8 for k, letter in enumerate(letters)}
        try:
            wanted, value = (
                complex(part.subs({x: at[x.name] for x in part.free_symbols}).evalf())
                for part in pair
            )
        except (TypeError, OverflowError):  # no number: an integral, a function
            return False
        if not (cmath.isfinite(wanted) and cmath.isfinite(value)):
            return False
        most = max(1e-9, 0 if letters else min(2e-6, 5e-7 / max(abs(wanted), 1e-99)))
        if abs(value - wanted) > most * abs(wanted):
            return False
    return True


def _with_imaginary_unit(parts: list) -> list:
    """`parts` with i for the root of -1, which math-verify takes for a variable."""
    from sympy import I

    changed = []
    for part in parts:
        letters = getattr(part, "free_symbols", ())
        unit = {letter: I for letter in letters if letter.name == "i"}
        changed.append(part.subs(unit) if unit else part)
    return changed


def _same(gold: list, target: list) -> bool:
    from math_verify import verify
    from sympy import Eq, Set

    def verified(gold: list, target: list) -> bool:
        return verify(
            gold,
            target,
            allow_set_relation_comp=True,  # an inequality may answer for an interval
            timeout_seconds=None,
            raise_on_error=True,
        )

    if verified(gold, target):
        return True
    if not gold or not target:
        return False
    both = gold[0], target[0]
    if all(isinstance(part, Eq) and isinstance(part.rhs, Set) for part in both):
        return str(both[0].lhs) == str(both[1].lhs) and verified(
            [both[0].rhs], [both[1].rhs]
        )
    units = _with_imaginary_unit(gold), _with_imaginary_unit(target)
    if units != (gold, target) and verified(*units):
        return True
    return _close(*units)


def _decide(answer: str, reference: str) -> tuple[str, str]:
    try:
        gold, target = _parse(reference), _parse(answer)
        same = _same(gold, target)
    except Exception as error:  # noqa: BLE001 (SymPy raises anything)
        return "undecided", f"math-verify failed: {type(error).__name__}"
    if same:
        return "correct", "math-verify finds it equivalent"
    for name, parsed in (("answer", target), ("reference", gold)):
        if all(isinstance(part, str) for part in parsed):
            return "undecided", f"the {name} cannot be parsed"
    return "incorrect", "math-verify finds it different"


def _speed_up() -> None:
    """Parses in ANTLR's fast mode first: a third of the time for the same trees.

    That mode gives the tree of the full one or a syntax error, after which the full
    one decides (ANTLR's documentation of `PredictionMode`).
    """
    from antlr4.atn.PredictionMode import PredictionMode
    from latex2sympy2_extended.latex2sympy2 import _Latex2Sympy

    create, parse = _Latex2Sympy.create_parser, _Latex2Sympy.parse

    def create_fast(self, text):
        parser = create(self, text)
        if self.fast:
            parser._interp.predictionMode = PredictionMode.SLL
        return parser

    def parse_fast(self, text):
        self.fast = True
        try:
            return parse(self, text)
        except Exception:  # noqa: BLE001 (it raises bare ones)
            self.fast = False
            return parse(self, text)

    _Latex2Sympy.create_parser, _Latex2Sympy.parse = create_fast, parse_fast


def main() -> None:
    """Answers requests until standard input ends."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # stray prints must not mix with the replies
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    memory = _MEMORY_BYTES if most < 0 else min(_MEMORY_BYTES, most)
    resource.setrlimit(resource.RLIMIT_AS, (memory, most))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    try:
        import math_verify  # noqa: F401 (else `_decide` would call it undecided)

        _speed_up()
        verdict, reason = _decide(r"\frac{1}{2}", "0.5")  # imports and warms up
        error = "" if verdict == "correct" else reason
    except ImportError as problem:
        error = str(problem)
    print(json.dumps({"error": error}), file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        # Processor time, so that verdicts do not depend on what else the machine does.
        # It kills this process, even inside C code, and also if the parent is gone.
        signal.setitimer(signal.ITIMER_PROF, request["limit_sec"])
        verdict, reason = _decide(request["answer"], request["reference"])
        signal.setitimer(signal.ITIMER_PROF, 0)
        reply = {"verdict": verdict, "reason": reason}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
