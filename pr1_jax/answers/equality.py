"""Whether two SymPy objects are the same answer: relations, sets, tuples, matrices.

Only workers import this; the values inside are compared by `values`.
"""

from collections.abc import Callable, Sequence

from sympy import (
    Abs,
    Add,
    And,
    Basic,
    Eq,
    Expr,
    Intersection,
    Interval,
    MatrixBase,
    MatrixExpr,
    Mul,
    Ne,
    Pow,
    Rational,
    Set,
    StrictGreaterThan,
    StrictLessThan,
    Symbol,
    Tuple,
    Union,
    nan,
    oo,
    simplify,
    zoo,
)
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational

from pr1_jax.answers.formulas import items
from pr1_jax.answers.values import Unclear, exact, numeric, same_value


def same(gold: Basic | MatrixBase, target: Basic | MatrixBase) -> bool:
    """Whether `target` is the answer that `gold` is.

    Raises:
      Unclear: no method here decides.
    """
    gold, target = (
        x.doit() if isinstance(x, Intersection) else x for x in (gold, target)
    )
    one, other = _is_relation(gold), _is_relation(target)
    if one and other:
        return _same_relation(gold, target)
    if other and not isinstance(gold, Set):
        target = _value(target, _is_name if gold == 0 else _is_sum)
        return target is not None and same(gold, target)
    if one and not isinstance(target, Set):
        gold = _value(gold, _is_name)
        return gold is not None and same(gold, target)
    if one or other:
        return _same_range(gold, target)
    if _is_group(gold) or _is_group(target):
        return _same_group(gold, target)
    if isinstance(gold, (MatrixBase, MatrixExpr)) or isinstance(
        target, (MatrixBase, MatrixExpr)
    ):
        return _same_matrix(gold, target)
    if not (isinstance(gold, Expr) and isinstance(target, Expr)):
        return gold == target
    return same_value(gold, target)


def rounds(value: Basic, rounding: Basic, decimals: int) -> bool:
    """Whether `rounding` is `value` rounded, or cut, to `decimals` decimals.

    Raises:
      Unclear: one of them is no number.
    """
    value = _value(value, _is_sum) if _is_relation(value) else value
    if not isinstance(value, Expr) or value.free_symbols:
        raise Unclear
    value, rounding = exact(value.doit()), exact(rounding)
    error = numeric(abs(value) - abs(rounding))  # positive where it is cut
    unit = Rational(1, 10**decimals)
    return bool(-unit / 2 <= error < unit) and bool(numeric(value) * rounding >= 0)


def _same_matrix(gold: Basic, target: Basic) -> bool:
    gold, target = gold.doit(), target.doit()
    if not (isinstance(gold, MatrixBase) and isinstance(target, MatrixBase)):
        return False
    return gold.shape == target.shape and all(map(same, gold.flat(), target.flat()))


# --- Equations and inequalities -------------------------------------------------------


def _is_relation(value: Basic) -> bool:
    return isinstance(value, (Relational, And))


def _chain(value: Basic) -> list[Relational]:
    """The relations of `a < b < c`, in the order of the text."""
    if not isinstance(value, And):
        return [value]
    return list(getattr(value, "_unsorted_args", value.args))


def _value(relation: Basic, named: Callable[[Basic], bool]) -> Basic | None:
    """What an equation says that its left-hand side is; None of an inequality.

    Args:
      named: whether a left-hand side with letters is a name, as that of AB = 5, rather
        than a side of an equation to solve, as that of 2x = 10.
    """
    chain = _chain(relation)
    if not all(isinstance(x, Eq) for x in chain):
        return None
    name, value = chain[0].lhs, chain[-1].rhs  # 5 of x = 2 + 3 = 5
    if isinstance(value, Symbol) and name.is_number:  # 5 = x
        name, value = value, name
    steps = [link.rhs for link in chain[:-1]]
    if any(not x.free_symbols and not same(x, value) for x in steps):
        raise Unclear
    if not named(name) and (name.free_symbols or not same(name, value)):
        raise Unclear
    return value


