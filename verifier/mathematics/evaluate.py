"""Evaluates an expression's tree: exactly as a rational number, or as a high-precision complex number at a given point.

Both evaluations are bounded. Integers have at most `MAX_BITS` bits and arguments of functions are at most
`MAX_ARGUMENT`, so 10^{10^{10}} costs nothing. A value beyond a bound, a division by zero and an infinity raise
`Undefined`.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import mpmath  # type: ignore[import-untyped]

from verifier.mathematics.tree import Node, Number, Operation, Symbol

MAX_BITS = 1 << 17
MAX_EXACT_FACTORIAL = 3000
MAX_ARGUMENT = 10**15
MAX_EXPONENT_BITS = 100
MAX_TERMS = 2000
MAX_LIMIT = 10**6

_CIRCULAR = ("sin", "cos", "tan", "cot", "sec", "csc")
_FUNCTIONS: dict[str, str] = {
    **{name: name for name in (*_CIRCULAR, "sinh", "cosh", "tanh", "exp")},
    **{f"arc{name}": f"a{name}" for name in _CIRCULAR},
}


class Undefined(ArithmeticError):
    """The expression has no value: it is outside a function's domain, or beyond a bound."""


def exact(node: Node) -> Fraction | None:
    """The value as a rational number; None when it is irrational, unknown, undefined or beyond the bounds."""
    try:
        return _exact(node)
    except (Undefined, ZeroDivisionError):
        return None


