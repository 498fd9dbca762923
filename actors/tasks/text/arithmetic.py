r"""Addition digit by digit: `47+85=` is answered `7+5=12;4+8+1=13;\boxed{132}`.

Each step adds one column, from the right, with the carry of the step before. The box holds the sum. Option: `digits`,
the number of digits of both numbers (default 2).
"""

from __future__ import annotations

import random

from actors.tasks.base import Drawn, Problem, TaskConfig, draw_problems, read_options

OPTIONS = {"digits": (2, 1, 8)}
COMPLETION_ALPHABET = "0123456789+=;\\boxed{}"
LARGEST_TOTAL = 19
"""9 + 9 and a carry."""


def problems(config: TaskConfig) -> tuple[list[Problem], list[Problem]]:
    """Draw (training, held-out) problems. `a+b=` and `b+a=` are on the same side of the split.

    Raises:
        ValueError: an unknown option, a value out of range, or too few distinct problems.
    """
    digits = read_options(config, OPTIONS)["digits"]
    low, high = 10 ** (digits - 1), 10**digits - 1

    def draw(rng: random.Random) -> Drawn:
        a, b = rng.randint(low, high), rng.randint(low, high)
        return Drawn(f"{min(a, b)}+{max(a, b)}", f"{a}+{b}=", str(a + b))

    return draw_problems(config, draw)


def teacher_trace(problem: Problem, rng: random.Random, error_rate: float) -> str:
    """Write the column steps and the boxed sum.

    Each step is wrong with probability `error_rate`; later steps build on the wrong one.
    """
    first, second = problem.question.rstrip("=").split("+")
    steps: list[str] = []
    written = ""
    carry = 0
    for a, b in zip(reversed(first), reversed(second), strict=True):
        total = int(a) + int(b) + carry
        if rng.random() < error_rate:
            total = rng.choice([wrong for wrong in range(LARGEST_TOTAL + 1) if wrong != total])
        steps.append(f"{a}+{b}{f'+{carry}' if carry else ''}={total}")
        carry, digit = divmod(total, 10)
        written = f"{digit}{written}"
    answer = f"{carry or ''}{written}"
    return f"{';'.join(steps)};\\boxed{{{answer}}}"
