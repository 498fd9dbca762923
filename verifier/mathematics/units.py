r"""Separates values from their units, and compares quantities.

The rules:

- A unit may be missing on one side: `80\text{ cents}` equals `80`.
- Units of one dimension are converted: `5 m` equals `500 cm` and differs from `5 cm`.
- Units of different dimensions differ, and so do different counted things: `6 apples` and `6 oranges`.
- A percentage equals its number and its value: `50\%` equals 50 and 0.5. But 50 never equals 0.5.
- An angle without a unit is in degrees, or in radians where either side has a `\pi`: `180^\circ` equals `180` and
  `\pi`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from verifier.mathematics.numerals import NUMBER_WORDS
from verifier.mathematics.spelling import FUNCTIONS
from verifier.mathematics.unit_table import unit_sizes

_POWERS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cu": 3, "cubed": 3}
_NO_UNIT = frozenset(("unit", "units", "total", "in total", "exactly", "approx", "approximately", "only", "ways"))
# Words behind a value that are not a counted thing: words that change the value, as in `5 squared`,
_OTHER_NUMBER = NUMBER_WORDS | FUNCTIONS | _POWERS.keys() | {"factorial"}
# words that deny the value, as in `5 incorrect`,
_DENIALS = frozenset(("plus", "minus", "not", "or", "but", "wrong", "incorrect"))
# and variables: a word of letters that follow each other in the alphabet, such as `xyz`.
_ALPHABET = "abcdefghijklmnopqrstuvwxyz"

_CURRENCY = re.compile(
    r"^([-+]?)\s*(?:\\?\$|(?:\\text\s*\{\s*)?\\(euro|pounds|yen|rupees)\s*\}?"
    r"|(US\\?\$|USD|EUR|Rs\.?(?![a-z])|\\text\s*\{\s*Rs\.?\s*\}))\s*([-+]?)"
)
r"""A currency in front of a number: `\$5`, `\euro 5`, `USD 5`."""
_UPRIGHT = re.compile(r"\\text\s*\{([^{}]*)\}")
_WORD = r"(?:(?:\\mu\s*)?[a-zA-ZμΩ¢]+|\\Omega)\.?(?:\s*\^\s*(?:\{\s*-?\d\s*\}|-?\d))?"
_FACTOR = rf"(?:(?:\\mu\s*)?\\text\s*\{{[^{{}}]*\}}(?:\s*\^\s*(?:\{{\s*-?\d\s*\}}|-?\d))?|{_WORD})"
_TRAILING = re.compile(
    rf"(?<=[\d)}}\]!'a-z])(?P<gap>\s+|(?<![a-zA-Z])|(?=\\))(?P<unit>{_FACTOR}(?:\s*(?:/|\\cdot|\s)\s*{_FACTOR})*|\\%|\\degree(?:\s*{_FACTOR})?)$"
)
r"""A unit at the end of a value: `5 cm`, `3\text{ m/s}`, `50\%`, `30\degree C`."""
_UNIT_TOKEN = re.compile(r"([a-zA-ZμΩ¢]+\.?|\\Omega)(?:\s*\^\s*\{?\s*(-?\d)\s*\}?)?|/")
_ANGLE_FUNCTION = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc|cis)")
_RADIANS = re.compile(r"\\pi|\\arc|\\(?:sin|cos|tan|cot|sec|csc)\s*\^\s*\{?\s*-")
r"""Signs that an angle is in radians: `\pi`, `\arctan`, `\sin^{-1}`."""
_COMPOUND = re.compile(r"(?:,\s*)?([\d./]+)\s*(\\text\s*\{[^{}]*\}|[a-zA-Z]+)")
"""One part of `2 h 30 min`."""


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit of measurement, or a counted thing."""

    dimensions: tuple[tuple[str, int], ...] = ()
    """(dimension, exponent) pairs, sorted: (("length", 1), ("time", -1)) for m/s."""
    size: Fraction = Fraction(1)
    """Factor to the base units of the dimensions."""
    noun: frozenset[str] = frozenset()
    """The words of a counted thing, in lower case and singular; empty for a unit of measurement."""

    def is_only(self, dimension: str) -> bool:
        """Whether this is a unit of that dimension alone, with exponent 1."""
        return self.dimensions == ((dimension, 1),)


NO_UNIT = Unit()
Same = Callable[[str, str], bool]


