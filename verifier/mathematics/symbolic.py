r"""The last layer: compares sums, products, limits and integrals with latex2sympy2_extended and sympy.

Text reaches sympy's LaTeX parser only when every token is on the whitelist below and the text keeps every bound: its
length and nesting, the size of integers, no power inside an exponent, factorials only of short arguments. The bounds
keep everything that sympy evaluates small; sums and integrals stay unevaluated. If a comparison takes long all the
same, the deadline of the scoring pool ends it.
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
"""One allowed token: a command, a run of at most three letters, an integer, or a sign."""
_FACTORIAL = re.compile(r"(?:\d{1,2}|[a-zA-Z]|\((?:\d{0,2}[a-zA-Z])?(?:[-+]\d{1,2})?\))\s*!(?!\s*!)")
"""`12!`, `n!`, `(2n+1)!`; not `n!!`."""
_NEEDED = re.compile(r"\\(?:sum|prod|int|lim)(?![a-zA-Z])")
"""The commands that need sympy."""
_EXPONENT = re.compile(r"\^\s*(?:\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}|.)")
"""An exponent in braces, or one character."""


def is_admitted(text: str) -> bool:
    """Whether a normalized text has a sum, product, integral or limit, and passes the whitelist and the bounds."""
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
    """Whether sympy proves two texts equal; None when one of them is not admitted or is not an expression."""
    if not (is_admitted(prediction) and is_admitted(gold)):
        return None
    sympy, latex2sympy = _load()
    # The parser and sympy may raise any exception on text they do not understand. Such answers stay undecided.
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
    """Imports sympy and the LaTeX parser (half a second), so that this time counts against no deadline."""
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