def _is_name(side: Basic) -> bool:
    """Whether a side is a letter, f(x), |AB|, (x, y), or letters over each other."""
    if isinstance(side, (Symbol, AppliedUndef)):
        return True
    if isinstance(side, (Tuple, Interval)):
        names = [
            str(x) for x in (side.args if isinstance(side, Tuple) else side.args[:2])
        ]
        return names == sorted(names) and all(map(_is_name, side.args[: len(names)]))
    if isinstance(side, Abs):
        return _is_name(side.args[0])
    return isinstance(side, Mul) and all(
        _is_name(x.base if isinstance(x, Pow) and x.exp == -1 else x) for x in side.args
    )


def _is_sum(side: Basic) -> bool:
    """Whether a side is a name or a sum of names, as in a + b = 5, which states a value."""
    return _is_name(side) or isinstance(side, Add) and all(map(_is_name, side.args))


def _same_relation(gold: Basic, target: Basic) -> bool:
    one, other = _chain(gold), _chain(target)
    if all(isinstance(x, Eq) for x in one + other):
        ends = [(x[0].lhs, x[-1].rhs) for x in (one, other)]
        if all(isinstance(name, (Symbol, AppliedUndef)) for name, _ in ends):
            (name, _), (other_name, _) = ends
            if name == other_name:
                return same(_value(gold, _is_name), _value(target, _is_name))
        if any(isinstance(end, (Set, Tuple)) for pair in ends for end in pair):
            return False
    for relation, numbers in ((gold, target), (target, gold)):
        inside = _chain(numbers)[-1]
        if isinstance(inside, Eq) and isinstance(inside.rhs, Set):  # x \in S
            return _same_range(relation, inside.rhs)
    if len(one) == len(other) and all(map(_same_link, one, other)):
        return True
    if len(one) == len(other) and all(map(_same_link, one, reversed(other))):
        return True
    if any(isinstance(x, Eq) for x in one + other):
        return False
    sets = _range(gold), _range(target)
    return None not in sets and same(*sets)


def _same_link(gold: Basic, target: Basic) -> bool:
    """Whether two relations, both turned to `difference sign 0`, are proportional."""
    if not (isinstance(gold, Relational) and isinstance(target, Relational)):
        return False
    kinds = []
    for relation in (gold, target):
        difference = relation.lhs - relation.rhs
        if isinstance(relation, (Eq, Ne)):
            kinds.append((type(relation), difference))
        else:
            strict = isinstance(relation, (StrictLessThan, StrictGreaterThan))
            upward = relation.rel_op in (">", ">=")
            kinds.append((strict, difference if upward else -difference))
    (kind, one), (other_kind, other) = kinds
    if kind != other_kind or other == 0 or one == 0:
        return False
    ratio = simplify(one / other)
    if (
        not ratio.is_number
        or ratio.has(AppliedUndef)
        or ratio in (nan, zoo, oo, -oo)
        or ratio.is_zero
    ):
        return False
    return isinstance(gold, (Eq, Ne)) or bool(ratio.is_positive)


def _range(relation: Basic) -> Set | None:
    """The real numbers for which an inequality in one variable holds."""
    chain = _chain(relation)
    calls = set().union(*(x.atoms(AppliedUndef) for x in chain))
    chain = [x.xreplace({f: Symbol(str(f), real=True) for f in calls}) for x in chain]
    symbols = set().union(*(x.free_symbols for x in chain))
    if len(symbols) != 1 or any(isinstance(x, Eq) for x in chain):
        return None
    try:
        return And(*chain).as_set()
    except Exception:  # noqa: BLE001 (SymPy raises anything)
        return None


