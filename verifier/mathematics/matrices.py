r"""Compares matrices, vectors and determinants.

A matrix may be a LaTeX environment or `[[1,2],[3,4]]`, with a factor in front or `^T` behind. A row vector differs from
a column vector. A vector may also be written as a tuple, as `\langle 1,2 \rangle` or as `i + 2j`. A determinant, with
bars as brackets, has a value.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from verifier.mathematics.structure import as_collection

Part = Callable[[str, str], bool]

_ENVIRONMENT = re.compile(
    r"(?P<factor>[^&]*?)(?:\\cdot\s*)?(?P<open>[(\[]\s*)?\\begin\s*\{(?P<kind>(?:p|b|B|v|V|small)?matrix|array)\}(?:\s*\{[^{}]*\})?"
    r"(?P<rows>.*)\\end\s*\{(?P=kind)\}(?(open)\s*[)\]])",
    re.DOTALL,
)
r"""`2 \begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}`, also in brackets."""
_TRANSPOSED = re.compile(r"\s*\^\s*\{?\s*(?:T|\\top|\\text\{T\}|')\s*\}?$")
"""`^T` at the end."""
_ROW_END = re.compile(r"\\\\(?:\s*\[[^\]]*\])?|\\cr\b")
r"""`\\`, `\\[2pt]` or `\cr`"""
_UNIT_VECTOR = re.compile(r"\\(?:hat|vec|bar|tilde)\s*\{?\s*\\?([ijk])(?:math)?\s*\}?|\\([ij])math")
r"""`\hat{i}`, `\vec{j}`, `\imath`"""


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix of normalized texts."""

    rows: tuple[tuple[str, ...], ...]
    is_determinant: bool = False
    """True for a matrix between bars."""


def same_matrix(prediction: str, gold: str, part: Part) -> bool | None:
    """Compares two matrices entry by entry, with any brackets; None when neither answer is a matrix."""
    if not any(mark in text for text in (prediction, gold) for mark in ("\\begin", "[", "j", "k", "T")):
        return None
    first, second = as_matrix(prediction), as_matrix(gold)
    if first is None and second is None:
        return _same_unit_vectors(prediction, gold, part)
    if second is None:
        return first is not None and _same_as_other(first, gold, part)
    if first is None:
        return _same_as_other(second, prediction, part)
    if [len(row) for row in first.rows] != [len(row) for row in second.rows]:
        return False
    if first.is_determinant and second.is_determinant:
        one, two = _determinant(first), _determinant(second)
        return bool(one and two and part(one, two))
    if first.is_determinant or second.is_determinant:
        return False
    entries = [(row, other) for row, other in zip(first.rows, second.rows, strict=True)]
    return all(part(entry, other) for row, others in entries for entry, other in zip(row, others, strict=True))


def as_matrix(text: str) -> Matrix | None:
    """Reads `text` as one matrix, also inside plain brackets, transposed or with a factor in front; None otherwise."""
    if transposed := _TRANSPOSED.search(text):
        inner = as_matrix(text[: transposed.start()].strip())
        if inner is None and (vector := as_collection(text[: transposed.start()].strip())) and vector.opener == "(":
            return Matrix(tuple((item,) for item in vector.items))
        is_regular = inner is not None and len({len(row) for row in inner.rows}) == 1
        return Matrix(tuple(zip(*inner.rows, strict=True))) if inner and is_regular else None
    collection = as_collection(text)
    if collection is not None and len(collection.items) == 1 and collection.opener in ("(", "["):
        inner = as_matrix(collection.items[0])
        if inner is not None:
            return inner
    if collection is not None and collection.opener == "[":
        rows = [as_collection(item) for item in collection.items]
        nested = [row.items for row in rows if row is not None and row.opener == "["]
        return Matrix(tuple(nested)) if nested and len(nested) == len(rows) else None
    match = _ENVIRONMENT.fullmatch(text)
    if match is None or "\\begin" in match["rows"]:
        return None
    factor = _factor(match["factor"].strip())
    if factor is None:
        return None
    cut = [row.split("&") for row in _ROW_END.split(match["rows"].replace("\\hline", "")) if row.strip()]
    rows_of_text = tuple(
        tuple(f"{factor}({entry.strip()})" if factor else entry.strip() for entry in row) for row in cut
    )
    return Matrix(rows_of_text, match["kind"] in ("vmatrix", "Vmatrix"))


def _factor(text: str) -> str | None:
    """The text in front of a matrix as a factor of every entry; empty without one, None when it is not one factor."""
    if text in ("", "(", "["):
        return "" if not text else None
    if text in ("-", "+"):
        return text
    is_open = text.count("(") != text.count(")") or text.count("{") != text.count("}")
    return None if is_open or re.search(r"[=<>,]|[-+]$", text) else f"({text})"


def _same_as_other(matrix: Matrix, other: str, part: Part) -> bool:
    """Compares a matrix with an answer that is not one: a determinant with its value, a vector with a tuple or list, a
    matrix of one entry with that entry.
    """
    if matrix.is_determinant:
        value = _determinant(matrix)
        return value is not None and part(value, other)
    is_column = all(len(row) == 1 for row in matrix.rows)
    if not is_column and len(matrix.rows) != 1:
        return False
    entries = [row[0] for row in matrix.rows] if is_column else list(matrix.rows[0])
    if len(entries) == 1:
        return part(entries[0], other)
    collection = as_collection(other)
    if collection is None:
        return part(_unit_vectors(entries), _plain_unit_vectors(other)) if re.search(r"[jk]", other) else False
    if collection.opener == "\\{" or (collection.opener, collection.closer) in (("(", "]"), ("[", ")")):
        return False
    return len(entries) == len(collection.items) and all(map(part, entries, collection.items))


def _same_unit_vectors(prediction: str, gold: str, part: Part) -> bool | None:
    r"""Compares `3i + 4j` with `\langle 3, 4 \rangle`; None for other answers."""
    first, second = as_collection(prediction), as_collection(gold)
    vector, other = (first, gold) if first is not None else (second, prediction)
    if vector is None or (first and second) or len(vector.items) not in (2, 3) or not re.search(r"[jk]", other):
        return None
    if (vector.opener, vector.closer) not in (("(", ")"), ("\\langle", "\\rangle"), ("[", "]")):
        return None
    return part(_unit_vectors(list(vector.items)), _plain_unit_vectors(other))


def _unit_vectors(entries: list[str]) -> str:
    return "+".join(f"({entry}){name}" for entry, name in zip(entries, "ijk", strict=False))


def _plain_unit_vectors(text: str) -> str:
    return _UNIT_VECTOR.sub(lambda match: match[1] or match[2], text)


def _determinant(matrix: Matrix) -> str | None:
    """The determinant as an expression, for two or three rows: `(a)(d)-(b)(c)`; None for other sizes."""
    rows = matrix.rows
    if len(rows) not in (2, 3) or any(len(row) != len(rows) for row in rows):
        return None
    if len(rows) == 2:
        (a, b), (c, d) = rows
        return f"({a})({d})-({b})({c})"
    (a, b, c), (d, e, f), (g, h, i) = rows
    positive = f"({a})({e})({i})+({b})({f})({g})+({c})({d})({h})"
    return f"{positive}-({c})({e})({g})-({b})({d})({i})-({a})({f})({h})"
