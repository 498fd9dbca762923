"""Countdown: an arithmetic expression that uses every given number exactly once and equals the target.

A recursive-descent parser reads + - * / and parentheses and computes with `fractions.Fraction`, so results are exact
and Python never evaluates the text. Length and nesting are bounded, so every call ends at once.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

MAX_CHARACTERS = 300
MAX_DIGITS = 9
MAX_NESTING = 30

_TOKEN = re.compile(r"\s*(?:([0-9]+)|([-+*/()]))")
_SPELLINGS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-", "[": "(", "]": ")"})
_COMMANDS = {"\\times": "*", "\\cdot": "*", "\\div": "/", "\\left": "", "\\right": "", "**": "?"}


class ExpressionError(ValueError):
    """The text is not an expression of whole numbers, + - * / and parentheses, or is too long, or divides by zero."""


def evaluate(expression: str) -> tuple[Fraction, list[int]]:
    """Returns the value of an expression, and the numbers in it in order.

    Raises:
        ExpressionError: when the expression is not valid.
    """
    parser = _Parser(_tokenize(expression))
    value = parser.sum(0)
    if parser.position < len(parser.tokens):
        raise ExpressionError(f"unexpected {parser.tokens[parser.position]!r}")
    return value, parser.numbers


def check(expression: str, numbers: Sequence[int], target: int) -> bool:
    """Whether `expression` (or `expression = target`) uses each of `numbers` exactly once and equals `target`."""
    left, equals, right = expression.partition("=")
    try:
        if equals and evaluate(right)[0] != target:
            return False
        value, used = evaluate(left)
    except ExpressionError:
        return False
    return value == target and Counter(used) == Counter(numbers)


def _tokenize(expression: str) -> list[str]:
    if len(expression) > MAX_CHARACTERS:
        raise ExpressionError(f"{len(expression)} characters; at most {MAX_CHARACTERS} are read")
    for command, symbol in _COMMANDS.items():
        expression = expression.replace(command, symbol)
    expression = expression.translate(_SPELLINGS).strip()
    tokens, position = [], 0
    while position < len(expression):
        match = _TOKEN.match(expression, position)
        if match is None:
            raise ExpressionError(f"unexpected {expression[position]!r}")
        tokens.append(match[1] or match[2])
        position = match.end()
    return tokens


class _Parser:
    """Computes the value while it reads; `numbers` collects the numbers in order."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens
        self.position = 0
        self.numbers: list[int] = []

    def sum(self, depth: int) -> Fraction:
        value = self._product(depth)
        while (sign := self._take("+", "-")) is not None:
            term = self._product(depth)
            value = value + term if sign == "+" else value - term
        return value

    def _product(self, depth: int) -> Fraction:
        value = self._atom(depth)
        while (operator := self._take("*", "/")) is not None:
            factor = self._atom(depth)
            if operator == "/" and factor == 0:
                raise ExpressionError("division by zero")
            value = value * factor if operator == "*" else value / factor
        return value

    def _atom(self, depth: int) -> Fraction:
        if depth > MAX_NESTING:
            raise ExpressionError(f"nested deeper than {MAX_NESTING}")
        if self._take("-") is not None:
            return -self._atom(depth + 1)
        if self._take("(") is not None:
            value = self.sum(depth + 1)
            if self._take(")") is None:
                raise ExpressionError("a parenthesis is not closed")
            return value
        token = self.tokens[self.position] if self.position < len(self.tokens) else "the end"
        if not token.isdecimal() or len(token) > MAX_DIGITS:
            raise ExpressionError(f"expected a whole number, found {token[:20]!r}")
        self.position += 1
        self.numbers.append(int(token))
        return Fraction(self.numbers[-1])

    def _take(self, *wanted: str) -> str | None:
        if self.position < len(self.tokens) and self.tokens[self.position] in wanted:
            self.position += 1
            return self.tokens[self.position - 1]
        return None
