r"""Rules that rewrite a gold into an equal text, and rules that change it into a similar but different answer.

A rule takes a gold and a random generator and returns the new text, or None where it does not apply. Rules work on the
text alone. They skip golds for which the label of the result could be wrong: prose, constants of integration, zeros.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from fractions import Fraction

Rule = Callable[[str, random.Random], str | None]

_INTEGER = re.compile(r"-?[1-9]\d{0,14}")
_FRACTION = re.compile(r"(-?)\\[dt]?frac\{([1-9]\d*)\}\{([1-9]\d*)\}")
_DECIMAL = re.compile(r"-?\d{1,9}\.\d{1,9}")
_WORD = re.compile(r"\\(?:text|mbox|mathrm|mathbf|textbf)|(?<![\\a-zA-Z])[a-zA-Z]{3,}")
_LETTERS = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}")
_EXPRESSION = re.compile(r"(?:[a-z0-9+\-^{}() ]|\\d?frac|\\sqrt|\\pi|\\cdot)+")
_BRACKETS = re.compile(r"(\\left)?([(\[])([^()\[\],]+),([^()\[\],]+?)(\\right)?([)\]])")
_CONSTANT = re.compile(r"[Cc](?![a-zA-Z])|\\pm|\\mp|_|@|\bmod\b|e\^|\\ldots|\\dots")
_UNICODE = {
    "\\pi": "π",
    "\\infty": "∞",
    "\\cup": "∪",
    "\\leq": "≤",
    "\\geq": "≥",
    "\\times": "×",
    "^2": "²",
    "^{2}": "²",
    "^3": "³",
    "^{3}": "³",
    "^\\circ": "°",
    "^{\\circ}": "°",
}


def _integer(gold: str) -> int | None:
    return int(gold) if _INTEGER.fullmatch(gold) else None


def _fraction(gold: str) -> tuple[str, int, int] | None:
    match = _FRACTION.fullmatch(gold)
    return (match[1], int(match[2]), int(match[3])) if match else None


def _is_expression(gold: str) -> bool:
    has_digit_or_letter = re.search(r"[a-z\d]", gold) is not None
    return has_digit_or_letter and _EXPRESSION.fullmatch(gold) is not None and not _LETTERS.search(gold)


# --- equal rewritings ---


def _spelling(gold: str, rng: random.Random) -> str:
    there, back = ("\\dfrac", "\\frac") if "\\dfrac" in gold else ("\\frac", "\\dfrac")
    text = gold.replace(there, back)
    if "\\left." in text or "\\right." in text or "\\left|" in text:
        return text
    return re.sub(r"\\left(?![a-z])|\\right(?![a-z])|\\!", "", text)


def _spaces(gold: str, rng: random.Random) -> str | None:
    return None if _WORD.search(gold) else re.sub(r"(?<=[\w})])([+=])(?=[\w\\({])", r"\\, \1 \\;", gold)


def _unicode(gold: str, rng: random.Random) -> str | None:
    if _WORD.search(gold):
        return None
    text = gold
    for command, character in _UNICODE.items():
        text = re.sub(re.escape(command) + (r"(?![a-zA-Z\d])" if command[-1].isalnum() else ""), character, text)
    return text.replace("-", "−")


def _dollars(gold: str, rng: random.Random) -> str | None:
    return None if "$" in gold else f"${gold}$."


def _grouped(gold: str, rng: random.Random) -> str | None:
    return f"\\left({gold}\\right)" if _is_expression(gold) else None


def _halved(gold: str, rng: random.Random) -> str | None:
    return f"\\frac{{2({gold})}}{{2}}" if _is_expression(gold) else None


def _added(gold: str, rng: random.Random) -> str | None:
    return f"{gold}+3-3" if _is_expression(gold) else None


def _point_zero(gold: str, rng: random.Random) -> str | None:
    return f"{gold}.0" if _integer(gold) is not None else None


def _thousands(gold: str, rng: random.Random) -> str | None:
    number = _integer(gold)
    return f"{number:,}".replace(",", rng.choice([",", "{,}", ",\\!"])) if number is not None else None


def _quotient(gold: str, rng: random.Random) -> str | None:
    number = _integer(gold)
    factor = rng.randint(2, 9)
    return f"\\frac{{{factor * number}}}{{{factor}}}" if number is not None else None


def _assigned(gold: str, rng: random.Random) -> str | None:
    return f"n = {gold}" if _integer(gold) is not None or _fraction(gold) else None


def _expanded(gold: str, rng: random.Random) -> str | None:
    parts = _fraction(gold)
    factor = rng.randint(2, 9)
    return f"{parts[0]}\\frac{{{factor * parts[1]}}}{{{factor * parts[2]}}}" if parts else None


def _slash(gold: str, rng: random.Random) -> str | None:
    parts = _fraction(gold)
    return f"{parts[0]}{parts[1]}/{parts[2]}" if parts else None


def _mixed(gold: str, rng: random.Random) -> str | None:
    parts = _fraction(gold)
    if parts is None or parts[1] <= parts[2] or parts[1] % parts[2] == 0:
        return None
    return f"{parts[0]}{parts[1] // parts[2]}\\frac{{{parts[1] % parts[2]}}}{{{parts[2]}}}"


def _decimal(gold: str, rng: random.Random) -> str | None:
    parts = _fraction(gold)
    if parts is None or 10**6 % parts[2]:
        return None
    return f"{parts[0]}{parts[1] / parts[2]:.6f}".rstrip("0").rstrip(".")


def _as_fraction(gold: str, rng: random.Random) -> str | None:
    if not _DECIMAL.fullmatch(gold):
        return None
    value = Fraction(gold)
    return f"\\frac{{{value.numerator}}}{{{value.denominator}}}"


def _zeros(gold: str, rng: random.Random) -> str | None:
    return f"{gold}00" if _DECIMAL.fullmatch(gold) else None


# --- changes ---


def _can_change(gold: str) -> bool:
    return not _WORD.search(gold) and not _CONSTANT.search(gold) and gold.count("=") < 2


def _digit(gold: str, rng: random.Random) -> str | None:
    digits = [match.start() for match in re.finditer(r"\d", gold)]
    if not digits or not _can_change(gold):
        return None
    at = rng.choice(digits)
    digit = rng.choice([digit for digit in "123456789" if digit != gold[at]])
    return gold[:at] + digit + gold[at + 1 :]


def _sign(gold: str, rng: random.Random) -> str | None:
    is_number = _integer(gold) is not None or _fraction(gold) or (_DECIMAL.fullmatch(gold) and float(gold))
    if not is_number:
        return None
    return gold[1:] if gold.startswith("-") else f"-{gold}"


def _operator(gold: str, rng: random.Random) -> str | None:
    places = [match.start(1) for match in re.finditer(r"(?<=[\w})])\s*([+\-])\s*(?=[a-z1-9\\])", gold)]
    if not places or not _can_change(gold):
        return None
    at = rng.choice(places)
    return gold[:at] + ("-" if gold[at] == "+" else "+") + gold[at + 1 :]


def _bracket(gold: str, rng: random.Random) -> str | None:
    match = _BRACKETS.fullmatch(gold)
    if match is None:
        return None
    sides = [side for side, item in ((2, 3), (6, 4)) if "infty" not in match[item] and "∞" not in match[item]]
    if not sides:
        return None
    at = match.start(rng.choice(sides))
    return gold[:at] + dict(zip("([)]", "[(])", strict=True))[gold[at]] + gold[at + 1 :]


def _order(gold: str, rng: random.Random) -> str | None:
    match = _BRACKETS.fullmatch(gold)
    if (
        match is None
        or not match[3].strip().isdigit()
        or not match[4].strip().isdigit()
        or int(match[3]) == int(match[4])
    ):
        return None
    return f"{match[2]}{match[4].strip()}, {match[3].strip()}{match[6]}"


def _one_more(gold: str, rng: random.Random) -> str | None:
    return f"{gold}+1" if _is_expression(gold) else None


def _upside_down(gold: str, rng: random.Random) -> str | None:
    parts = _fraction(gold)
    return f"{parts[0]}\\frac{{{parts[2]}}}{{{parts[1]}}}" if parts and parts[1] != parts[2] else None


def _hundredfold(gold: str, rng: random.Random) -> str | None:
    number = _integer(gold)
    return f"{gold}00" if number is not None else None


def _rounded(gold: str, rng: random.Random) -> str | None:
    """A fraction without a finite decimal, rounded to two places."""
    parts = _fraction(gold)
    if parts is None or 10**9 % Fraction(parts[1], parts[2]).denominator == 0:
        return None
    return f"{parts[0]}{parts[1] / parts[2]:.2f}"


REWRITINGS: dict[str, Rule] = {
    "spelling": _spelling,
    "spaces": _spaces,
    "unicode": _unicode,
    "dollars": _dollars,
    "grouped": _grouped,
    "times 2 over 2": _halved,
    "plus 3 minus 3": _added,
    "point zero": _point_zero,
    "thousands": _thousands,
    "quotient": _quotient,
    "assigned": _assigned,
    "expanded fraction": _expanded,
    "slash": _slash,
    "mixed number": _mixed,
    "exact decimal": _decimal,
    "decimal as fraction": _as_fraction,
    "more zeros": _zeros,
}
"""Rules by name. Their results are labeled correct."""
CHANGES: dict[str, Rule] = {
    "another digit": _digit,
    "another sign": _sign,
    "another operator": _operator,
    "another bracket": _bracket,
    "another order": _order,
    "one more": _one_more,
    "upside down": _upside_down,
    "a hundredfold": _hundredfold,
    "rounded": _rounded,
}
"""Rules by name. Their results are labeled wrong."""
