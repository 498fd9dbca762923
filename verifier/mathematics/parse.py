r"""Parses one normalized LaTeX expression into a small tree.

The grammar is a whitelist: it has only the commands named here, and a name is one letter with an optional subscript.
Length and nesting are bounded, so parsing ends at once. Python never evaluates any part of the text.

The readings of ambiguous text:

- `1/2x` is read from left to right, as `(1/2)x`.
- A whole number before a fraction of whole numbers is a mixed number: `3\frac{1}{2}` is 3.5.
- `\frac12` takes single digits, as LaTeX does.
- A function without parentheses takes the factors up to the next sign, operator or function: `\sin 2x + 1` is
  `\sin(2x) + 1`.
"""

from __future__ import annotations

from fractions import Fraction

from verifier.mathematics.spelling import FUNCTIONS
from verifier.mathematics.tree import (
    Cursor,
    Node,
    Number,
    Operation,
    ParseError,
    Symbol,
    check_depth,
    read_number,
    tokenize,
)

MAX_NESTING = 40

_GREEK_NAMES = (
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi pi rho sigma tau"
    " upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell hbar infty"
)
_GREEK = frozenset(_GREEK_NAMES.split())
_CLOSING = {"(": ")", "[": "]", "{": "}", "\\{": "\\}", "\\lfloor": "\\rfloor", "\\lceil": "\\rceil"}
_ACCENTS = frozenset(("\\vec", "\\hat", "\\bar", "\\overline", "\\overrightarrow", "\\tilde", "\\dot", "\\mathbb"))
_SEVERAL = frozenset(("max", "min", "gcd", "lcm"))
_ENDS = frozenset(
    (
        ",",
        "=",
        "\\over",
        "\\choose",
        "\\mod",
        "+",
        "-",
        "/",
        "\\cdot",
        "\\div",
        "\\pm",
        "\\mp",
        "^",
        "_",
        "!",
        "'",
        "\\%",
        "\\degree",
    )
)


def parse(text: str) -> Node:
    """Returns the tree of a normalized expression.

    Raises:
        ParseError: when the text is not an expression of the grammar.
    """
    parser = _Parser(tokenize(text))
    node = parser.sum(0)
    if parser.peek() != "":
        raise ParseError(f"unexpected {parser.peek()!r}")
    return check_depth(node)


