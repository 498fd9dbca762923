"""Reads an answer to a knights-and-knaves puzzle: which person is said to be a knight, and which a knave.

An answer is a list of plain statements such as `Zoey is a knight`, numbered or not. When one sentence says anything
else ("not", "or", "if"), the whole answer is unreadable. Time is linear in the length of the text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

MAX_CHARACTERS = 2000
MAX_PEOPLE = 20

_SEPARATORS = re.compile(r"[\n,;.]+|\band\b")
_NUMBER = re.compile(r"\(?\d{1,2}\)?[.:)]?\s+")
_BARE_NUMBER = re.compile(r"\(?\d{1,2}\)?")
_STATEMENT = re.compile(r"(\S+(?: \S+){0,3}) is an? (knight|knave)", re.IGNORECASE)


def read_gold(gold: str) -> dict[str, bool]:
    """Returns whether each person is a knight, by name.

    Raises:
        ValueError: when `gold` is not a JSON object {"names": [...], "is_knight": [...]} with lists of equal length.
    """
    try:
        problem = json.loads(gold)
        names, is_knight = problem["names"], problem["is_knight"]
        if 0 < len(names) <= MAX_PEOPLE and all(isinstance(value, bool) for value in is_knight):
            return dict(zip([str(name) for name in names], is_knight, strict=True))
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(
        f"knights_knaves: the gold is {gold[:80]!r}; it must be a JSON object"
        ' {"names": ["Zoey", ...], "is_knight": [true, ...]}'
    )


def parse_answer(answer: str, names: Sequence[str]) -> dict[str, bool] | None:
    """Returns whether each person is said to be a knight, by name.

    None unless the answer has exactly one statement about each person in `names`, and nothing else.
    """
    if len(answer) > MAX_CHARACTERS:
        return None
    known, said = {name.lower(): name for name in names}, dict[str, bool]()
    for part in _SEPARATORS.split(answer):
        statement = _NUMBER.sub("", " ".join(part.split()), count=1).strip("* ")
        if not statement or _BARE_NUMBER.fullmatch(statement):
            continue
        match = _STATEMENT.fullmatch(statement)
        name = known.get(match[1].lower()) if match else None
        if match is None or name is None or name in said:
            return None
        said[name] = match[2].lower() == "knight"
    return said if len(said) == len(known) else None
