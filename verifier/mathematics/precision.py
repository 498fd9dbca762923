r"""Compares literal numbers: numerals with a base, and decimals to the precision that the gold states.

Numerals: `1011_2` equals `11`, and the base may be left out on one side: it equals `1011` too.

Decimals:

- A decimal gold with at least two significant digits states a precision. An answer with more decimal places is right
  when it rounds to the gold: `2.0833` for the gold `2.08`.
- A gold that is a whole number, a half or a quarter (27.0, 2.5, 0.75) states no precision: `2.46` is wrong for `2.5`.
- A gold that says it is rounded (`\approx 3.14`, `3.14 (to 2 d.p.)`) accepts every number that rounds to it: `\pi`.
- An answer with fewer places than the gold is wrong: `2.1` for the gold `2.08`.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any, NamedTuple

from verifier.mathematics.expression import value_of

MAX_DIGITS = 300

_BASES = {
    name: base for base, name in enumerate(["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"], 2)
}
_BASES |= {"sixteen": 16, "hex": 16, "binary": 2, "octal": 8, "decimal": 10}
_NUMERAL = re.compile(
    r"(-?)\s*\(?\s*(?:\\text\s*\{\s*)?([0-9a-fA-F]+(?:\.[0-9a-fA-F]+)?)[})\s]*"
    r"(?:_\s*(?:\{\s*(?:\\text\s*\{)?\s*\(?\s*(\w+)[\s})]*\}|(\d+))|\(?\s*(?:\\text\s*\{\s*)?\(?base[\s-]*(\w+)[\s)}]*)"
)
r"""`1011_2`, `\text{FF}_{16}`, `12 (base 5)`"""
_PROGRAMMING = re.compile(r"(-?)0([xXbB])([0-9a-fA-F]+)")
"""`0xFF`, `0b1011`"""
_DECIMAL = re.compile(
    r"([-+]?)\s*(\d*)\.(\d+)(?:\s*(?:\\cdot\s*10\s*\^\s*(?:\{\s*([-+]?\d{1,4})\s*\}|(\d))|[eE]([-+]?\d{1,4})))?"
)
r"""`-3.14`, `6.02 \cdot 10^{23}`, `6.02e23`"""
_ROUNDED = re.compile(
    r"(?:\\approx|\\text\s*\{\s*(?:about|approximately|approx\.?)\s*\}|\b(?:about|approximately|approx\.?))\s*(.+)"
    r"|(.+?)\s*\(?\s*(?:\\text\s*\{)?\s*\(?(?:(?:correct|rounded)\s+)?to\s+(?:the\s+nearest\s+\w+|\w+\s+(?:d\.?p\.?|decimal|s\.?f\.?|significant)).*"
)
r"""`\approx 3.14`, `about 3.14`, `3.14 (to 2 d.p.)`, `3.1 to the nearest tenth`"""


class Numeral(NamedTuple):
    """A number that names its base."""

    value: Fraction
    digits: str
    """The digits with their sign, in capitals, without leading zeros."""
    base: int


def same_numeral(prediction: str, gold: str) -> bool | None:
    """Compares two numerals of which at least one names its base; None for other answers."""
    if not (
        "_" in prediction + gold
        or "base" in prediction + gold
        or "0x" in prediction + gold
        or "0b" in prediction + gold
    ):
        return None
    first, second = _numeral(prediction), _numeral(gold)
    if first is None and second is None:
        return None
    if first is not None and second is not None:
        # `1_3` differs from `1_7`, although both are 1: the question asked for one of the bases.
        return first.value == second.value and (first.base == second.base or first.digits != second.digits)
    numeral, other = (first, gold) if first is not None else (second, prediction)
    if numeral is None:
        return None
    bare = re.sub(r"^(-?)0+(?=.)", r"\1", other.replace(" ", "").upper())
    return bare == numeral.digits or value_of(other) == numeral.value


def same_rounded(prediction: str, gold: str) -> bool | None:
    """Whether the prediction rounds to the gold; None where rounding does not decide: the gold states no precision."""
    if "." not in gold and "approx" not in gold and "about" not in gold and " to " not in gold:
        return None
    gold_is_rounded = _ROUNDED.fullmatch(gold)
    prediction_is_rounded = _ROUNDED.fullmatch(prediction)
    literal = _decimal(_rounded_value(gold_is_rounded) if gold_is_rounded else gold)
    answer = _rounded_value(prediction_is_rounded) if prediction_is_rounded else prediction
    if literal is None:
        return None
    value, half_step, places, num_significant = literal
    other = _decimal(answer)
    if other is not None and other[2] > places and (num_significant > 1 or gold_is_rounded):
        return _rounds_to(other[0], value, half_step) or None
    if gold_is_rounded and (exact_value := value_of(answer)) is not None:
        return _rounds_to(exact_value, value, half_step)
    if (prediction_is_rounded or gold_is_rounded) and other is not None:
        return other[0] == value
    return None


def _rounded_value(rounded: re.Match[str]) -> str:
    """The number in a match of `_ROUNDED`: `3.14` for `3.14 (to 2 d.p.)`."""
    return (rounded[1] or rounded[2]).strip().rstrip("(,{").strip()


def _rounds_to(value: Any, rounded: Fraction, half_step: Fraction) -> bool:
    """Whether `value`, a Fraction or a real number, rounds to `rounded`, halves away from zero."""
    low, high = rounded - half_step, rounded + half_step
    if not isinstance(value, Fraction):
        low, high = (value.context.mpf(bound.numerator) / bound.denominator for bound in (low, high))
    return bool(low <= value < high) if rounded >= 0 else bool(low < value <= high)


def _decimal(text: str) -> tuple[Fraction, Fraction, int, int] | None:
    r"""Reads a decimal literal, possibly with an exponent: `3.14`, `6.02 \cdot 10^{23}`; None for other texts.

    Returns:
        (value, half a unit of its last place, number of decimal places less the exponent, number of significant digits
        or 0 when it states no precision).
    """
    match = _DECIMAL.fullmatch(text.strip())
    if match is None or len(text) > MAX_DIGITS:
        return None
    exponent = int(match[4] or match[5] or match[6] or 0)
    scale = Fraction(10) ** (exponent - len(match[3]))
    digits = match[2] + match[3]
    value = int(digits) * scale
    # A whole number, half or quarter is usually exact, not rounded.
    num_significant = len(digits.lstrip("0")) if exponent or value.denominator > 4 else 0
    return (-value if match[1] == "-" else value), scale / 2, len(match[3]) - exponent, num_significant


def _numeral(text: str) -> Numeral | None:
    """Reads a numeral that names its base, such as `1011_2`, `0xFF` or `12 (base 5)`; None for other texts."""
    if match := _PROGRAMMING.fullmatch(text):
        sign, digits, base = match[1], match[3], 16 if match[2] in "xX" else 2
    elif match := _NUMERAL.fullmatch(text):
        name = (match[3] or match[4] or match[5]).lower()
        sign, digits = match[1], match[2]
        base = int(name) if name.isdecimal() and len(name) < 3 else _BASES.get(name, 0)
    else:
        return None
    whole, _, fraction = digits.upper().partition(".")
    # One lower-case letter, as in `a_{16}`, is a term of a sequence.
    is_symbol = len(digits) == 1 and digits.islower()
    if not 2 <= base <= 36 or is_symbol or len(digits) > MAX_DIGITS:
        return None
    if any(int(digit, 36) >= base for digit in whole + fraction):
        return None
    value = Fraction(int(whole + fraction, base), base ** len(fraction))
    return Numeral(-value if sign else value, sign + (digits.upper().lstrip("0") or "0"), base)
