r"""Single expressions: exact when both are rational, else by value at seeded random points.

Two analytic expressions that agree to dozens of digits at several random points are equal for every
purpose of grading; two that differ anywhere are not. Constants are compared to 100 of 200 digits. Where `\log` has no
base both readings (10 and e) are tried. None means that no value could be found.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from verifier.math_evaluate import Numeric, Undefined, exact
from verifier.math_parse import parse
from verifier.math_tree import Node, Operation, ParseError, free_symbols

NUM_POINTS = 6
NUM_ATTEMPTS = 18
MIN_POINTS = 3
CONSTANT_DIGITS = 200
VARIABLE_DIGITS = 50
MAX_SYMBOLS = 12


def same_expression(prediction: str, gold: str) -> bool | None:
    """Whether two expressions have the same value wherever both have one; None when that cannot be seen."""
    try:
        first, second = _parse_ratio(prediction), _parse_ratio(gold)
    except ParseError:
        return None
    exact_first, exact_second = exact(first), exact(second)
    if exact_first is not None and exact_second is not None:
        return exact_first == exact_second
    if _is_infinite(first) or _is_infinite(second):
        return first == second
    verdict = _same_values(first, second, natural_log=False)
    if verdict is False and (_has_bare_log(first) or _has_bare_log(second)):
        return _same_values(first, second, natural_log=True)
    return verdict


def same_equation(prediction: tuple[str, str], gold: tuple[str, str]) -> bool | None:
    """Whether two equations (left, right) in at least one variable differ by a constant factor only."""
    try:
        first, second = (
            Operation("add", (parse(left), Operation("neg", (parse(right),)))) for left, right in (prediction, gold)
        )
    except ParseError:
        return None
    symbols = free_symbols(first) | free_symbols(second)
    if not free_symbols(first) or not free_symbols(second):
        return False
    numeric = Numeric(VARIABLE_DIGITS)
    pairs = _values(first, second, symbols, numeric)
    ratios = [(one, two) for one, two in pairs if not (numeric.agree(one, 0) or numeric.agree(two, 0))]
    if len(ratios) < MIN_POINTS:
        return None
    (one, two), *others = ratios
    return all(numeric.agree(one * other_two, two * other_one) for other_one, other_two in others)


def _parse_ratio(text: str) -> Node:
    """An expression, or the ratio `a : b` as a quotient."""
    left, colon, right = text.partition(":")
    return Operation("div", (parse(left), parse(right))) if colon else parse(text)


def _same_values(first: Node, second: Node, *, natural_log: bool) -> bool | None:
    symbols = free_symbols(first) | free_symbols(second)
    if len(symbols) > MAX_SYMBOLS:
        return None
    numeric = Numeric(VARIABLE_DIGITS if symbols else CONSTANT_DIGITS, natural_log=natural_log)
    num_points = 0
    for one, two in _values(first, second, symbols, numeric):
        if not numeric.agree(one, two):
            return False
        num_points += 1
    return True if num_points >= (MIN_POINTS if symbols else 1) else None


def _values(first: Node, second: Node, symbols: frozenset[str], numeric: Numeric) -> Iterator[tuple[Any, Any]]:
    """Both values at up to `NUM_POINTS` random points where both are defined; points depend on the symbols alone."""
    names = sorted(symbols)
    generator = random.Random(" ".join(names))
    found = 0
    for _ in range(NUM_ATTEMPTS if names else 1):
        point = {name: numeric.context.mpf(generator.uniform(-3, 3)) for name in names}
        try:
            pair = numeric.value(first, point), numeric.value(second, point)
        except Undefined:
            continue
        yield pair
        found += 1
        if found == NUM_POINTS:
            return


def _has_bare_log(node: Node) -> bool:
    if not isinstance(node, Operation):
        return False
    return (node.name == "log" and len(node.arguments) == 1) or any(map(_has_bare_log, node.arguments))


def _is_infinite(node: Node) -> bool:
    r"""Whether a tree is `\infty` with any sign."""
    while isinstance(node, Operation) and node.name == "neg":
        node = node.arguments[0]
    return not isinstance(node, Operation) and getattr(node, "name", "") == "\\infty"
