r"""Compares sets of real numbers by the numbers they contain.

A set may be an interval, a union, an intersection, a difference, an inequality, `x \ne 2` or a finite set. For example
`(-2,0) \cup [0,3]` equals `-2 < x \le 3`, `|x| < 3` equals `(-3,3)`, and `\mathbb{R} \setminus \{2\}` equals `x \ne 2`.

A bound is a constant: exact where it is rational, otherwise compared to `BITS` bits. Texts with symbolic bounds, tuples
and sets of other dimensions are not sets of this module.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Any, NamedTuple

from verifier.mathematics.expression import linear_root, value_of
from verifier.mathematics.relations import as_interval
from verifier.mathematics.structure import RELATIONS, Collection, as_collection, set_condition, split

BITS = 330
MAX_BITS = 10**4
MAX_SIMPLE = 10**6
MAX_PARTS = 32

_REALS = re.compile(
    r"\\mathbb\s*\{?\s*R\s*\}?|(?:\\text\s*\{)?\s*(?:all\s+)?real(?:s|\s+numbers?)(?:\s+[a-z])?\s*\}?", re.IGNORECASE
)
r"""`\mathbb{R}`, `all real numbers`"""
_EXCEPT = re.compile(
    r"(?:\\text\s*\{)?\s*all\s+real\s+numbers\s+(?:[a-z]\s+)?(?:except|other\s+than)\s*\}?\s*(.+)", re.IGNORECASE
)
"""`all real numbers except 2`"""
_EMPTY = re.compile(r"\\emptyset|(?:the\s+)?empty\s+set|\\\{\s*\\\}", re.IGNORECASE)
r"""`\emptyset`, `empty set`, `\{ \}`"""
_ABSOLUTE = re.compile(r"(?:\||\\lvert)([^|]+)(?:\||\\rvert)")
"""`|x - 1|`"""
_REVERSED = re.compile(r"([\[\]])([^\[\](){};,]+)[,;]([^\[\](){};,]+)([\[\]])")
"""`]0, 1[`: the French spelling of an open interval."""
_FLIPPED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}

Bound = tuple[Any, int]
"""(value, side): side -1 is just below the value, 0 at the value, 1 just above it."""
Interval = tuple[Bound, Bound]
_ALL: list[Interval] = [((-math.inf, 1), (math.inf, -1))]


class RealSet(NamedTuple):
    """A set of real numbers."""

    intervals: list[Interval]
    """Disjoint and in rising order."""
    variable: str = ""
    """The variable in the text, as `x` of `x > 3`; empty without one."""


def same_real_set(prediction: str, gold: str) -> bool | None:
    """Whether two sets contain the same numbers; None when one answer is not a set, or neither is written as one."""
    if not (_looks_like_a_set(prediction) or _looks_like_a_set(gold)):
        return None
    first = as_real_set(prediction)
    second = as_real_set(gold) if first is not None else None
    if first is None or second is None:
        return None
    if first.variable and second.variable and first.variable != second.variable:
        return False
    return first.intervals == second.intervals


def as_real_set(text: str) -> RealSet | None:
    """The set that a normalized text describes; None when it describes none."""
    for separators, combine in ((frozenset((";", "\\cup")), _union), (frozenset((",", "\\cap")), _intersection)):
        parts, found = split(text, separators)
        if len(parts) > MAX_PARTS:
            return None
        if found:
            sets = [as_real_set(part) for part in parts if part]
            known = [each for each in sets if each is not None]
            if not known or len(known) < len(sets) or ("," in found and not all(each.variable for each in known)):
                return None
            return _combined(known, combine, is_list="," in found)
    parts, found = split(text, frozenset(("\\setminus",)))
    if len(found) == 1:
        whole, removed = as_real_set(parts[0]), as_real_set(parts[1])
        if whole is None or removed is None:
            return None
        return RealSet(_intersection(whole.intervals, _complement(removed.intervals)), whole.variable)
    return _simple_set(text)


def _combined(sets: list[RealSet], combine: Any, *, is_list: bool) -> RealSet | None:
    """Combines the sets of a list or an operator by `combine`.

    Two inequalities in a list are an intersection, `x > 2, x < 5`, unless that is empty: `x < -1, x > 1` is a union.
    """
    if len({each.variable for each in sets} - {""}) > 1:
        return None
    intervals = sets[0].intervals
    for each in sets[1:]:
        intervals = combine(intervals, each.intervals)
    if is_list and not intervals:
        intervals = _union(*(each.intervals for each in sets)) if len(sets) == 2 else intervals
    return RealSet(intervals, next((each.variable for each in sets if each.variable), ""))


def _simple_set(text: str) -> RealSet | None:
    if _REALS.fullmatch(text):
        return RealSet(_ALL)
    if _EMPTY.fullmatch(text):
        return RealSet([])
    if match := _EXCEPT.fullmatch(text):
        removed = as_real_set(f"\\{{{match[1]}\\}}")
        return removed and RealSet(_complement(removed.intervals))
    signs = split(text, RELATIONS)[1]
    if signs:
        return _relation(text)
    if (match := _REVERSED.fullmatch(text)) and (match[1] == "]" or match[4] == "["):
        return _interval("(" if match[1] == "]" else "[", match[2], match[3], ")" if match[4] == "[" else "]")
    collection = as_collection(text)
    if collection is None:
        return None
    if collection.opener == "\\{":
        if condition := set_condition(Collection("\\{", "\\}", (text[2:-2],))):
            return as_real_set(condition)
        values = [_bound(item) for item in collection.items]
        if any(value is None or abs(value) == math.inf for value in values):
            return None
        return RealSet(_union([], [((value, 0), (value, 0)) for value in values]))
    if len(collection.items) == 2 and collection.opener in "([" and collection.closer in ")]":
        low, high = collection.items
        return _interval(collection.opener, low, high, collection.closer)
    return as_real_set(collection.items[0]) if len(collection.items) == 1 and collection.opener == "(" else None


def _relation(text: str) -> RealSet | None:
    parts, signs = split(text, RELATIONS)
    if signs == ["\\in"]:
        inner = as_real_set(parts[1])
        return inner and RealSet(inner.intervals, parts[0])
    if signs in (["\\ne"], ["="]) and re.fullmatch(r"\\?[a-zA-Z]+", parts[0]):
        value = _bound(parts[1])
        if value is None or abs(value) == math.inf:
            return None
        point: list[Interval] = [((value, 0), (value, 0))]
        return RealSet(_complement(point) if signs == ["\\ne"] else point, parts[0])
    if (named := as_interval(text)) is not None:
        bounds = as_collection(named[1])
        if bounds is None or len(bounds.items) != 2:
            return None
        interval = _interval(bounds.opener, bounds.items[0], bounds.items[1], bounds.closer)
        return interval and RealSet(interval.intervals, named[0])
    if len(signs) != 1 or signs[0] not in _FLIPPED:
        return None
    if (match := _ABSOLUTE.fullmatch(parts[0])) is not None:
        if signs[0] in ("<", "\\le"):
            return as_real_set(f"-({parts[1]}) {signs[0]} {match[1]}, {match[1]} {signs[0]} {parts[1]}")
        return as_real_set(f"{match[1]} {signs[0]} {parts[1]}; {match[1]} {_FLIPPED[signs[0]]} -({parts[1]})")
    solved = linear_root(parts[0], parts[1])
    if solved is None:
        return None
    name, root, slope = solved
    sign = signs[0] if slope > 0 else _FLIPPED[signs[0]]
    value, closed = _exactly(root), 0 if sign in ("\\le", "\\ge") else 1
    if value is None:
        return None
    above: Interval = ((value, closed), (math.inf, -1))
    return RealSet([above if sign in (">", "\\ge") else ((-math.inf, 1), (value, -closed))], name)


def _interval(opener: str, low: str, high: str, closer: str) -> RealSet | None:
    first, second = _bound(low), _bound(high)
    # An empty interval is a point instead: `(0,0)`.
    is_closed = opener == "[" and closer == "]"
    if first is None or second is None or first > second or (first == second and not is_closed):
        return None
    lower = (first, 0 if opener == "[" and first != -math.inf else 1)
    upper = (second, 0 if closer == "]" and second != math.inf else -1)
    return RealSet([(lower, upper)])


def _bound(text: str) -> Any:
    """The value of a bound: a fraction or an infinity; None when it is not constant."""
    text = text.replace(" ", "")
    if text in ("\\infty", "+\\infty", "-\\infty"):
        return -math.inf if text[0] == "-" else math.inf
    value = value_of(text)
    return None if value is None else _exactly(value)


def _exactly(value: Any) -> Fraction | None:
    """A value as a Fraction, so that bounds can be compared exactly; None beyond `MAX_BITS`.

    A real number becomes the fraction with a denominator of at most `MAX_SIMPLE` that it agrees with, or otherwise is
    rounded to `BITS` bits.
    """
    if isinstance(value, Fraction) or not value:
        return Fraction(value) if isinstance(value, Fraction) else Fraction(0)
    context, size = value.context, value.context.mag(value)
    if abs(size) > MAX_BITS:
        return None
    shift = BITS - size
    rounded: Fraction = Fraction(int(context.nint(context.ldexp(value, shift)))) / Fraction(2) ** shift
    simple = rounded.limit_denominator(MAX_SIMPLE)
    return simple if abs(simple - rounded) <= abs(rounded) / 2 ** (BITS - 8) else rounded


def _union(first: list[Interval], second: list[Interval]) -> list[Interval]:
    merged: list[Interval] = []
    for low, high in sorted(first + second):
        if merged and low <= (merged[-1][1][0], merged[-1][1][1] + 1):
            merged[-1] = (merged[-1][0], max(merged[-1][1], high))
        else:
            merged.append((low, high))
    return merged


def _intersection(first: list[Interval], second: list[Interval]) -> list[Interval]:
    pairs = ((max(a[0], b[0]), min(a[1], b[1])) for a in first for b in second)
    return sorted((low, high) for low, high in pairs if low <= high)


def _complement(intervals: list[Interval]) -> list[Interval]:
    rest = _ALL
    for low, high in intervals:
        gaps: list[Interval] = [((-math.inf, 1), (low[0], low[1] - 1)), ((high[0], high[1] + 1), (math.inf, -1))]
        rest = _intersection(rest, [(start, end) for start, end in gaps if start <= end])
    return rest


def _looks_like_a_set(text: str) -> bool:
    return bool(
        re.search(r"[<>\[\]]|\\(?:le|ge|ne|cup|cap|setminus|infty|in|emptyset|mathbb|\{)(?![a-zA-Z])|real|empty", text)
    )
