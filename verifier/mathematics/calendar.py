r"""Compares times of day and dates.

`3:30 p.m.` equals `15:30`, and `March 5th, 2024` equals `2024-03-05`. A part that one side leaves out counts as equal:
`3:30` equals `3:30 p.m.`, and `March 5` equals `March 5, 2024`. Durations such as `2 h 30 min` are handled by
`units.py`.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_NAMES = "january february march april may june july august september october november december"
_MONTHS = {name[:length]: number for number, name in enumerate(_NAMES.split(), 1) for length in (3, 4, len(name))}
_DAYS = "monday tuesday wednesday thursday friday saturday sunday"

_WRAPPING = re.compile(r"\\text\s*\{([^{}]*)\}|[{}]")
_TIME = re.compile(r"(?:at\s+)?(\d{1,2})(?:\s*:\s*(\d{2}))?(?:\s*:\s*(\d{2}))?\s*(?:([ap])\.?\s*m\.?)?", re.IGNORECASE)
_NAMED_TIMES = {"noon": 12 * 3600, "midnight": 0}
_WEEKDAY = re.compile(rf"(?:({'|'.join(_DAYS.split())})[,\s]+)?(.*)", re.IGNORECASE)
_SUFFIX = r"(?:st|nd|rd|th)?"
_MONTH_FIRST = re.compile(rf"([a-z]{{3,9}})\.?\s*(\d{{1,2}}){_SUFFIX}(?:[,\s]+(\d{{4}}))?", re.IGNORECASE)
_DAY_FIRST = re.compile(
    rf"(?:the\s+)?(\d{{1,2}}){_SUFFIX}\s*(?:of\s+)?([a-z]{{3,9}})\.?(?:[,\s]+(\d{{4}}))?", re.IGNORECASE
)
_MONTH_YEAR = re.compile(r"([a-z]{3,9})\.?[,\s]+(\d{4})", re.IGNORECASE)
_YEAR_FIRST = re.compile(r"(\d{4})([-/.])(\d{1,2})\2(\d{1,2})")
_AMERICAN = re.compile(r"(\d{1,2})/(\d{1,2})/(\d{4})")


class Date(NamedTuple):
    """A date, possibly incomplete."""

    month: int
    day: int
    """0 without a day."""
    year: int
    """0 without a year."""
    weekday: str
    """Empty without a weekday."""


def same_calendar(prediction: str, gold: str) -> bool | None:
    """Compares two times of day or two dates; None when the answers are neither.

    A weekday, a year, or a.m. and p.m. that one side leaves out counts as equal.
    """
    if not (gold[:1].isalnum() or gold[:1] == "\\"):
        return None
    prediction, gold = (" ".join(_WRAPPING.sub(r"\1", text).split()).strip(" .") for text in (prediction, gold))
    date, gold_date = _date(prediction), _date(gold)
    if date and gold_date:
        return date[:2] == gold_date[:2] and all(not a or not b or a == b for a, b in zip(date, gold_date, strict=True))
    time, gold_time = _time(prediction), _time(gold)
    if time is None or gold_time is None:
        return None
    (seconds, is_explicit), (gold_seconds, gold_is_explicit) = time, gold_time
    if seconds == gold_seconds:
        return True
    if is_explicit and gold_is_explicit:
        return False
    if is_explicit or gold_is_explicit:
        # One side says a.m. or p.m. The other may be on the 12-hour clock if it is between 1:00 and 12:59.
        ambiguous = gold_seconds if is_explicit else seconds
        return 3600 <= ambiguous < 13 * 3600 and (seconds - gold_seconds) % (12 * 3600) == 0
    # `2:15` and `4:30` differ as times but are equal as ratios, so a later layer decides.
    return None


def _time(text: str) -> tuple[int, bool] | None:
    """Returns (seconds since midnight, whether the text says a.m. or p.m.); None when it is not a time of day."""
    if text.lower() in _NAMED_TIMES:
        return _NAMED_TIMES[text.lower()], True
    match = _TIME.fullmatch(text)
    if match is None or not (match[2] or match[4]):
        return None
    hour, minute, second = int(match[1]), int(match[2] or 0), int(match[3] or 0)
    if hour > (12 if match[4] else 24) or minute > 59 or second > 59:
        return None
    if match[4]:
        hour = hour % 12 + 12 * (match[4] in "pP")
    return hour * 3600 + minute * 60 + second, bool(match[4])


def _date(text: str) -> Date | None:
    weekday = _WEEKDAY.fullmatch(text)
    if weekday is None:
        return None
    day_name, rest = (weekday[1] or "").lower(), weekday[2]
    if match := _YEAR_FIRST.fullmatch(rest):
        return _checked(int(match[3]), int(match[4]), int(match[1]), day_name)
    if match := _AMERICAN.fullmatch(rest):
        return _checked(int(match[1]), int(match[2]), int(match[3]), day_name)
    if match := _MONTH_FIRST.fullmatch(rest):
        return _checked(_MONTHS.get(match[1].lower(), 0), int(match[2]), int(match[3] or 0), day_name)
    if match := _DAY_FIRST.fullmatch(rest):
        return _checked(_MONTHS.get(match[2].lower(), 0), int(match[1]), int(match[3] or 0), day_name)
    if match := _MONTH_YEAR.fullmatch(rest):
        month = _MONTHS.get(match[1].lower(), 0)
        return Date(month, 0, int(match[2]), day_name) if month else None
    return None


def _checked(month: int, day: int, year: int, weekday: str) -> Date | None:
    return Date(month, day, year, weekday) if 1 <= month <= 12 and 1 <= day <= 31 else None
