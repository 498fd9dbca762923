r"""Units: takes the unit off a value, so that `80\text{ cents}` and `80` agree while `5 cm` and `5 m` do not.

A unit counts only where both sides name one. Percent and degree signs, currency, and the base of a numeral (`1011_2`)
are units here: a percent is never a hundredth, so neither a hundred times nor a hundredth of the gold passes.
"""

from __future__ import annotations

import re

_ALIASES = {
    "": "unit units square_units sq_units sq._units cubic_units",
    "%": "% percent percents pct",
    "degree": "degree degrees deg degrees_celsius degrees_fahrenheit",
    "dollar": "dollar dollars usd bucks",
    "cent": "cent cents",
    "euro": "euro euros",
    "mm": "mm millimeter millimeters",
    "cm": "cm centimeter centimeters centimetre centimetres",
    "m": "m meter meters metre metres",
    "km": "km kilometer kilometers kilometre kilometres",
    "in": "in inch inches",
    "ft": "ft foot feet",
    "yd": "yd yard yards",
    "mi": "mi mile miles",
    "s": "s sec secs second seconds",
    "min": "min mins minute minutes",
    "hr": "h hr hrs hour hours",
    "day": "d day days",
    "week": "week weeks",
    "month": "month months",
    "year": "yr year years",
    "mg": "mg milligram milligrams",
    "g": "g gm gram grams",
    "kg": "kg kilogram kilograms",
    "lb": "lb lbs pound pounds",
    "oz": "oz ounce ounces",
    "l": "l liter liters litre litres",
    "ml": "ml milliliter milliliters",
    "gal": "gal gallon gallons",
    "mph": "mph miles_per_hour",
    "rad": "rad radian radians",
    "a.m.": "a.m. a.m",
    "p.m.": "p.m. p.m",
}
_CANONICAL = {alias: unit for unit, aliases in _ALIASES.items() for alias in aliases.split()} | {"": ""}
_POWERS = {"square": "^2", "sq": "^2", "sq.": "^2", "cubic": "^3", "cu": "^3"}

_BARE = "|".join(sorted((a for a in _CANONICAL if a.isalpha() and len(a) > 1), key=len, reverse=True))
_CURRENCY = re.compile(r"^([-+]?)\s*(?:\\\$|\\text\{(euro|pound)\})\s*([-+]?)")
_TEXT_UNIT = re.compile(r"\\text\s*\{([^{}]*)\}\s*(?:\^\s*\{?\s*([23])\s*\}?)?$")
_BARE_UNIT = re.compile(
    rf"(?<=[\d}}) ])\s*((?:square |cubic |sq\.? )?(?:{_BARE}|[ap]\.m\.?))(?:\^\s*\{{?\s*([23])\s*\}}?)?$"
)
_WORDS = re.compile(r"(?<=[\d}) ]) ([a-zA-Z]{4,}(?: [a-zA-Z]+)*)$")
_SIGN_UNIT = re.compile(r"\\(degree|%)\s*[CF]?$")
_BASE = re.compile(r"^(-?\s*[0-9A-F]+(?:\.[0-9A-F]+)?)_\s*(?:\{\s*(\d{1,2})\s*\}|(\d))$")
_ANGLE_FUNCTION = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)")


def split_unit(text: str) -> tuple[str, str]:
    """(value, unit) of a normalized answer; the unit is canonical, or empty where there is none."""
    if base := _BASE.match(text):
        return base[1], f"base {base[2] or base[3]}"
    unit = ""
    if currency := _CURRENCY.match(text):
        unit = currency[2] or "dollar"
        text = currency[1] + currency[3] + text[currency.end() :]
    value, trailing = _split_trailing(text)
    return value.strip(), unit or trailing


def units_agree(first: str, second: str) -> bool:
    """Whether two canonical units may belong to the same answer; an unknown one (`apples`) never contradicts."""
    return first == second or not (_is_known(first) and _is_known(second))


def _split_trailing(text: str) -> tuple[str, str]:
    unit, rest = "", text
    for pattern in (_SIGN_UNIT, _TEXT_UNIT, _BARE_UNIT, _WORDS):
        match = pattern.search(text)
        if match is None or not re.search(r"\d|\\pi", text[: match.start()]):
            continue
        if match[1] == "degree" and _ANGLE_FUNCTION.search(text):
            continue
        power = match[2] if match.re.groups > 1 else None
        rest, unit = text[: match.start()], _canonical(match[1], power)
        break
    return rest, unit


def _canonical(words: str, power: str | None) -> str:
    name = " ".join(words.lower().split()).strip(" ,")
    first, _, following = name.partition(" ")
    suffix = f"^{power}" if power else ""
    if first in _POWERS and following and following not in ("unit", "units"):
        name, suffix = following, _POWERS[first]
    name = name.replace(" ", "_").rstrip(".") if name not in _CANONICAL else name
    return _CANONICAL.get(name, name) + suffix


def _is_known(unit: str) -> bool:
    if not unit:
        return False
    name = unit.partition("^")[0]
    return name in _ALIASES or name.startswith("base ")
