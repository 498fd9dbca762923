r"""Equations, inequalities and memberships: `x = 5` may stand for `5`, `x > 3` for `(3, \infty)`, `3 = 7` for nothing.

`part` compares two parts.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from verifier.math_expression import same_equation
from verifier.math_structure import COMMAS, RELATIONS, split

Part = Callable[[str, str], bool]

_LABEL = re.compile(
    r"(?:\\text\s*\{[^{}]*\}|\\angle\s*[A-Z]{0,3}|[A-Z]{2,3}|\\(?!pi|infty)[a-zA-Z]+|(?![ei]\b)[a-zA-Z])"
    r"'*(?:_\s*(?:\{[^{}]*\}|\w))?'*(?:\s*\(\s*[a-zA-Z](?:\s*,\s*[a-zA-Z])*\s*\))?"
)
_FLIPPED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}
_EQUALS = frozenset(("=",))


def same_relation(prediction: str, gold: str, part: Part) -> bool | None:
    """Compares what two relations say; None when neither is one."""
    (parts, signs), (gold_parts, gold_signs) = _split(prediction), _split(gold)
    if not signs and not gold_signs:
        return None
    interval, gold_interval = as_interval(prediction), as_interval(gold)
    if interval is not None or gold_interval is not None:
        return _same_intervals(interval, gold_interval, prediction, gold, part)
    value, gold_value = _assigned(parts, signs, part), _assigned(gold_parts, gold_signs, part)
    if value is not None and gold_value is not None:
        if value[0] == gold_value[0] or not (value[0] and gold_value[0]):
            return part(value[1], gold_value[1])
    elif value is not None and not gold_signs:
        return part(value[1], gold)
    elif gold_value is not None and not signs:
        return part(prediction, gold_value[1])
    if signs == gold_signs == ["="]:
        return same_equation((parts[0], parts[1]), (gold_parts[0], gold_parts[1]))
    if signs == gold_signs:
        return all(part(first, second) for first, second in zip(parts, gold_parts, strict=True))
    return False


def as_interval(text: str) -> tuple[str, str] | None:
    """(variable, interval) of an inequality in one variable, or None."""
    parts, signs = _split(text)
    if not signs or not set(signs) <= _FLIPPED.keys():
        return None
    if len(signs) == 1:
        if _LABEL.fullmatch(parts[1]) and not _LABEL.fullmatch(parts[0]):
            parts, signs = parts[::-1], [_FLIPPED[signs[0]]]
        variable, bound = parts
        lower, upper = (bound, "\\infty") if signs[0] in (">", "\\ge") else ("-\\infty", bound)
        strict_lower, strict_upper = signs[0] != "\\ge", signs[0] != "\\le"
    elif len(signs) == 2:
        if signs[0] in (">", "\\ge"):
            parts, signs = parts[::-1], [_FLIPPED[sign] for sign in signs[::-1]]
        if not set(signs) <= {"<", "\\le"}:
            return None
        lower, variable, upper = parts
        strict_lower, strict_upper = signs[0] == "<", signs[1] == "<"
    else:
        return None
    if not _LABEL.fullmatch(variable) or not lower or not upper:
        return None
    strict_lower, strict_upper = strict_lower or lower == "-\\infty", strict_upper or upper == "\\infty"
    return variable, f"{'(' if strict_lower else '['}{lower},{upper}{')' if strict_upper else ']'}"


def _same_intervals(
    first: tuple[str, str] | None, second: tuple[str, str] | None, prediction: str, gold: str, part: Part
) -> bool:
    if first is not None and second is not None:
        return first[0] == second[0] and part(first[1], second[1])
    for interval, other, is_prediction in ((first, gold, True), (second, prediction, False)):
        if interval is not None:
            parts, signs = _split(other)
            is_membership = signs == ["\\in"] and parts[0] == interval[0]
            if signs and not is_membership:
                return False
            values = parts[1] if is_membership else other
            return part(interval[1], values) if is_prediction else part(values, interval[1])
    return False


def _assigned(parts: list[str], signs: list[str], part: Part) -> tuple[str, str] | None:
    r"""(label, value) of `x = 5`, `x \in S`, `x \approx 1.3` or a chain of equal values, `x = 2 + 3 = 5`; or None."""
    if signs in (["\\in"], ["\\approx"]) and _LABEL.fullmatch(parts[0]):
        return parts[0], parts[1]
    if not signs or set(signs) != _EQUALS:
        return None
    label, values = ("", parts) if not _LABEL.fullmatch(parts[0]) else (parts[0], parts[1:])
    if len(values) > 1 and not all(part(value, values[-1]) for value in values[:-1]):
        return None
    return ("".join(label.split()), values[-1]) if values[-1] else None


def _split(text: str) -> tuple[list[str], list[str]]:
    """Parts and signs of one relation; a list of relations is not one."""
    if len(split(text, COMMAS)[0]) > 1:
        return [text], []
    return split(text, RELATIONS)
