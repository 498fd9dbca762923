r"""Compares two single expressions.

Rational numbers and products of powers are compared exactly, everything else by value at seeded random points. Two
expressions that agree to dozens of digits at several random points count as equal. Expressions that differ at any point
are different.

Special cases:

- A term may be too small beside another to show in the digits. Then more digits are used, and at last the terms are
  compared one by one. So 10^{10^{10}}+1 never equals 10^{10^{10}}.
- With variables, points where a logarithm or an even root is not real are skipped.
- For a `\log` without a base, both 10 and e are tried.

None means undecided: no value could be computed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from verifier.mathematics.evaluate import Numeric, Undefined, exact
from verifier.mathematics.parse import parse
from verifier.mathematics.powers import power_form, same_terms
from verifier.mathematics.tree import Node, Operation, ParseError, free_symbols, whole_symbols

NUM_POINTS = 6
NUM_ATTEMPTS = 24
MIN_POINTS = 3
CONSTANT_DIGITS = 200
MAX_DIGITS = 1000
VARIABLE_DIGITS = 50
MAX_SYMBOLS = 12
FAR = 20, 30
"""Range of the far sample points. It lies beyond the kinks that occur in answers: |x - 5| has its kink at 5."""
_KINKED = frozenset(("abs", "max", "min", "lfloor", "lceil", "mod", "root"))
"""Operations that can give an expression kinks or jumps."""


def same_expression(prediction: str, gold: str) -> bool | None:
    """Whether two expressions have the same value wherever both are defined; None when undecided."""
    if prediction.count(":") > 1 or gold.count(":") > 1:
        return _same_proportion(prediction.split(":"), gold.split(":"))
    try:
        first, second = _parse_ratio(prediction), _parse_ratio(gold)
    except ParseError:
        return None
    if first == second:
        return True
    exact_first, exact_second = exact(first), exact(second)
    if exact_first is not None and exact_second is not None:
        return exact_first == exact_second
    if _is_infinite(first) or _is_infinite(second):
        return False
    form, other_form = power_form(first), power_form(second)
    if form is not None and other_form is not None:
        return form == other_form
    verdict = _same_values(first, second, natural_log=False)
    if verdict is False and (_has_bare_log(first) or _has_bare_log(second)):
        return _same_values(first, second, natural_log=True)
    return verdict


def same_equation(prediction: tuple[str, str], gold: tuple[str, str], *, ordered: bool = False) -> bool | None:
    """Whether two equations with the same variables differ by a constant factor only: `x + y = 1`, `2x + 2y = 2`.

    Args:
        prediction: left and right side.
        gold: left and right side.
        ordered: True for inequalities: the factor must be positive.
    """
    try:
        first, second = (
            Operation("add", (parse(left), Operation("neg", (parse(right),)))) for left, right in (prediction, gold)
        )
    except ParseError:
        return None
    symbols = free_symbols(first) | free_symbols(second)
    if not free_symbols(first) or not free_symbols(second):
        return False
    if free_symbols(first) != free_symbols(second) or len(symbols) > MAX_SYMBOLS:
        return False
    numeric = Numeric(VARIABLE_DIGITS)
    pairs = _values(first, second, symbols, numeric)
    ratios = [(one, two) for one, two in pairs if not (numeric.agree(one, 0) or numeric.agree(two, 0))]
    if len(ratios) < MIN_POINTS:
        return False
    (one, two), *others = ratios
    same_sign = not ordered or numeric.context.re(one / two) > 0
    return same_sign and all(numeric.agree(one * other_two, two * other_one) for other_one, other_two in others)


def value_of(text: str) -> Any:
    """The value of a constant: a Fraction, or a real number with `CONSTANT_DIGITS` digits; None for other texts."""
    try:
        node = parse(text)
    except ParseError:
        return None
    value: Any = exact(node)
    if value is None and not free_symbols(node):
        numeric = Numeric(CONSTANT_DIGITS)
        try:
            value = numeric.value(node, {})
        except Undefined:
            return None
        value = None if numeric.context.im(value) else numeric.context.re(value)
    return value


def linear_root(left: str, right: str) -> tuple[str, Any, Any] | None:
    """Returns (variable, root, slope) of left - right where it is linear in its only variable; None elsewhere."""
    try:
        node = Operation("add", (parse(left), Operation("neg", (parse(right),))))
    except ParseError:
        return None
    names = free_symbols(node)
    if len(names) != 1:
        return None
    (name,) = names
    numeric = Numeric(CONSTANT_DIGITS)
    try:
        zero, one, other = (numeric.value(node, {name: numeric.context.mpf(x)}) for x in (0, 1, "-7.25"))
    except Undefined:
        return None
    slope = one - zero
    if (
        numeric.context.im(slope)
        or numeric.context.im(zero)
        or not slope
        or not numeric.agree(other - zero, slope * numeric.context.mpf("-7.25"))
    ):
        return None
    return name, -zero / slope, slope


def _same_proportion(prediction: list[str], gold: list[str]) -> bool | None:
    """Compares proportions of three or more rational terms: `2 : 4 : 6` equals `1 : 2 : 3`."""
    values, gold_values = [value_of(term) for term in prediction], [value_of(term) for term in gold]
    if len(values) != len(gold_values) or not all(isinstance(value, Fraction) for value in (*values, *gold_values)):
        return None
    return all(value * gold_values[0] == other * values[0] for value, other in zip(values, gold_values, strict=True))


def _parse_ratio(text: str) -> Node:
    """Parses an expression; the ratio `a : b` is a quotient."""
    left, colon, right = text.partition(":")
    return Operation("div", (parse(left), parse(right))) if colon else parse(text)


def _same_values(first: Node, second: Node, *, natural_log: bool) -> bool | None:
    symbols = free_symbols(first) | free_symbols(second)
    if len(symbols) > MAX_SYMBOLS:
        return None
    for digits in (VARIABLE_DIGITS, CONSTANT_DIGITS, MAX_DIGITS)[not symbols :]:
        numeric = Numeric(digits, natural_log=natural_log, real=bool(symbols))
        verdict = _agree_at_points(first, second, symbols, numeric)
        if verdict is None and symbols:
            numeric = Numeric(digits, natural_log=natural_log)
            verdict = _agree_at_points(first, second, symbols, numeric)
        if not (verdict and numeric.absorbed):
            return verdict
    return same_terms(first, second)


def _agree_at_points(first: Node, second: Node, symbols: frozenset[str], numeric: Numeric) -> bool | None:
    num_points = 0
    for one, two in _values(first, second, symbols, numeric):
        if not numeric.agree(one, two):
            return False
        num_points += 1
    return True if num_points >= (MIN_POINTS if symbols else 1) else None


def _values(first: Node, second: Node, symbols: frozenset[str], numeric: Numeric) -> Iterator[tuple[Any, Any]]:
    """Yields both values at random points where both are defined: at `NUM_POINTS`, or thrice as many with kinks."""
    names = sorted(symbols)
    has_kinks = _has_kinks(first) or _has_kinks(second)
    whole = whole_symbols(first) | whole_symbols(second)
    generator = random.Random(" ".join(names))
    found = 0
    for attempt in range(NUM_ATTEMPTS if names else 1):
        # With kinks every second point is far from 0, so that the expressions are compared on both sides of a kink.
        far = attempt // 2 if has_kinks and attempt % 2 else None
        point = {name: _coordinate(generator, numeric, name in whole, far, i) for i, name in enumerate(names)}
        try:
            pair = numeric.value(first, point), numeric.value(second, point)
        except Undefined:
            continue
        yield pair
        found += 1
        if found == (3 * NUM_POINTS if has_kinks else NUM_POINTS):
            return


def _coordinate(generator: random.Random, numeric: Numeric, is_whole: bool, far: int | None, index: int) -> Any:
    """A random value for the variable with that index: of the far point number `far`, or near 0 where `far` is None."""
    low, high = FAR if far is not None else (1, 9) if is_whole else (-3, 3)
    if is_whole:
        return numeric.context.mpf(generator.randint(low, high))
    size = numeric.context.mpf(generator.uniform(low, high))
    return -size if far is not None and far >> index % 3 & 1 else size


def _has_kinks(node: Node) -> bool:
    """Whether a tree can agree with another one on a whole range and differ outside it, as |x - 5| and 5 - x do."""
    return isinstance(node, Operation) and (node.name in _KINKED or any(map(_has_kinks, node.arguments)))


def _has_bare_log(node: Node) -> bool:
    if not isinstance(node, Operation):
        return False
    return (node.name == "log" and len(node.arguments) == 1) or any(map(_has_bare_log, node.arguments))


def _is_infinite(node: Node) -> bool:
    r"""Whether a tree is `\infty` or `-\infty`."""
    while isinstance(node, Operation) and node.name == "neg":
        node = node.arguments[0]
    return not isinstance(node, Operation) and getattr(node, "name", "") == "\\infty"
