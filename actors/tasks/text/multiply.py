"""Multiplication by partial products: `36*47=` is answered `36*7=252;36*4=144;252+1440=1692;<answer>1692</answer>`.

The answer has one partial product per digit of the second number, from the right, then running sums. Options:
`first_digits` and `second_digits` (default 2, at most 3); `words`, where 1 asks in an English sentence.
"""

from __future__ import annotations

import random
import re

from actors.tasks.base import Drawn, Problem, TaskConfig, draw_problems, read_options

OPTIONS = {"first_digits": (2, 1, 3), "second_digits": (2, 1, 3), "words": (0, 0, 1)}
COMPLETION_ALPHABET = "0123456789+*=;<answer>/"


def problems(config: TaskConfig) -> tuple[list[Problem], list[Problem]]:
    """Draw (training, held-out) problems. `a*b=` and `b*a=` are on the same side of the split.

    Raises:
        ValueError: an unknown option, a value out of range, or too few distinct problems.
    """
    options = read_options(config, OPTIONS)

    def number(rng: random.Random, digits: int) -> int:
        # At least 2: a product with 1 teaches nothing.
        return rng.randint(max(2, 10 ** (digits - 1)), 10**digits - 1)

    def draw(rng: random.Random) -> Drawn:
        a, b = number(rng, options["first_digits"]), number(rng, options["second_digits"])
        question = f"What is {a} * {b}?" if options["words"] else f"{a}*{b}="
        return Drawn(f"{min(a, b)}*{max(a, b)}", question, str(a * b))

    return draw_problems(config, draw)


def teacher_trace(problem: Problem, rng: random.Random, error_rate: float) -> str:
    """Write partial products, running sums and the tagged answer.

    Each computed number gets one wrong digit with probability `error_rate`.
    """
    first, second = re.findall(r"\d+", problem.question)

    def compute(right: int) -> int:
        return slip(right, rng) if rng.random() < error_rate else right

    products = [compute(int(first) * int(digit)) for digit in reversed(second)]
    steps = [f"{first}*{digit}={product}" for digit, product in zip(reversed(second), products, strict=True)]
    total = products[0]
    for place, product in enumerate(products[1:], start=1):
        shifted = product * 10**place
        following = compute(total + shifted)
        steps.append(f"{total}+{shifted}={following}")
        total = following
    return f"{';'.join(steps)};<answer>{total}</answer>"


def slip(right: int, rng: random.Random) -> int:
    """Change one digit of `right`; the number of digits stays."""
    digits = list(str(right))
    place = rng.randrange(len(digits))
    # A leading zero would make the number shorter.
    allowed = "123456789" if place == 0 and len(digits) > 1 else "0123456789"
    digits[place] = rng.choice([digit for digit in allowed if digit != digits[place]])
    return int("".join(digits))
