r"""The last layer: sums, products, limits and integrals, through latex2sympy2_extended and sympy.

Text reaches the LaTeX parser only if every token is on the whitelist below and every bound holds: length, nesting,
small integers, no power inside an exponent, factorials of short arguments only. Nothing is evaluated that those bounds
do not keep small, and unevaluated sums and integrals stay unevaluated. The scoring pool's deadline stands behind it.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from verifier.mathematics.spelling import FUNCTIONS

MAX_CHARACTERS = 200
MAX_NESTING = 8
MAX_INTEGER_DIGITS = 3

_NAMES = "frac sqrt sum prod int lim to infty pi cdot binom alpha beta gamma theta lambda mu sigma omega phi psi"
_COMMANDS = FUNCTIONS | frozenset(_NAMES.split())
_ALLOWED = re.compile(r"\\([a-zA-Z]+)|([a-zA-Z](?![a-zA-Z]{3}))|(\d+)|[-+/^_!(){}=., |]")
_FACTORIAL = re.compile(r"(?:\d{1,2}|[a-zA-Z]|\((?:\d{0,2}[a-zA-Z])?(?:[-+]\d{1,2})?\))\s*!(?!\s*!)")
_NEEDED = re.compile(r"\\(?:sum|prod|int|lim)(?![a-zA-Z])")
_EXPONENT = re.compile(r"\^\s*(?:\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}|.)")


def is_admitted(text: str) -> bool:
    """Whether a normalized text needs the LaTeX parser, and may be given to it."""
    if not _NEEDED.search(text):
        return False
    if len(text) > MAX_CHARACTERS or not _nesting_is_bounded(text):
        return False
    position = 0
    while position < len(text):
        match = _ALLOWED.match(text, position)
        if match is None or (match[1] and match[1] not in _COMMANDS):
            return False
        if match[3] and len(match[3]) > MAX_INTEGER_DIGITS:
            return False
        position = match.end()
    exponents = [match[1] or "" for match in _EXPONENT.finditer(text)]
    if any("^" in exponent or "!" in exponent for exponent in exponents):
        return False
    return text.count("!") == len(_FACTORIAL.findall(text))


def same_symbolic(prediction: str, gold: str) -> bool | None:
    """Whether sympy proves two admitted texts equal; None when one is not admitted or is not an expression."""
    if not (is_admitted(prediction) and is_admitted(gold)):
        return None
    sympy, latex2sympy = _load()
    # The parser and sympy raise whatever they like on text they do not understand; not understood is not equal.
    try:
        first, second = latex2sympy(prediction), latex2sympy(gold)
        if not (isinstance(first, sympy.Expr) and isinstance(second, sympy.Expr)):
            return None
        if any(value.has(sympy.zoo, sympy.nan) for value in (first, second)):
            return None
        if first == second or first.dummy_eq(second):
            return True
        return bool(sympy.simplify(first - second, doit=False) == 0)
    except Exception:
        return None


def prepare() -> None:
    """Loads sympy and the LaTeX parser (half a second), so that no deadline has to pay for it."""
    _load()


@cache
def _load() -> tuple[Any, Any]:
    import sympy
    from latex2sympy2_extended import latex2sympy

    return sympy, lambda text: latex2sympy(text, normalization_config=None)


def _nesting_is_bounded(text: str) -> bool:
    depth = 0
    for character in text:
        depth += (character in "({") - (character in ")}")
        if not 0 <= depth <= MAX_NESTING:
            return False
    return depth == 0
