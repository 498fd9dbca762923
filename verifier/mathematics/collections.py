r"""Compares lists, tuples, sets, intervals and unions part by part.

Brackets and order count for tuples and intervals: `(1,2)` differs from `(2,1)`. Order does not count for sets, lists
without brackets, and unions: `1, 2` equals `2, 1`. The argument `part` of each function compares two parts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from verifier.mathematics.relations import as_interval
from verifier.mathematics.structure import COMMAS, UNIONS, Collection, as_collection, set_condition, split

MAX_ITEMS = 64

_NAMED_VALUE = re.compile(r"([a-zA-Z])\s*=\s*([^=<>]+)")
"""`x = 1`"""
_NAMED_POINT = re.compile(r"[A-Z]\s*(?=\()")
"""`P` in front of `(1,2)`."""

Part = Callable[[str, str], bool]


def same_collection(prediction: str, gold: str, part: Part) -> bool | None:
    """Compares two collections item by item; None when neither answer is a collection."""
    if as_collection(prediction) or as_collection(gold):
        prediction, gold = _unnamed_point(prediction), _unnamed_point(gold)
    items, gold_items = _items(prediction), _items(gold)
    if len(items) > 1 or len(gold_items) > 1:
        return _same_lists(items, gold_items, part)
    unions, gold_unions = _union_parts(prediction), _union_parts(gold)
    if len(unions) > 1 or len(gold_unions) > 1:
        return same_unordered(unions, gold_unions, part)
    return _same_brackets(prediction, gold, part)


def same_unordered(items: Sequence[str], gold_items: Sequence[str], part: Part) -> bool:
    """Whether the items can be paired one to one with equal gold items."""
    if len(items) != len(gold_items) or len(items) > MAX_ITEMS:
        return False
    rest, gold_rest = list(items), []
    for gold_item in gold_items:
        if gold_item in rest:
            rest.remove(gold_item)
        else:
            gold_rest.append(gold_item)
    for gold_item in gold_rest:
        partner = next((index for index, item in enumerate(rest) if part(item, gold_item)), None)
        if partner is None:
            return False
        del rest[partner]
    return True


def _distinct(items: list[str], part: Part) -> list[str]:
    distinct: list[str] = []
    for item in items[: MAX_ITEMS + 1]:
        if not any(part(item, other) for other in distinct):
            distinct.append(item)
    return distinct


def _union_parts(text: str) -> list[str]:
    r"""The parts of a union; `(A \cup B) \cup C` has three, because parentheses around a union only group."""
    parts = []
    for part in split(text, UNIONS)[0]:
        collection = as_collection(part)
        grouped = split(collection.items[0], UNIONS)[0] if collection and len(collection.items) == 1 else []
        parts += grouped if len(grouped) > 1 else [part]
    return parts


def _same_lists(items: list[str], gold_items: list[str], part: Part) -> bool:
    """Compares lists of which at least one has no brackets and several items.

    A bare list equals a tuple with the same items in order, a set with the same items in any order, and a single value
    when all its items equal that value.
    """
    if (solution := _same_solution(items, gold_items, part)) is not None:
        return solution
    union, gold_union = _as_union(items), _as_union(gold_items)
    if union or gold_union:
        return part(union or ", ".join(items), gold_union or ", ".join(gold_items))
    if len(items) > 1 and len(gold_items) > 1:
        return same_unordered(items, gold_items, part)
    if (several := items if len(items) > 1 else gold_items) and all(part(item, several[0]) for item in several[1:]):
        return part(items[0] if items else "", gold_items[0] if gold_items else "")
    bare, bracketed = (items, gold_items) if len(items) > 1 else (gold_items, items)
    collection = as_collection(bracketed[0]) if bracketed else None
    if collection is None:
        return False
    if collection.opener == "\\{":
        return same_unordered(bare, _items(", ".join(collection.items)), part)
    is_tuple = (collection.opener, collection.closer) == ("(", ")")
    return is_tuple and _same_in_order(bare, collection.items, part)


def _same_solution(items: list[str], gold_items: list[str], part: Part) -> bool | None:
    """Compares `x = 1, y = 2` with `(x, y) = (1, 2)`, or with `(1, 2)` in alphabetical order; None for other lists."""
    named, other = (items, gold_items) if len(items) > 1 else (gold_items, items)
    values = {match[1]: match[2] for item in named if (match := _NAMED_VALUE.fullmatch(item))}
    if len(values) < len(named) or len(named) < 2 or len(other) != 1:
        return None
    names, _, point = other[0].rpartition("=")
    order = re.findall(r"[a-zA-Z]", names) if names else sorted(values)
    collection = as_collection(point.strip())
    if collection is None or collection.opener != "(" or sorted(order) != sorted(values):
        return None
    return _same_in_order([values[name] for name in order], collection.items, part)


def _unnamed_point(text: str) -> str:
    """`P(1,2)` as `(1,2)`; other text unchanged."""
    if not _NAMED_POINT.match(text):
        return text
    collection = as_collection(text[1:])
    return text[1:] if collection is not None and len(collection.items) > 1 else text


def _same_in_order(items: Sequence[str], others: Sequence[str], part: Part) -> bool:
    return len(items) == len(others) and all(part(item, other) for item, other in zip(items, others, strict=True))


def _as_union(items: Sequence[str]) -> str:
    """Several inequalities in one variable, such as `x < -1, x > 1`, as a union of intervals; empty for other items."""
    intervals = [interval for item in items if (interval := as_interval(item)) is not None]
    if len(items) < 2 or len(intervals) < len(items) or len({variable for variable, _ in intervals}) > 1:
        return ""
    return " \\cup ".join(interval for _, interval in intervals)


def _same_brackets(prediction: str, gold: str, part: Part) -> bool | None:
    first, second = as_collection(prediction), as_collection(gold)
    if first is None and second is None:
        return None
    inside, gold_inside = _single(first), _single(second)
    if inside is not None and gold_inside is not None and first is not None and second is not None:
        return _kind(first) == _kind(second) and part(inside, gold_inside)
    if inside is not None and second is None:
        return inside != "\\emptyset" and part(inside, gold)
    if gold_inside is not None and first is None:
        return gold_inside != "\\emptyset" and part(prediction, gold_inside)
    if inside is not None and first is not None and first.opener == "\\{" and second is not None:
        return second.opener == "(" and part(inside, gold)
    if gold_inside is not None and second is not None and second.opener == "\\{" and first is not None:
        return first.opener == "(" and part(prediction, gold_inside)
    condition, gold_condition = first and set_condition(first), second and set_condition(second)
    if condition or gold_condition:
        return part(condition or prediction, gold_condition or gold)
    if first is None or second is None or _kind(first) != _kind(second):
        return False
    if first.opener == "\\{":
        items, gold_items = (_distinct(_items(", ".join(each.items)), part) for each in (first, second))
        return same_unordered(items, gold_items, part)
    return _same_in_order(first.items, second.items, part)


def _single(collection: Collection | None) -> str | None:
    """The only item of a collection, whose brackets then only group: `7` for `(7)`; None for other collections."""
    if collection is None or len(collection.items) != 1 or set_condition(collection) is not None:
        return None
    return collection.items[0]


def _kind(collection: Collection) -> tuple[str, str]:
    if collection.opener == "\\langle":
        return "(", ")"
    return collection.opener, collection.closer


def _items(text: str) -> list[str]:
    r"""The items of a bare list. `a \pm b` counts as the two items `a + b` and `a - b`."""
    items = []
    for item in filter(None, split(text, COMMAS)[0]):
        collection = as_collection(item)
        is_single = collection is None or len(collection.items) == 1
        is_point = collection is not None and collection.opener == "(" and item.count("\\pm") == 1
        if (is_single or is_point) and ("\\pm" in item or "\\mp" in item):
            items.append(item.replace("\\pm", "+").replace("\\mp", "-"))
            items.append(item.replace("\\pm", "-").replace("\\mp", "+"))
        else:
            items.append(item)
    return items