def _exact(node: Node) -> Fraction:
    if isinstance(node, Number):
        return node.value
    if isinstance(node, Symbol):
        raise Undefined(node.name)
    values = [_exact(argument) for argument in node.arguments]
    match node.name, values:
        case "add", _:
            return _bounded(sum(values, Fraction(0)))
        case "mul", [first, second]:
            return _bounded(first * second)
        case "div", [first, second]:
            return _bounded(first / second)
        case "neg", [value]:
            return -value
        case "pow", [base, exponent]:
            return _power(base, exponent)
        case "abs", [value]:
            return abs(value)
        case "lfloor", [value]:
            return Fraction(value.__floor__())
        case "lceil", [value]:
            return Fraction(value.__ceil__())
        case "factorial", [value] if value.denominator == 1 and 0 <= value <= MAX_EXACT_FACTORIAL:
            return Fraction(int(mpmath.libmp.ifac(int(value))))
        case "binom", [n, k] if n.denominator == k.denominator == 1 and 0 <= k <= n <= MAX_EXACT_FACTORIAL:
            factorials = [int(mpmath.libmp.ifac(int(value))) for value in (n, k, n - k)]
            return Fraction(factorials[0] // (factorials[1] * factorials[2]))
    return _exact_number_theory(node.name, values)


def _exact_number_theory(name: str, values: list[Fraction]) -> Fraction:
    match name, values:
        case "max" | "min", _:
            return max(values) if name == "max" else min(values)
        case "gcd" | "lcm", _ if all(value.denominator == 1 for value in values):
            whole = [int(value) for value in values]
            return _bounded(Fraction(math.gcd(*whole) if name == "gcd" else math.lcm(*whole)))
        case "mod", [first, second]:
            return first % second
        case "doublefactorial", [value] if value.denominator == 1 and 0 <= value <= MAX_EXACT_FACTORIAL:
            return Fraction(math.prod(range(int(value), 0, -2)))
    raise Undefined(name)


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1 or (base == 0 and exponent <= 0):
        raise Undefined("pow")
    if base in (0, 1, -1):
        return base if exponent % 2 else abs(base)
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if abs(exponent) * bits > MAX_BITS:
        raise Undefined("pow")
    return base ** int(exponent)


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise Undefined("too large")
    return value


_contexts = threading.local()


def _context(digits: int) -> Any:
    """This thread's mpmath context with that precision, cached because creating one costs more than a comparison."""
    made: dict[Any, Any] = _contexts.__dict__
    if digits not in made:
        made[digits] = mpmath.MPContext()
    made[digits].dps = digits
    return made[digits]


class Numeric:
    """Evaluates trees with `digits` decimal digits.

    `scale` is the absolute value of the largest term added so far; `agree` recognizes a zero by it. `absorbed` becomes
    True when a sum has a term so small beside another that agreement to half the digits would not notice it.

    Args:
        digits: decimal digits of every value.
        natural_log: whether a logarithm without a base has base e; otherwise 10.
        real: whether the logarithm and the even root of a negative number are undefined; otherwise they are complex.
    """

    def __init__(self, digits: int, *, natural_log: bool = False, real: bool = False) -> None:
        self.context = _context(digits)
        self.natural_log = natural_log
        self.real = real
        self.scale: Any = self.context.mpf(0)
        self.absorbed = False
        self.terms_left = MAX_TERMS

    def value(self, node: Node, point: Mapping[str, Any]) -> Any:
        """Returns the value at `point` (values of the variables by name) as a real or complex mpmath number.

        Raises:
            Undefined: outside a domain or beyond a bound.
        """
        try:
            result = self._value(node, point)
        # mpmath raises one of these at a pole, or for a value beyond its range.
        except (ValueError, ZeroDivisionError, OverflowError, TypeError, ArithmeticError) as error:
            raise Undefined(str(error)) from error
        return self._finite(result)

    def agree(self, first: Any, second: Any) -> bool:
        """Whether two values agree to half the digits.

        The difference is relative to the larger value. Two values that are nearly zero beside `scale` agree as well:
        they are what rounding leaves of terms that cancel.
        """
        context = self.context
        tolerance = context.mpf(10) ** (-context.dps // 2)
        size = max(abs(first), abs(second))
        return bool(abs(first - second) <= tolerance * size or size <= tolerance**1.5 * self.scale)

    def _finite(self, value: Any) -> Any:
        if not (self.context.isfinite(value)):
            raise Undefined("not finite")
        return value

    def _value(self, node: Node, point: Mapping[str, Any]) -> Any:
        context = self.context
        if isinstance(node, Number):
            return context.mpf(node.value.numerator) / node.value.denominator
        if isinstance(node, Symbol):
            constants = {"\\pi": context.pi, "e": context.e, "i": context.j}
            if node.name not in constants and node.name not in point:
                raise Undefined(node.name)
            # A variable comes before a constant: the index of a sum may be called i.
            return context.convert(point.get(node.name, constants.get(node.name)))
        if node.name in ("sum", "prod"):
            return self._series(node, point)
        values = [self._finite(self._value(argument, point)) for argument in node.arguments]
        if node.name == "pow":
            return self._power_or_root(values[0], node.arguments[1], values[1])
        if node.name == "add":
            sizes = [abs(value) for value in values if value]
            if sizes:
                self.scale = max(self.scale, *sizes)
                self.absorbed |= bool(min(sizes) <= max(sizes) * context.mpf(10) ** (5 - context.dps // 2))
            return sum(values[1:], values[0])
        if node.name == "mul":
            return values[0] * values[1]
        if node.name == "div":
            return values[0] / values[1]
        if node.name == "neg":
            return -values[0]
        return self._call(node.name, values)

    def _call(self, name: str, values: list[Any]) -> Any:
        context, first = self.context, values[0]
        if name == "root":
            return self._root(first, values[1])
        if name == "abs":
            return abs(first)
        if name in ("ln", "log"):
            if self.real and not context.im(first) and first < 0:
                raise Undefined("the logarithm of a negative number")
            base = values[1] if len(values) > 1 else (10 if name == "log" and not self.natural_log else None)
            return context.log(first) if base is None else context.log(first) / context.log(base)
        if any(abs(value) > MAX_ARGUMENT for value in values):
            raise Undefined(f"{name} of a number beyond {MAX_ARGUMENT}")
        if name in ("max", "min", "mod") and not any(context.im(value) for value in values):
            return values[0] % values[1] if name == "mod" else (max if name == "max" else min)(values)
        if name == "cis":
            return context.expj(first)
        if name in _FUNCTIONS:
            return getattr(context, _FUNCTIONS[name])(first)
        if name in ("lfloor", "lceil"):
            return context.floor(first) if name == "lfloor" else context.ceil(first)
        if name in ("factorial", "doublefactorial"):
            return context.factorial(first) if name == "factorial" else context.fac2(first)
        if name == "binom":
            return context.binomial(first, values[1])
        raise Undefined(name)

    def _series(self, node: Operation, point: Mapping[str, Any]) -> Any:
        """Evaluates a sum or product over whole numbers, term by term."""
        index, *limits, body = node.arguments
        lower, upper = (self._value(limit, point) for limit in limits)
        limits_are_whole = all(abs(limit) < MAX_LIMIT and limit == int(limit.real) for limit in (lower, upper))
        if not isinstance(index, Symbol) or not limits_are_whole:
            raise Undefined("limits that are not small whole numbers")
        lower, upper = lower.real, upper.real
        self.terms_left -= max(int(upper) - int(lower) + 1, 0)
        if self.terms_left < 0:
            raise Undefined(f"more than {MAX_TERMS} terms")
        result = self.context.mpf(node.name == "prod")
        for number in range(int(lower), int(upper) + 1):
            term = self._value(body, {**point, index.name: self.context.mpf(number)})
            result = result + term if node.name == "sum" else result * term
        return result

    def _pow(self, base: Any, exponent: Any) -> Any:
        if base == 0:
            if self.context.re(exponent) <= 0:
                raise Undefined("a power of zero")
            return base
        size = abs(exponent) * (1 + abs(self.context.log(abs(base), 2)))
        if size > self.context.mpf(2) ** MAX_EXPONENT_BITS:
            raise Undefined("an exponent beyond the bounds")
        return self.context.power(base, exponent)

    def _power_or_root(self, base: Any, exponent: Node, value: Any) -> Any:
        """Raises `base` to the power `value` of the tree `exponent`; odd roots are real, as in (-8)^{2/3} = 4."""
        fraction = exact(exponent)
        if fraction is None or fraction.denominator == 1:
            return self._pow(base, value)
        if fraction.denominator % 2 == 0:
            return self._even_root_power(base, value)
        return self._pow(self._root(base, self.context.mpf(fraction.denominator)), self.context.mpf(fraction.numerator))

    def _even_root_power(self, base: Any, exponent: Any) -> Any:
        if self.real and not self.context.im(base) and base < 0:
            raise Undefined("the even root of a negative number")
        return self._pow(base, exponent)

    def _root(self, radicand: Any, degree: Any) -> Any:
        """The root of a number: real for an odd degree of a negative number (cbrt(-8) = -2), otherwise principal."""
        if degree == 0:
            raise Undefined("the root of degree zero")
        is_odd = (
            abs(degree) < MAX_LIMIT and not self.context.im(degree) and int(degree.real) == degree and degree % 2 == 1
        )
        if is_odd and not self.context.im(radicand) and radicand < 0:
            return -self._pow(-radicand, 1 / degree)
        if self.real and not self.context.im(radicand) and radicand < 0:
            raise Undefined("the even root of a negative number")
        return self.context.sqrt(radicand) if degree == 2 else self._pow(radicand, 1 / degree)