def same_quantity(first: tuple[str, Unit], second: tuple[str, Unit], same: Same) -> bool:
    """Whether two (value, unit) pairs are equal; `same` compares two values without units."""
    (value, unit), (other, other_unit) = first, second
    if unit == other_unit:
        return same(value, other)
    if not _are_compatible(unit, other_unit):
        return _same_angle(first, second, same)
    if unit.dimensions and unit.dimensions == other_unit.dimensions:
        return same(_scaled(value, unit.size), _scaled(other, other_unit.size))
    if same(value, other):
        return True
    if unit.is_only("percent"):
        return same(_scaled(value, Fraction(1, 100)), other)
    if other_unit.is_only("percent"):
        return same(value, _scaled(other, Fraction(1, 100)))
    return bool(_RADIANS.search(value) or _RADIANS.search(other)) and _same_angle(first, second, same)


def split_unit(text: str) -> tuple[str, Unit]:
    """Splits a normalized answer into (value, unit); the unit is `NO_UNIT` when there is none."""
    if compound := _compound(text):
        return compound
    if text.endswith("\\$"):
        text = f"\\${text[:-2]}"
    if currency := _CURRENCY.match(text):
        name = currency[2] or {"E": "euro", "R": "rupees", "\\": "rupees"}.get((currency[3] or "")[:1], "dollar")
        rest = currency[1] + currency[4] + text[currency.end() :]
        money = Unit(((name, 1),))
        value, unit = _split_trailing(rest)
        return (value, money) if unit in (NO_UNIT, money) else (rest, money)
    return _split_trailing(text)


def is_bare(text: str, unit: Unit) -> bool:
    r"""Whether the unit may be variables instead: `5 cm` may be 5 times c times m, `5\text{ cm}` is a length."""
    return unit != NO_UNIT and "\\text" not in text and "\\degree" not in text and "\\%" not in text


def _split_trailing(text: str) -> tuple[str, Unit]:
    match = _first_trailing(text)
    if match is None:
        return text, NO_UNIT
    value, words = text[: match.start()].strip(), match["unit"]
    if words.startswith(("\\%", "\\degree")):
        if words.startswith("\\degree") and _ANGLE_FUNCTION.search(value):
            return text, NO_UNIT
        scale = _UPRIGHT.sub(r"\1", words.removeprefix("\\degree")).strip(" .").upper()[:1]
        name = "percent" if words == "\\%" else {"C": "celsius", "F": "fahrenheit"}.get(scale, "angle")
        return value, Unit(((name, 1),))
    unit = _parse_unit(_UPRIGHT.sub(r" \1 ", words))
    is_upright = "\\text" in words or " " in words.strip() or len(match["gap"]) > 0
    if unit is not None and (is_upright or len(words) > 1 or words == "¢"):
        return value, unit
    noun = _noun(words, match["gap"])
    return (text, NO_UNIT) if noun is None else (value, noun)


def _first_trailing(text: str) -> re.Match[str] | None:
    """The match of the longest ending of `text` that can be a unit and has a value in front of it."""
    if not re.search(r"[a-zA-Z%}¢]\s*\.?$|degree\s*$|\^\s*\{?-?\d\}?$|\\Omega", text):
        return None
    for match in _TRAILING.finditer(text):
        value = text[: match.start()]
        if value[-1:].isalpha() and not re.search(r"\\[a-z]+$", value):
            continue
        if (
            re.search(r"\d|\\pi", value)
            and value.count("{") == value.count("}")
            and value.count("(") == value.count(")")
        ):
            return match
    return None