def _same_range(gold: Basic, target: Basic) -> bool:
    """Whether a set and a relation, `x \\in S` or an inequality, are the same numbers."""
    relation, numbers = (gold, target) if _is_relation(gold) else (target, gold)
    chain = _chain(relation)
    if all(isinstance(x, Eq) for x in chain):
        value = _value(relation, _is_name)
        listed = isinstance(numbers, Tuple) or items(numbers) is not None
        if isinstance(value, Interval) and listed:
            return False
        return same(numbers, value) if relation is target else same(value, numbers)
    found = _range(relation)
    if found is None or isinstance(numbers, Tuple) or items(numbers) is not None:
        return False
    return same(numbers, found)


# --- Sets, lists, tuples, intervals ---------------------------------------------------


def _is_group(value: Basic) -> bool:
    return isinstance(value, (Set, Tuple))


def _same_group(gold: Basic, target: Basic) -> bool:
    """A list has no order, a tuple has one; an open interval may be a pair."""
    gold, target = map(_lone, (gold, target))  # {5} is 5
    if not (_is_group(gold) or _is_group(target)):
        return same(gold, target)
    if isinstance(gold, Interval) and isinstance(target, Interval):
        ends = (gold.left_open, gold.right_open) == (
            target.left_open,
            target.right_open,
        )
        return ends and same(gold.start, target.start) and same(gold.end, target.end)
    one, other = _elements(gold), _elements(target)
    if one is not None and other is not None:
        ordered = isinstance(gold, (Tuple, Interval)) or _named(one) != _named(other)
        if _named(other) and not _named(one) and not _sorted(other):
            raise Unclear
        if not ordered:
            return _matched(one, other)
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(gold, Union) and isinstance(target, Union):
        return _matched(_parts(gold), _parts(target)) or _no_difference(gold, target)
    if isinstance(gold, Set) and isinstance(target, Set):
        return gold == target or _no_difference(gold, target)
    return False


def _named(values: Sequence[Basic]) -> bool:
    """Whether these are equations for several variables, as x = 1, y = 2."""
    names = {x.lhs for value in values for x in _chain(value)[:1] if isinstance(x, Eq)}
    return len(names) > 1


def _sorted(values: Sequence[Basic]) -> bool:
    """Whether the names of equations, if these are some, are in alphabetical order."""
    names = [
        str(x.lhs) for value in values for x in _chain(value)[:1] if isinstance(x, Eq)
    ]
    return names == sorted(names)


def _lone(value: Basic) -> Basic:
    """The element of a set of one, other values as they are."""
    listed = items(value)
    return listed[0] if listed is not None and len(listed) == 1 else value


def _elements(value: Basic) -> Sequence[Basic] | None:
    """Those of a list, a tuple, an open interval or a lone value; None of other sets."""
    if isinstance(value, Tuple):
        return value.args
    if isinstance(value, Interval):
        return (value.start, value.end) if value.is_open else None
    if isinstance(value, Set):
        return items(value) if items(value) is not None else _finite(value)
    return [value]


def _finite(value: Set) -> Sequence[Basic] | None:
    return value.args if value.is_FiniteSet else None


def _parts(value: Set) -> list[Set]:
    """The sets whose union `value` is."""
    if not isinstance(value, Union):
        return [value]
    return [part for x in value.args for part in _parts(x)]


def _matched(one: Sequence[Basic], other: Sequence[Basic]) -> bool:
    """Whether each of `one` has a partner of its own in `other`, the same value.

    What `other` repeats counts once, unless `one` repeats something.
    """
    left = list(other)
    if len(left) > len(one) == len(_distinct(one)):
        left = _distinct(left)
    if len(one) != len(left):
        return False
    for value in one:
        partner = next((k for k, x in enumerate(left) if same(value, x)), None)
        if partner is None:
            return False
        left.pop(partner)
    return True


def _distinct(values: Sequence[Basic]) -> list[Basic]:
    found = []
    for value in values:
        if not any(same(x, value) for x in found):
            found.append(value)
    return found


def _no_difference(gold: Set, target: Set) -> bool:
    try:
        return gold.symmetric_difference(target).is_empty is True
    except Exception:  # noqa: BLE001 (SymPy raises anything)
        return False
