r"""Compares products of powers exactly, by the exponents of their primes: `2^{10^{10}} = 4^{5 \cdot 10^9}`.

A constant made of rational numbers by products, quotients, rational powers and roots has a form: its sign and one
rational exponent per prime. Two such constants are equal exactly when their forms are. Other expressions have no form,
and this module decides nothing about them.
"""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

from verifier.mathematics.evaluate import exact
from verifier.mathematics.tree import Node, Number, Operation

MAX_BASE = 10**8
MAX_TERMS = 20

Form = tuple[int, frozenset[tuple[int, Fraction]]]
"""(sign, {(prime, exponent) for every prime with an exponent other than 0})"""


def power_form(node: Node) -> Form | None:
    """The form of a nonzero constant; None when it has no form, or a number in it is beyond `MAX_BASE`."""
    if isinstance(node, Number):
        return _of_rational(node.value)
    if not isinstance(node, Operation):
        return None
    match node.name, node.arguments:
        case "neg", (argument,):
            form = power_form(argument)
            return form and (-form[0], form[1])
        case "mul", (first, second):
            return _multiply(power_form(first), power_form(second), 1)
        case "div", (first, second):
            return _multiply(power_form(first), power_form(second), -1)
        case "pow", (base, exponent):
            return _raise(power_form(base), exact(exponent))
        case "root", (radicand, degree):
            order = exact(degree)
            return _raise(power_form(radicand), 1 / order if order else None)
    return None


def same_terms(first: Node, second: Node) -> bool | None:
    """True when both trees are sums of terms with the same forms, in any order; None when undecided."""
    terms, other_terms = _terms(first), _terms(second)
    if max(len(terms), len(other_terms)) > MAX_TERMS:
        return None
    forms, other_forms = [power_form(term) for term in terms], [power_form(term) for term in other_terms]
    if None in forms or None in other_forms:
        return None
    return Counter(forms) == Counter(other_forms) or None


def _terms(node: Node) -> list[Node]:
    if isinstance(node, Operation) and node.name == "add":
        return [term for argument in node.arguments for term in _terms(argument)]
    if isinstance(node, Operation) and node.name == "neg":
        return [Operation("neg", (term,)) for term in _terms(node.arguments[0])]
    return [node]


def _of_rational(value: Fraction) -> Form | None:
    if not value or max(abs(value.numerator), value.denominator) > MAX_BASE:
        return None
    numerator = {prime: Fraction(power) for prime, power in _factors(abs(value.numerator)).items()}
    denominator = {prime: Fraction(-power) for prime, power in _factors(value.denominator).items()}
    return (1 if value > 0 else -1), frozenset((numerator | denominator).items())


def _factors(number: int) -> Counter[int]:
    factors: Counter[int] = Counter()
    divisor = 2
    while divisor * divisor <= number:
        while number % divisor == 0:
            factors[divisor] += 1
            number //= divisor
        divisor += 1 if divisor == 2 else 2
    if number > 1:
        factors[number] += 1
    return factors


def _multiply(first: Form | None, second: Form | None, power: int) -> Form | None:
    if first is None or second is None:
        return None
    exponents = dict(first[1])
    for prime, exponent in second[1]:
        exponents[prime] = exponents.get(prime, Fraction(0)) + power * exponent
    return first[0] * second[0], frozenset((prime, exponent) for prime, exponent in exponents.items() if exponent)


def _raise(base: Form | None, exponent: Fraction | None) -> Form | None:
    if base is None or exponent is None or (base[0] < 0 and exponent.denominator != 1):
        return None
    sign = base[0] if exponent.numerator % 2 else 1
    return sign, frozenset((prime, power * exponent) for prime, power in base[1] if exponent)
