"""Countdown compared with brute force, and the texts that its parser rejects."""

import itertools
import random
from fractions import Fraction

import pytest

from verifier.rewards.countdown import ExpressionError, check, evaluate

NUMBERS = [3, 5, 8]


def brute_force() -> list[tuple[str, Fraction | None]]:
    """Every expression of the numbers with two operators and both bracketings, with its value by Fraction."""
    operations = {
        "+": lambda a, b: a + b,
        "-": lambda a, b: a - b,
        "*": lambda a, b: a * b,
        "/": lambda a, b: a / b if b else None,
    }
    found = []
    for a, b, c in itertools.permutations(NUMBERS):
        for first, second in itertools.product(operations, repeat=2):
            inner = operations[first](Fraction(a), Fraction(b))
            found.append((f"({a} {first} {b}) {second} {c}", operations[second](inner, Fraction(c))))
            inner = operations[second](Fraction(b), Fraction(c))
            value = None if inner is None else operations[first](Fraction(a), inner)
            found.append((f"{a} {first} ({b} {second} {c})", value))
    return found


def test_every_expression_has_the_value_of_brute_force() -> None:
    for expression, value in brute_force():
        if value is None:
            with pytest.raises(ExpressionError):
                evaluate(expression)
        else:
            assert evaluate(expression) == (
                value,
                [int(n) for n in expression.replace("(", " ").replace(")", " ").split() if n.isdigit()],
            )


def test_check_accepts_exactly_the_solutions() -> None:
    expressions = brute_force()
    for target in random.Random(0).sample(range(1, 130), 30):
        solutions = {expression for expression, value in expressions if value == target}
        assert {expression for expression, _ in expressions if check(expression, NUMBERS, target)} == solutions


@pytest.mark.parametrize(
    ("expression", "numbers", "target", "right"),
    [
        ("44 + 19 + 35", [44, 19, 35], 98, True),
        ("(44 + 19) + 35 = 98", [44, 19, 35], 98, True),
        ("44 + 19 + 35 = 97", [44, 19, 35], 98, False),
        ("2 * 3 + 4", [2, 3, 4], 10, True),
        ("2 + 3 * 4", [2, 3, 4], 14, True),
        ("10 - 3 - 2", [10, 3, 2], 5, True),
        ("12 / 3 / 2", [12, 3, 2], 2, True),
        ("1 / 3 * 6", [1, 3, 6], 2, True),
        (r"2 \times 3", [2, 3], 6, True),
        ("6 ÷ 3", [6, 3], 2, True),
        ("-3 + 5", [3, 5], 2, True),
        ("3 + 3", [3], 6, False),
        ("3 + 3", [3, 3], 6, True),
        ("3", [3, 5], 3, False),
        ("3 + 5 + 0", [3, 5], 8, False),
        ("35", [3, 5], 35, False),
        ("5 / 0", [5, 0], 0, False),
        ("2 ** 3", [2, 3], 8, False),
        ("2 ^ 3", [2, 3], 8, False),
        ("3 5", [3, 5], 8, False),
        ("3 +", [3], 3, False),
        ("(3 + 5", [3, 5], 8, False),
        ("3 + 5)", [3, 5], 8, False),
        ("3.0 + 5", [3, 5], 8, False),
        ("", [], 0, False),
        ("=", [], 0, False),
        ("__import__('os')", [3], 3, False),
        ("٣ + 5", [3, 5], 8, False),
        ("(" * 100 + "3" + ")" * 100, [3], 3, False),
        ("-" * 200 + "3", [3], 3, False),
        ("3 + " * 500 + "3", [3], 3, False),
        ("9" * 200, [3], 3, False),
    ],
)
def test_check(expression: str, numbers: list[int], target: int, right: bool) -> None:
    assert check(expression, numbers, target) is right
