r"""Compares equations, inequalities, memberships and residues.

`x = 5` equals `5`, and `x > 3` equals `(3, \infty)`. A chain of values must be true: `x = 2 + 3 = 5` is 5, but `3 = 7`
equals no value. The argument `part` of each function compares two parts.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from verifier.mathematics.expression import same_equation
from verifier.mathematics.precision import same_rounded
from verifier.mathematics.structure import COMMAS, RELATIONS, split

Part = Callable[[str, str], bool]

_ARGUMENTS = r"\s*\(\s*-?\w+(?:\s*(?:,|[=<>]|\\[lg]e|\\cap|\\cup|\|)\s*-?\w+)*\s*\)"
_NAME = r"(?:\\text\s*\{[^{}]*\}|\\angle\s*[A-Z]{0,3}|[A-Z]{2,3}|[a-zA-Z]{4,}"
_NAME += r"|\\(?:dot|vec|bar|overline|hat)\s*\{?\s*\w+\s*\}?"
_NAME += r"|\\frac\s*\{\s*d\s*\w\s*\}\s*\{\s*d\s*\w\s*\}"
_NAME += rf"|\\(?!pi|infty)[a-zA-Z]+|(?![ei]\b)[a-zA-Z])'*(?:_\s*(?:\{{[^{{}}]*\}}|\w))?'*(?:{_ARGUMENTS})?"
_NAME += rf"|[A-Z]\s*\^\s*\{{\s*-1\s*\}}|[a-z]\s*\^\s*\{{\s*-1\s*\}}{_ARGUMENTS}"
_LABEL = re.compile(rf"{_NAME}|\|\s*(?:[A-Z]{{2}}|\\vec\s*\{{?\w+\}}?)\s*\||\(\s*[a-zA-Z](?:\s*,\s*[a-zA-Z])+\s*\)")
r"""The name of a value: `x`, `f(x)`, `\angle ABC`, `\text{Area}`, `dy/dx`, `|AB|`, `(x, y)`."""
_RESIDUE = re.compile(
    r"(?:([a-zA-Z])\s*(\\equiv|=)\s*)?(-?\d{1,300})\s*(\\pmod|\(\s*(?:\\mod|mod)|\\mod|mod)\s*\{?\s*(\d{1,300})\s*\}?\s*\)?"
)
r"""`x \equiv 3 \pmod 7`, `3 \pmod 7`, `3 (mod 7)`"""
_FLIPPED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}
_EQUALS = frozenset(("=",))


def same_relation(prediction: str, gold: str, part: Part) -> bool | None:
    """Compares two relations, or a relation with a value; None when neither answer is a relation."""
    if ("mod" in prediction or "mod" in gold) and (same := _same_residues(prediction, gold, part)) is not None:
        return same
    (parts, signs), (gold_parts, gold_signs) = _split(prediction), _split(gold)
    if not signs and not gold_signs:
        return None
    if "\\approx" in signs + gold_signs:
        return any(part(one, two) for one in _readings(parts, signs) for two in _readings(gold_parts, gold_signs))
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
    if len(signs) == 1 and set(signs + gold_signs) <= _FLIPPED.keys() and len(gold_signs) == 1:
        return _same_inequality(parts, signs[0], gold_parts, gold_signs[0])
    if signs == gold_signs:
        return all(part(first, second) for first, second in zip(parts, gold_parts, strict=True))
    return False


def as_interval(text: str) -> tuple[str, str] | None:
    r"""Returns (variable, interval) of an inequality in one variable: `x \ge 3` is ("x", "[3,\infty)"); or None."""
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
    # The variable may be missing, as in `\ge 5`.
    if not (_LABEL.fullmatch(variable) or (len(signs) == 1 and not variable)) or not lower or not upper:
        return None
    strict_lower, strict_upper = strict_lower or lower == "-\\infty", strict_upper or upper == "\\infty"
    return variable, f"{'(' if strict_lower else '['}{lower},{upper}{')' if strict_upper else ']'}"


def _same_intervals(
    first: tuple[str, str] | None, second: tuple[str, str] | None, prediction: str, gold: str, part: Part
) -> bool:
    if first is not None and second is not None:
        same_name = first[0] == second[0] or not (first[0] and second[0])
        return same_name and part(first[1], second[1])
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
    r"""Returns (label, value) of `x = 5`, of `x \in S`, or of a chain of equal values `x = 2 + 3 = 5`; or None."""
    if signs == ["\\in"] and _LABEL.fullmatch(parts[0]):
        return parts[0], parts[1]
    if not signs or set(signs) != _EQUALS:
        return None
    if len(parts) == 2 and _LABEL.fullmatch(parts[1]) and not _LABEL.fullmatch(parts[0]):
        parts = parts[::-1]
    label, values = ("", parts) if not _LABEL.fullmatch(parts[0]) else (parts[0], parts[1:])
    if len(values) > 1 and not all(part(value, values[-1]) for value in values[:-1]):
        return None
    return ("".join(label.split()), values[-1]) if values[-1] else None


def _same_inequality(parts: list[str], sign: str, gold_parts: list[str], gold_sign: str) -> bool:
    """Compares two inequalities up to a factor. A negative factor turns the sign: `2x + y < 4` is `-2x - y > -4`."""
    strict = ("<", ">")
    if (sign in strict) != (gold_sign in strict):
        return False
    gold_sides = (gold_parts[0], gold_parts[1]) if sign == gold_sign else (gold_parts[1], gold_parts[0])
    return bool(same_equation((parts[0], parts[1]), gold_sides, ordered=True))


def _readings(parts: list[str], signs: list[str]) -> list[str]:
    r"""The values that a text with `\approx` states: `x = \pi \approx 3.14` states `\pi` and `3.14`.

    None of them when the first does not round to the second. A text without `\approx` states itself.
    """
    if "\\approx" not in signs:
        return ["".join(f"{part} {sign} " for part, sign in zip(parts, [*signs, ""], strict=True)).strip()]
    index = len(signs) - 1 - signs[::-1].index("\\approx")
    exact, rounded = parts[index], parts[-1]
    if not exact or _LABEL.fullmatch(exact):
        return [rounded]
    return [exact, rounded] if same_rounded(exact, f"\\approx {rounded}") else []


def _residue(text: str) -> tuple[str, int, int] | None:
    r"""Returns (variable, residue, modulus) of `x \equiv 3 \pmod 7`; or None. `17 \bmod 5` is not a residue but 2."""
    match = _RESIDUE.fullmatch(text)
    if match is None or int(match[5]) == 0 or (match[4] in ("\\mod", "mod") and match[2] != "\\equiv"):
        return None
    return match[1] or "", int(match[3]), int(match[5])


def _same_residues(prediction: str, gold: str, part: Part) -> bool | None:
    r"""Compares two residues, or a residue with a plain number; None when neither answer is a residue.

    Two residues are equal when they have the same modulus and differ by a multiple of it: `3 \pmod 7` equals
    `10 \pmod 7`.
    """
    first, second = _residue(prediction), _residue(gold)
    if first and second:
        same_name = first[0] == second[0] or not (first[0] and second[0])
        return same_name and first[2] == second[2] and (first[1] - second[1]) % first[2] == 0
    if first or second:
        return part(str(first[1]) if first else prediction, str(second[1]) if second else gold)
    return None


def _split(text: str) -> tuple[list[str], list[str]]:
    """Splits one relation into (parts, signs); a list of relations stays one part."""
    if len(split(text, COMMAS)[0]) > 1:
        return [text], []
    return split(text, RELATIONS)