def _parse_unit(words: str) -> Unit | None:
    dimensions: dict[str, int] = {}
    size, sign, power = Fraction(1), 1, 0
    words = re.sub(r"\\mu\s*", "μ", words)
    text = re.sub(r"\bmph\b", "mile/hour", re.sub(r"\bkm?ph\b", "km/hour", words))
    text = re.sub(r"\bper\b", "/", text.replace("\\cdot", " ").replace("~", " "))
    last: tuple[str, Fraction, int] | None = None
    position = 0
    for match in _UNIT_TOKEN.finditer(text):
        if text[position : match.start()].strip(" .-"):
            return None
        position = match.end()
        if match[0] == "/":
            sign = -1
            continue
        word = match[1].rstrip(".")
        if word in _POWERS:
            if word.endswith("d") and last:
                extra = last[2] * (_POWERS[word] - 1)
                dimensions[last[0]] += extra
                size *= last[1] ** extra
            power = 0 if word.endswith("d") else _POWERS[word]
            continue
        known = unit_sizes().get(word) or unit_sizes().get(word.lower())
        if known is None:
            return NO_UNIT if text.strip().lower() in _NO_UNIT or word in ("unit", "units") else None
        exponent = sign * int(match[2] or power or 1)
        dimensions[known[0]] = dimensions.get(known[0], 0) + exponent
        size *= known[1] ** exponent
        last, sign, power = (known[0], known[1], exponent), 1, 0
    if text[position:].strip(" .") or not dimensions:
        return None
    # A liter is a cubic decimeter, so volumes in liters and in cubic lengths can be compared.
    if liters := dimensions.pop("volume", 0):
        dimensions["length"] = dimensions.get("length", 0) + 3 * liters
        size /= 1000**liters
    return Unit(tuple(sorted((name, exponent) for name, exponent in dimensions.items() if exponent)), size)


def _noun(words: str, gap: str) -> Unit | None:
    r"""The counted thing in words such as `\text{apples}` or ` apples`; None when the words may be variables."""
    plain = _UPRIGHT.sub(r" \1 ", words)
    names = re.findall(r"[a-zA-Z]+", plain)
    if "\\text" not in words and (not gap or any(len(name) < 3 for name in names) or re.search(r"[\^/]|\\cdot", words)):
        return None
    if not names:
        return None
    if " ".join(names).lower() in _NO_UNIT or {"unit", "units"} & set(names):
        return NO_UNIT
    if names[-1].lower() in _OTHER_NUMBER or any(name.lower() in _DENIALS or name in _ALPHABET for name in names):
        return None
    return Unit(noun=frozenset(name.lower().rstrip("s") for name in names))


def _compound(text: str) -> tuple[str, Unit] | None:
    """`2 hours 30 minutes` as one quantity in the smallest unit: ("150", minutes); None for other texts."""
    if not text[:1].isdigit():
        return None
    parts, position = [], 0
    for match in _COMPOUND.finditer(text):
        if text[position : match.start()].strip() or match[1].count("/") + match[1].count(".") > 1:
            return None
        unit = _parse_unit(_UPRIGHT.sub(r"\1", match[2]))
        if unit is None or not re.fullmatch(r"\d+(?:[./]\d+)?", match[1]) or match[1].endswith("/0"):
            return None
        parts.append((Fraction(match[1]), unit))
        position = match.end()
    if len(parts) < 2 or text[position:].strip() or len({unit.dimensions for _, unit in parts}) > 1:
        return None
    smallest = min((unit for _, unit in parts), key=lambda unit: unit.size)
    return str(sum(value * unit.size for value, unit in parts) / smallest.size), smallest


def _are_compatible(first: Unit, second: Unit) -> bool:
    """Whether quantities with these units can be equal: 5 cm can equal 50 mm or 5, but not 5 kg.

    False for degrees and radians, which `_same_angle` compares.
    """
    if NO_UNIT in (first, second):
        return True
    if first.noun and second.noun:
        return first.noun <= second.noun or second.noun <= first.noun
    names = {dict(unit.dimensions).keys() <= {"angle", "celsius", "fahrenheit"} for unit in (first, second)}
    if names == {True} and not (first.noun or second.noun):
        return first == second or first.is_only("angle") or second.is_only("angle")
    return first.dimensions == second.dimensions and not (first.noun or second.noun)


def _same_angle(first: tuple[str, Unit], second: tuple[str, Unit], same: Same) -> bool:
    """Whether an angle in degrees equals one in radians."""
    (value, unit), (other, other_unit) = first, second
    if unit.is_only("angle") and (other_unit == NO_UNIT or other_unit.is_only("radian")):
        return same(f"({value})\\cdot \\pi /180", other)
    if other_unit.is_only("angle") and (unit == NO_UNIT or unit.is_only("radian")):
        return same(value, f"({other})\\cdot \\pi /180")
    radian = unit.is_only("radian") or other_unit.is_only("radian")
    return radian and NO_UNIT in (unit, other_unit) and same(value, other)


def _scaled(value: str, factor: Fraction) -> str:
    return value if factor == 1 else f"({value})\\cdot ({factor})"