class _Parser(Cursor):
    """Recursive descent over tokens. Every method takes the nesting depth and moves the position past what it reads."""

    def sum(self, depth: int) -> Node:
        if depth > MAX_NESTING:
            raise ParseError(f"nested deeper than {MAX_NESTING}")
        terms = [self.product(depth)]
        while sign := self.take("+", "-"):
            term = self.product(depth)
            terms.append(term if sign == "+" else Operation("neg", (term,)))
        return terms[0] if len(terms) == 1 else Operation("add", tuple(terms))

    def product(self, depth: int) -> Node:
        node = self.signed(depth)
        while True:
            if self.take("\\cdot"):
                node = Operation("mul", (node, self.signed(depth)))
            elif self.take("/", "\\div"):
                node = Operation("div", (node, self.signed(depth)))
            elif self.take("\\mod"):
                node = Operation("mod", (node, self.signed(depth)))
            elif self.starts_factor():
                node = Operation("mul", (node, self.power(depth)))
            else:
                return node

    def signed(self, depth: int) -> Node:
        negative = False
        while sign := self.take("+", "-"):
            negative ^= sign == "-"
        node = self.power(depth)
        return Operation("neg", (node,)) if negative else node

    def starts_factor(self) -> bool:
        """Whether a factor follows without a sign, as the `x` in `2x`. A number after a number is not a factor."""
        token = self.peek()
        if not token or token in _ENDS or token in _CLOSING.values() or token in ("\\rvert", "\\rangle"):
            return False
        if token == "|":
            return self.open_bars == 0
        return not (token[0] in "0123456789." and self.position and self.tokens[self.position - 1][-1] in "0123456789.")

    def power(self, depth: int) -> Node:
        base = self.postfix(self.atom(depth + 1))
        if not self.take("^"):
            return base
        exponent = self.signed(depth + 1) if self.peek() in ("-", "+") else self.power_argument(depth + 1)
        return self.postfix(Operation("pow", (base, exponent)))

    def power_argument(self, depth: int) -> Node:
        if depth > MAX_NESTING:
            raise ParseError(f"nested deeper than {MAX_NESTING}")
        node = self.group(depth) if self.peek() == "{" else self.atom(depth)
        if self.take("^"):
            return Operation("pow", (node, self.power_argument(depth + 1)))
        return node

    def postfix(self, node: Node) -> Node:
        while sign := self.take("!", "\\%", "\\degree"):
            if sign == "!":
                node = Operation("doublefactorial" if self.take("!") else "factorial", (node,))
            elif sign == "\\%":
                node = Operation("div", (node, Number(Fraction(100))))
            else:
                node = Operation("div", (Operation("mul", (node, Symbol("\\pi"))), Number(Fraction(180))))
        return node

    def atom(self, depth: int) -> Node:
        token = self.next()
        if token[:1].isdigit() or token[:1] == ".":
            return self.mixed(read_number(token), depth)
        if token in ("|", "\\lvert"):
            return self.absolute(token, depth)
        if token in _CLOSING:
            node = self.sum(depth + 1)
            if token == "{" and (infix := self.take("\\over", "\\choose")):
                node = Operation("div" if infix == "\\over" else "binom", (node, self.sum(depth + 1)))
            self.expect(_CLOSING[token])
            return Operation(token[1:], (node,)) if token in ("\\lfloor", "\\lceil") else node
        if token == "C" and (combinations := self.combinations()):
            return combinations
        if len(token) == 1 and token.isalpha():
            return self.symbol(token)
        if token[:1] == "\\":
            return self.command(token, depth)
        raise ParseError(f"unexpected {token!r}")

    def absolute(self, token: str, depth: int) -> Node:
        self.open_bars += token == "|"
        node = self.sum(depth + 1)
        self.expect("|" if token == "|" else "\\rvert")
        self.open_bars -= token == "|"
        return Operation("abs", (node,))

    def command(self, token: str, depth: int) -> Node:
        name = token[1:]
        if name in ("infinity", "infty"):
            return Symbol("\\infty")
        if name in _GREEK:
            return self.symbol(token)
        if name == "text":
            return self.upright_letter()
        if token in _ACCENTS:
            return self.symbol(token + self.raw_group())
        if name in ("frac", "binom"):
            return Operation("div" if name == "frac" else name, (self.argument(depth), self.argument(depth)))
        if name in ("sum", "prod"):
            return self.series(name, depth)
        if name == "cbrt":
            return Operation("root", (self.argument(depth, whole_number=True), Number(Fraction(3))))
        if name == "sqrt":
            degree = self.bracketed(depth) if self.peek() == "[" else Number(Fraction(2))
            return Operation("root", (self.argument(depth, whole_number=True), degree))
        if name in FUNCTIONS:
            return self.function(name, depth)
        raise ParseError(f"unknown command {token!r}")

    def mixed(self, whole: Number, depth: int) -> Node:
        r"""Reads the fraction behind a whole number: `3\frac{1}{2}` is a sum, but `3\frac{x}{2}` is a product."""
        if self.peek() != "\\frac" or whole.value.denominator != 1:
            return whole
        start = self.position
        fraction = self.command(self.next(), depth)
        parts = fraction.arguments if isinstance(fraction, Operation) else ()
        if all(isinstance(part, Number) and part.value.denominator == 1 for part in parts) and self.peek() != "^":
            return Operation("add", (whole, fraction))
        self.position = start
        return whole

    def combinations(self) -> Node | None:
        """Reads the rest of `C(5,2)`; None when something else follows the C."""
        rest = self.tokens[self.position : self.position + 5]
        if len(rest) < 5 or (rest[0], rest[2], rest[4]) != ("(", ",", ")") or not (rest[1] + rest[3]).isdecimal():
            return None
        self.position += 5
        return Operation("binom", (read_number(rest[1]), read_number(rest[3])))

    def series(self, name: str, depth: int) -> Node:
        r"""Reads the rest of `\sum_{k=1}^{n} k^2`. The term ends before the next plus or minus sign."""
        self.expect("_")
        self.expect("{")
        index = self.atom(depth + 1)
        self.expect("=")
        lower = self.sum(depth + 1)
        self.expect("}")
        self.expect("^")
        upper = self.power_argument(depth + 1)
        if not isinstance(index, Symbol):
            raise ParseError("the index of a sum is not a variable")
        return Operation(name, (index, lower, upper, self.product(depth + 1)))

    def several(self, name: str, depth: int) -> Node:
        r"""Reads the arguments of a function with several, such as `(3, 5)` in `\max(3, 5)`."""
        opening = self.next()
        if opening not in ("(", "{", "\\{"):
            raise ParseError(f"{name} wants parentheses")
        arguments = [self.sum(depth + 1)]
        while self.take(","):
            arguments.append(self.sum(depth + 1))
        self.expect(_CLOSING[opening])
        return Operation(name, tuple(arguments))

    def function(self, name: str, depth: int) -> Node:
        if name in _SEVERAL:
            return self.several(name, depth)
        base: Node | None = Number(Fraction(10)) if name == "lg" else None
        if self.take("_"):
            base = self.argument(depth, whole_number=True)
        exponent = self.power_argument(depth + 1) if self.take("^") else None
        if self.peek() in ("(", "[", "{", "\\{", "|", "\\lvert"):
            argument = self.atom(depth + 1)
            if self.peek() == "^" and exponent is None:
                self.next()
                exponent = self.power_argument(depth + 1)
        else:
            argument = self.factors(depth + 1)
        if exponent == Operation("neg", (Number(Fraction(1)),)) and name in ("sin", "cos", "tan", "cot", "sec", "csc"):
            return Operation(f"arc{name}", (argument,))
        if name in ("log", "lg"):
            node = Operation("log", (argument,) if base is None else (argument, base))
        else:
            node = Operation(name, (argument,))
        return node if exponent is None else Operation("pow", (node, exponent))

    def factors(self, depth: int) -> Node:
        r"""Reads the argument of a function without parentheses: `2 \pi x` in `\sin 2 \pi x`, `x/2` in `\sin x/2`."""
        if depth > MAX_NESTING:
            raise ParseError(f"nested deeper than {MAX_NESTING}")
        node = self.signed(depth)
        while self.starts_factor() and self.peek()[1:] not in FUNCTIONS and self.peek() not in ("(", "["):
            node = Operation("mul", (node, self.power(depth)))
        if self.peek() == "/" and not isinstance(node, Operation):
            self.next()
            node = Operation("div", (node, self.power(depth)))
        return node

    def argument(self, depth: int, *, whole_number: bool = False) -> Node:
        r"""Reads the argument of a command: a group in braces, or one token.

        Of a number only the first digit is read, as in `\frac12`, unless `whole_number` is set, as for `\sqrt12`.
        """
        token = self.peek()
        if token == "{":
            return self.group(depth + 1)
        if token[:1].isdigit() and not whole_number and len(token) > 1:
            self.tokens[self.position] = token[1:]
            return Number(Fraction(int(token[0])))
        if depth > MAX_NESTING:
            raise ParseError(f"nested deeper than {MAX_NESTING}")
        return read_number(self.next()) if token[:1].isdigit() else self.atom(depth + 1)

    def group(self, depth: int) -> Node:
        if self.peek() != "{":
            raise ParseError("'{' is missing")
        return self.atom(depth)

    def bracketed(self, depth: int) -> Node:
        self.expect("[")
        node = self.sum(depth + 1)
        self.expect("]")
        return node

    def symbol(self, name: str) -> Node:
        primes = ""
        while self.peek() == "'":
            primes += self.next()
        if self.take("_"):
            name += "_" + (self.raw_group() if self.peek() == "{" else self.next())
        return Symbol(name + primes)

    def upright_letter(self) -> Node:
        letter = self.raw_group()
        if len(letter) != 1 or not letter.isalpha():
            raise ParseError(f"text {letter[:20]!r} is not a symbol")
        return self.symbol(letter)
