r"""Rewrites numbers in words as digits: `twenty-one`, `three quarters`, `1.2 million`.

Ordinals become numbers too: `third`, `3^{\text{rd}}`. Only a number at the beginning of an answer is rewritten, and
only an ordinal that is the whole answer: `seven apples` becomes `7 apples`, but `the third angle` stays as it is.
"""

from __future__ import annotations

import re

_UNITS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
_SMALL = {word: number for number, word in enumerate(f"{_UNITS} seventeen eighteen nineteen".split())}
_DECADES = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_TENS = {word: 10 * number for number, word in enumerate(_DECADES, 2)}
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_FIRST = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth"
_ORDINALS = {word: number for number, word in enumerate(_FIRST.split(), 1)}
_ORDINALS |= {f"{word}th": number for word, number in _SMALL.items() if number > 12}
_ORDINALS |= {f"{word[:-1]}ieth": number for word, number in _TENS.items()} | {"hundredth": 100, "thousandth": 1000}
_PARTS = {"half": 2, "halves": 2, "quarter": 4, "quarters": 4}
_PARTS |= {f"{word}{plural}": number for word, number in _ORDINALS.items() if number > 2 for plural in ("", "s")}

_WORD = re.compile(r"(?:[\s,-]*)\b([a-zA-Z]+)\b")
_BEGINS = re.compile(r"(?:(minus|negative)\s+)?([a-zA-Z]+)", re.IGNORECASE)
_SUFFIX = re.compile(r"(?:the\s+)?(\d+)\s*(?:\^\s*)?(?:\{\s*)?(?:\\text\s*\{\s*)?(?:st|nd|rd|th)[\s}]*", re.IGNORECASE)
r"""`3rd`, `3^{\text{rd}}`"""
_ZEROS = {word: len(str(scale)) - 1 for word, scale in _SCALES.items()} | {"hundred": 2}
_SCALED = re.compile(r"(\\?\$?[\d.,]*\d)\s*(?:\\text\s*\{\s*)?(" + "|".join(_ZEROS) + r")s?\b\s*\}?", re.IGNORECASE)
"""`1.2 million`"""
_COUNTED_PARTS = re.compile(r"(-?\d+)[\s-]+(?:\\text\s*\{\s*)?(" + "|".join(_PARTS) + r")\s*\}?", re.IGNORECASE)
"""`3 eighths`"""
NUMBER_WORDS = frozenset((*_SMALL, *_TENS, *_SCALES, *_PARTS, "hundred")) - {"quarter", "quarters"}
"""Words that change the value of the number before them, as in `3 thousand`, and therefore are not units. `quarter` is
not one of them, because it may be a coin."""


def spell_numbers(text: str) -> str:
    """Rewrites the number at the beginning of `text`, or the ordinal that `text` is, in digits."""
    if not any(character.isalpha() for character in text):
        return text
    if ordinal := _SUFFIX.fullmatch(text):
        return ordinal[1]
    if (scaled := _SCALED.match(text)) is not None:
        return f"{scaled[1]} \\cdot 10^{{{_ZEROS[scaled[2].lower()]}}} {text[scaled.end() :]}".strip()
    # Not `3 quarters`, which may be three coins.
    if (parts := _COUNTED_PARTS.fullmatch(text)) is not None and parts[2].lower() in NUMBER_WORDS:
        return f"\\frac{{{parts[1]}}}{{{_PARTS[parts[2].lower()]}}}"
    begins = _BEGINS.match(text)
    if begins is None:
        return text
    sign, start = ("-", begins.start(2)) if begins[1] else ("", 0)
    if (ordinal_value := _read_ordinal(text)) is not None:
        return str(ordinal_value)
    value, end = _read_cardinal(text, start)
    if value is None:
        return text
    following = _WORD.match(text, end)
    if following and following[1].lower() in _PARTS:
        return f"{sign}\\frac{{{value}}}{{{_PARTS[following[1].lower()]}}}{text[following.end() :]}"
    return f"{sign}{value}{text[end:]}"


def _read_cardinal(text: str, start: int) -> tuple[int | None, int]:
    """Returns (number, end) of the number words at `start`; (None, start) when there are none."""
    total, group, end, last = 0, None, start, ""
    while match := _WORD.match(text, end):
        word = match[1].lower()
        if word == "and" and last in ("hundred", "thousand", "million"):
            following = _WORD.match(text, match.end())
            if following is None or following[1].lower() not in _SMALL | _TENS:
                break
        elif word in _SMALL and (group is None or last == "and" or last in _TENS or last == "hundred"):
            group = (group or 0) + _SMALL[word]
        elif word in _TENS and (group is None or last in ("and", "hundred")):
            group = (group or 0) + _TENS[word]
        elif word == "hundred" and group is not None and group < 100:
            group *= 100
        elif word == "dozen" and group is not None:
            group *= 12
        elif word in _SCALES and group is not None:
            total, group = total + group * _SCALES[word], None
        else:
            break
        if group is None and word not in _SCALES and word != "and":
            break
        end, last = match.end(), word
        if word in _SCALES and not _WORD.match(text, end):
            break
    if not last:
        return None, start
    return total + (group or 0), end


def _read_ordinal(text: str) -> int | None:
    """The value of a text that is one ordinal, such as `third` or `the twenty-first`; None for other texts."""
    words = re.split(r"[\s-]+", text.strip().lower().removeprefix("the ").strip())
    if not words or words[-1] not in _ORDINALS or len(words) > 2:
        return None
    if len(words) == 1:
        return _ORDINALS[words[0]]
    is_compound = words[0] in _TENS and _ORDINALS[words[1]] < 10
    return _TENS[words[0]] + _ORDINALS[words[1]] if is_compound else None
