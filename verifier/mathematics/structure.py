r"""Splits a normalized answer at its outermost level, without parsing its expressions.

It splits lists, tuples, sets, intervals, unions and relations. Brackets are counted and not matched by kind, so that
`[0,1)` is one item. All functions are linear in the length of the text and never raise.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|.", re.DOTALL)
_OPENERS = frozenset(("(", "[", "{", "\\{", "\\langle", "\\lfloor", "\\lceil", "\\begin"))
_CLOSERS = frozenset((")", "]", "}", "\\}", "\\rangle", "\\rfloor", "\\rceil", "\\end"))
_COLLECTION_OPENERS = frozenset(("(", "[", "\\{", "\\langle"))
_COLLECTION_CLOSERS = frozenset((")", "]", "\\}", "\\rangle"))
_SET_BUILDER = re.compile(r"\s*\\?[a-zA-Z]+\s*(?:\\in\s*\\mathbb\{R\}\s*)?(?:\||\\mid(?![a-zA-Z])|:)(.+)$", re.DOTALL)
r"""`x \in \mathbb{R} \mid x > 0`, `x : x > 0`"""

COMMAS = frozenset((",", ";"))
UNIONS = frozenset(("\\cup",))
RELATIONS = frozenset(("=", "<", ">", "\\le", "\\ge", "\\ne", "\\in", "\\approx", "\\equiv", "\\sim"))


@dataclass(frozen=True, slots=True)
class Collection:
    """The items between one pair of outermost brackets."""

    opener: str
    closer: str
    items: tuple[str, ...]


def split(text: str, separators: frozenset[str]) -> tuple[list[str], list[str]]:
    """Splits `text` at separators outside all brackets; returns (the stripped parts, the separators), both in order."""
    parts, found, start = [], [], 0
    for token, position, depth in _tokens_with_depth(text):
        if depth == 0 and token in separators:
            parts.append(text[start:position].strip())
            found.append(token)
            start = position + len(token)
    return [*parts, text[start:].strip()], found


def as_collection(text: str) -> Collection | None:
    """`text` as one collection in brackets; None unless its first bracket closes at its end."""
    tokens = list(_tokens_with_depth(text))
    if len(tokens) < 2 or tokens[0][0] not in _COLLECTION_OPENERS or tokens[-1][0] not in _COLLECTION_CLOSERS:
        return None
    if any(depth == 0 for _, _, depth in tokens[1:-1]) or tokens[-1][2] != 0:
        return None
    opener, closer = tokens[0][0], tokens[-1][0]
    inside = text[len(opener) : -len(closer)].strip()
    items = split(inside, COMMAS)[0] if inside else []
    return Collection(opener, closer, tuple(items))


def set_condition(collection: Collection) -> str | None:
    r"""The condition of a set in the form `\{x | condition\}`; None for other collections."""
    if collection.opener != "\\{" or len(collection.items) != 1:
        return None
    match = _SET_BUILDER.match(collection.items[0])
    return match[1].strip() if match else None


def _tokens_with_depth(text: str) -> Iterator[tuple[str, int, int]]:
    """Yields (token, position, nesting depth); a bracket has the depth outside it."""
    depth = 0
    for match in _TOKEN.finditer(text):
        token = match[0]
        if token in _CLOSERS:
            depth -= 1
        yield token, match.start(), depth
        if token in _OPENERS:
            depth += 1
