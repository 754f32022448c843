"""Whether two expressions have the same value. Only workers import this.

Numbers are compared exactly, decimals to six places and to six digits, whatever their
size: a difference counts as none only where it is proven to be 0.
"""

from sympy import (
    Expr,
    Float,
    I,
    Mul,
    Pow,
    Rational,
    UnevaluatedExpr,
    exp,
    expand,
    nan,
    numer,
    oo,
    simplify,
    together,
    zoo,
)
from sympy.core.evalf import PrecisionExhausted

_PLACES = Rational(5, 10_000_000)
_DIGITS = 4 * _PLACES
_POINTS = (  # times 1/97; of both signs and sizes, as sqrt(x^2) is not x
    (71, 133, 41, 187, 57, 111, 25, 161),
    (-61, -129, 85, -35, 143, -117, 93, -71),
    (359, 1213, -293, 505, -777, 881, 1301, -405),
    (-409, 301, 1117, -613, 823, -211, -997, 707),
    (97, 291, -194, 485, 679, -388, 582, 776),  # whole numbers
    (13580, 19400, -15229, 24250, 17073, -29488, 21340, 33077),
    (1219, -2003, 3001, 1511, -1709, 2213, 613, -2801),
)
_HUGE = 10**40  # numbers beyond it can hide a difference from 200 digits


class Unclear(Exception):
    """Equality could be neither proven nor refuted."""


def same_value(gold: Expr, target: Expr) -> bool:
    """Whether two expressions have one value; 50 % is a half and also 50."""
    one, other = _percent(gold), _percent(target)
    if (one is None) != (other is None):
        parts = (one, target) if other is None else (gold, other)
        if same_value(*parts):
            return True
    elif one is not None:
        return same_value(one, other)
    gold, target = gold.doit(), target.doit()
    if gold.has(nan, zoo) or target.has(nan, zoo):
        raise Unclear
    if gold == target:
        return True
    decimals = gold.has(Float) or target.has(Float)
    gold, target = exact(gold), exact(target)
    if gold.free_symbols or target.free_symbols:
        units = [_with_imaginary_unit(x) for x in (gold, target)]
        if units != [gold, target] and same_value(*units):
            return True
        return _same_function(gold, target)
    return _same_number(gold, target, decimals)


def _percent(value: Expr) -> Expr | None:
    """The 50 of 50 %, None of other values."""
    hundredth = UnevaluatedExpr(Rational(1, 100))
    if isinstance(value, Mul) and len(value.args) == 2 and hundredth in value.args:
        return next(x for x in value.args if x != hundredth)
    return None


def exact(value: Expr) -> Expr:
    """`value` with decimals as the fractions that they are written as."""
    floats = [x for x in value.atoms(Float) if x == 0 or 1e-300 < abs(x) < 1e300]
    return value.xreplace({x: Rational(str(x)) for x in floats})


def _with_imaginary_unit(value: Expr) -> Expr:
    """`value` with i for the root of -1, which the parser takes for a variable."""
    return value.subs({x: I for x in value.free_symbols if x.name == "i"})


def _same_number(gold: Expr, target: Expr, decimals: bool) -> bool:
    if oo in (abs(gold), abs(target)):
        return gold == target
    difference = gold - target
    if decimals:
        size = numeric(abs(gold))
        most = min(_PLACES, _DIGITS * size)
        return bool(numeric(abs(difference)) <= most)
    return _is_zero(difference)


def numeric(value: Expr) -> Expr:
    """The value to 15 digits, 0 only where it is 0 to hundreds of them."""
    if value.is_Rational:
        return value
    found = value.evalf(15, maxn=400)
    if not found.is_number or found in (nan, zoo) or not found.is_comparable:
        raise Unclear
    return found


def _is_zero(value: Expr) -> bool:
    """Whether a constant is 0: refuted by its digits, proven by algebra.

    Raises:
      Unclear: its digits are 0, hundreds of them, and no algebra shows why.
    """
    if value.is_Rational:
        return value == 0
    try:
        found = value.evalf(5, maxn=400, strict=True)
        if found.is_number and found not in (nan, zoo) and found != 0:
            return False
    except PrecisionExhausted:
        pass
    for simpler in (expand, simplify):
        shown = simpler(value)
        if shown == 0 or shown.is_zero:
            return True
        if shown.is_Rational:
            return False
    proven = value.equals(0)
    if proven is None:
        raise Unclear
    return bool(proven)


def _same_function(gold: Expr, target: Expr) -> bool:
    """Whether two expressions agree wherever they are tried, at fractions."""
    difference = gold - target
    symbols = {x: x.name for x in gold.free_symbols | target.free_symbols}
    if difference.is_rational_function(*symbols):
        return expand(numer(together(difference))) == 0
    names = sorted(set(symbols.values()))
    exact, tried = True, 0
    for point in _POINTS:
        at = {name: Rational(point[k % 8], 97) + k // 8 for k, name in enumerate(names)}
        value, side = (
            x.subs({x: at[name] for x, name in symbols.items()})
            for x in (difference, gold)
        )
        found, size = _digits(value), _digits(side)
        if found is None or size is None:  # no number: an integral, an unknown function
            return simplify(difference) == 0
        if size.has(I) and not gold.has(I):  # roots of negative numbers have branches
            continue
        tried += 1
        if found != 0:
            return False
        exact = exact and value.is_Rational
    seen = tried >= 2 and (exact or not _may_hide(difference))
    if not seen and simplify(difference) != 0:
        raise Unclear
    return True


def _may_hide(value: Expr) -> bool:
    """Whether there are numbers in it beside which a difference has 200 zeros."""
    powers = [x.exp for x in value.atoms(Pow, exp) if x.exp.is_number]
    return any(abs(x) > 60 for x in powers) or any(
        max(abs(x.p), x.q) > _HUGE for x in value.atoms(Rational)
    )


def _digits(value: Expr) -> Expr | None:
    """The value to a few digits, 0 where 200 are 0; None of what is no number."""
    if value.is_Rational:
        return value
    found = value.evalf(5, maxn=200)
    if not found.is_number or found.has(oo, nan, zoo):
        return None
    if max(x._prec for x in found.atoms(Float) or [found]) == 1:
        return Rational(0)
    return found
