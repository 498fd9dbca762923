r"""The tree of an expression, and the tokens it is read from: the whitelist everything symbolic passes first.

Only the commands, signs and single letters named here are tokens; anything else is a `ParseError`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from verifier.math_normalize import FUNCTIONS

MAX_CHARACTERS = 1500
MAX_DEPTH = 120
_MAX_EXPONENT_DIGITS = 4

_WORDS = "|".join(sorted(FUNCTIONS | {"sqrt", "pi", "infty", "infinity"}, key=len, reverse=True))
_TOKEN = re.compile(
    rf"\s*(?:(?P<number>(?:1|\d+\.\d+)[eE][-+]?\d+|(?:\d+\.?\d*|\.\d+)(?:E[-+]?\d+|e\d+|e[-+]\d\d+)?)"
    rf"|(?P<word>\\[a-zA-Z]+|(?<![a-zA-Z])(?:{_WORDS})(?![a-zA-Z]))|(?P<letter>[a-zA-Z])"
    r"|(?P<sign>\\[{}%]|[-+/^_!'(){}\[\]|]))"
)


class ParseError(ValueError):
    """Not an expression of the grammar, or too long or too deep."""


@dataclass(frozen=True, slots=True)
class Number:
    """A literal, exact."""

    value: Fraction


@dataclass(frozen=True, slots=True)
class Symbol:
    r"""A variable, or one of the constants `\pi`, `e`, `i`, `\infty`."""

    name: str


@dataclass(frozen=True, slots=True)
class Operation:
    """`add`, `mul`, `div`, `neg`, `pow`, `root` (radicand, degree), `log` (argument, base), or a function's name."""

    name: str
    arguments: tuple[Node, ...]


Node = Number | Symbol | Operation


def check_depth(root: Node) -> Node:
    """`root`, if later walks over it stay within Python's recursion limit.

    Raises:
        ParseError: when a branch is longer than `MAX_DEPTH`.
    """
    level, depth = [root], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise ParseError(f"more than {MAX_DEPTH} operations within each other")
        level = [child for node in level if isinstance(node, Operation) for child in node.arguments]
    return root


def free_symbols(node: Node) -> frozenset[str]:
    """The names of the variables in a tree, constants left out."""
    if isinstance(node, Symbol):
        return frozenset() if node.name in CONSTANTS else frozenset((node.name,))
    if isinstance(node, Operation):
        return frozenset[str]().union(*(free_symbols(argument) for argument in node.arguments))
    return frozenset()


CONSTANTS = frozenset(("\\pi", "e", "i", "\\infty"))


def tokenize(text: str) -> list[str]:
    """The tokens of a normalized expression; bare words such as `sqrt` become commands.

    Raises:
        ParseError: for a character outside the grammar, or a text that is too long.
    """
    if len(text) > MAX_CHARACTERS:
        raise ParseError(f"{len(text)} characters; at most {MAX_CHARACTERS} are read")
    tokens, position, text = [], 0, text.rstrip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise ParseError(f"unexpected {text[position : position + 10]!r}")
        token = match[match.lastgroup or 0]
        tokens.append(token if match.lastgroup != "word" or token.startswith("\\") else f"\\{token}")
        position = match.end()
    return tokens


def read_number(token: str) -> Number:
    """A number token, exactly; `1.5e-3` too."""
    mantissa, _, exponent = token.replace("E", "e").partition("e")
    if len(exponent.lstrip("+-")) > _MAX_EXPONENT_DIGITS:
        raise ParseError(f"exponent {exponent[:20]} is too large")
    return Number(Fraction(mantissa if mantissa[-1] != "." else mantissa[:-1]) * Fraction(10) ** int(exponent or 0))
