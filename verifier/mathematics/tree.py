r"""The tree of an expression, and the tokenizer of the parser.

The tokenizer is a whitelist: only commands, the signs named here, numbers and single letters are tokens. Any other
character raises `ParseError`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from verifier.mathematics.spelling import FUNCTIONS

MAX_CHARACTERS = 1500
MAX_DEPTH = 120
_MAX_EXPONENT_DIGITS = 4

_WORDS = "|".join(sorted(FUNCTIONS | {"sqrt", "cbrt", "pi", "infty", "mod"}, key=len, reverse=True))
_TOKEN = re.compile(
    rf"\s*(?:(?P<number>(?:1|\d+\.\d+)[eE][-+]?\d+|(?:\d+\.?\d*|\.\d+)(?:E[-+]?\d+|e\d+|e[-+]\d\d+)?)"
    rf"|(?P<word>\\[a-zA-Z]+|(?<![a-zA-Z])(?:{_WORDS})(?![a-zA-Z]))|(?P<letter>[a-zA-Z])"
    r"|(?P<sign>\\[{}%]|[-+/^_!'(){}\[\]|,=]))"
)


class ParseError(ValueError):
    """The text is not an expression of the grammar, or is too long or nested too deep."""


@dataclass(frozen=True, slots=True)
class Number:
    """A literal number, exactly."""

    value: Fraction


@dataclass(frozen=True, slots=True)
class Symbol:
    r"""A variable, or one of the constants `\pi`, `e`, `i`, `\infty`."""

    name: str


@dataclass(frozen=True, slots=True)
class Operation:
    """An operation or function and its arguments."""

    name: str
    """`add`, `mul`, `div`, `neg`, `pow`, `root` (radicand, degree), `log` (argument, base), `sum` and `prod` (index,
    lower, upper, term), or the name of a function."""
    arguments: tuple[Node, ...]


Node = Number | Symbol | Operation


def check_depth(root: Node) -> Node:
    """Returns `root` unchanged, so that recursive functions on it stay within Python's recursion limit.

    Raises:
        ParseError: when the tree is deeper than `MAX_DEPTH`.
    """
    level, depth = [root], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise ParseError(f"more than {MAX_DEPTH} operations within each other")
        level = [child for node in level if isinstance(node, Operation) for child in node.arguments]
    return root


def free_symbols(node: Node) -> frozenset[str]:
    r"""The names of the variables in a tree, without constants such as `\pi` and without the index of a sum."""
    if isinstance(node, Symbol):
        return frozenset() if node.name in CONSTANTS else frozenset((node.name,))
    if isinstance(node, Operation):
        names = frozenset[str]().union(*(free_symbols(argument) for argument in node.arguments))
        return names - free_symbols(node.arguments[0]) if node.name in ("sum", "prod") else names
    return frozenset()


def whole_symbols(node: Node) -> frozenset[str]:
    """The variables that must be whole numbers: in factorials, binomials, limits of sums, and exponents of negative
    numbers, as in (-1)^n.
    """
    if not isinstance(node, Operation):
        return frozenset()
    names = frozenset[str]().union(*(whole_symbols(argument) for argument in node.arguments))
    if node.name in ("factorial", "doublefactorial", "binom"):
        return names | free_symbols(node)
    if node.name in ("sum", "prod"):
        return names.union(*(free_symbols(limit) for limit in node.arguments[1:3]))
    base_is_negative = isinstance(node.arguments[0], Operation) and node.arguments[0].name == "neg"
    if node.name == "pow" and base_is_negative and not free_symbols(node.arguments[0]):
        return names | free_symbols(node.arguments[1])
    return names


CONSTANTS = frozenset(("\\pi", "e", "i", "\\infty"))


def tokenize(text: str) -> list[str]:
    r"""Returns the tokens of a normalized expression. Bare words such as `sqrt` become commands, `\sqrt`.

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
    """The exact value of a number token such as `12`, `0.5` or `1.5e-3`."""
    mantissa, _, exponent = token.replace("E", "e").partition("e")
    if not mantissa.strip("."):
        raise ParseError("a point without digits")
    if len(exponent.lstrip("+-")) > _MAX_EXPONENT_DIGITS:
        raise ParseError(f"exponent {exponent[:20]} is too large")
    return Number(Fraction(mantissa if mantissa[-1] != "." else mantissa[:-1]) * Fraction(10) ** int(exponent or 0))


class Cursor:
    """A position in a list of tokens, with the methods that a parser reads by."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens
        self.position = 0
        self.open_bars = 0

    def peek(self) -> str:
        """The next token; empty at the end."""
        return self.tokens[self.position] if self.position < len(self.tokens) else ""

    def next(self) -> str:
        """Moves past the next token and returns it."""
        token = self.peek()
        self.position += 1
        return token

    def take(self, *wanted: str) -> str:
        """Moves past the next token and returns it if it is one of these; empty otherwise."""
        return self.next() if self.peek() in wanted and self.peek() else ""

    def expect(self, wanted: str) -> None:
        """Moves past this token; raises `ParseError` for any other."""
        if self.next() != wanted:
            raise ParseError(f"{wanted!r} is missing")

    def raw_group(self) -> str:
        """Moves past a group in braces, or one token, and returns its text, as needed for names."""
        if not self.take("{"):
            return self.next()
        parts, level = [], 1
        while level:
            token = self.next()
            level += (token == "{") - (token == "}")
            if not token:
                raise ParseError("a group is not closed")
            parts.append(token)
        return "".join(parts[:-1])
