"""Countdown: `3,7,12=22:` asks for 22 from 3, 7 and 12, each used exactly once, with + - * and /.

Every problem is solvable: the target is the value of a random expression over the numbers, in which every intermediate
result is a positive integer. With `data_path`, numbers and targets are read from there. The level is the number of
numbers.

The teacher writes up to `MAX_MISSES` tries that miss, then the solution, as in
`3+7=10,10+12=22?22y;<answer>(3+7)+12</answer>`, or it gives up. The answer is its last try in both cases.

Options: `min_numbers` and `max_numbers` (default 3), each count equally often; `max_value` of a number (default 9, one
digit, for small models); `max_target` (default 99); `words`, where 1 asks in an English sentence. The defaults allow
1,945 training and 199 held-out problems.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

from actors.tasks.base import Drawn, Problem, TaskConfig, draw_problems, read_options, read_range
from actors.tasks.datasets.records import read_problems
from actors.tasks.datasets.sources import Row

OPTIONS = {
    "min_numbers": (3, 2, 5),
    "max_numbers": (3, 2, 5),
    "max_value": (9, 4, 1000),
    "max_target": (99, 9, 10_000),
    "words": (0, 0, 1),
}
COMPLETION_ALPHABET = "0123456789+-*/=,?yn;()<answer>"
MAX_MISSES = 5
"""Largest number of tries that miss before the solution. Every number from 0 on is equally likely."""


@dataclass(frozen=True, slots=True)
class Term:
    """A number on the table: its value, its expression, and the step that made the number."""

    value: int
    text: str
    step: str = ""
    """The step that made this term, as the teacher writes it; empty for a given number."""

    @property
    def operand(self) -> str:
        """The expression as an operand, in parentheses unless it is a given number."""
        return f"({self.text})" if self.step else self.text


def problems(config: TaskConfig) -> tuple[list[Problem], list[Problem]]:
    """Draw or read (training, held-out) problems. All targets of the same numbers are on the same side of the split.

    The gold is a JSON object: {"numbers": [int, ...], "target": int}.

    Raises:
        ValueError: an unknown option, a value out of range, or too few distinct problems.
    """
    options = read_options(config, OPTIONS)
    fewest, most = read_range(options, "min_numbers", "max_numbers")
    if config.data_path:
        return read_problems(config, lambda row: _read_row(row, options["words"]))

    def draw(rng: random.Random) -> Drawn:
        num_numbers = rng.randint(fewest, most)
        while True:
            numbers = sorted(rng.randint(1, options["max_value"]) for _ in range(num_numbers))
            table = given(numbers)
            while len(table) > 1:
                table = rng.choice(list(moves(table)))
            if table[0].value <= options["max_target"]:
                break
        return _ask(",".join(map(str, numbers)), numbers, table[0].value, options["words"])

    return draw_problems(config, draw)


def _ask(key: str, numbers: list[int], target: int, words: int) -> Drawn:
    question = f"{','.join(map(str, numbers))}={target}:"
    if words:
        question = f"Using the numbers {numbers}, create an equation that equals {target}."
    return Drawn(key, question, json.dumps({"numbers": numbers, "target": target}), len(numbers))


def _read_row(row: Row, words: int) -> Drawn:
    numbers, target = row.field("numbers"), row.field("target")
    if not isinstance(numbers, list) or not all(type(number) is int for number in [*numbers, target]):
        raise ValueError(
            f"{row.where}: countdown reads numbers, a list of whole numbers, and target, a whole number, not"
            f" {str(numbers)[:60]} and {str(target)[:60]}"
        )
    return _ask(f"{sorted(numbers)}={target}", numbers, target, words)


def given(numbers: list[int]) -> list[Term]:
    """Return the table before the first step."""
    return [Term(number, str(number)) for number in numbers]


def moves(table: list[Term]) -> Iterator[list[Term]]:
    """Yield every table after one more step. The new term comes last."""
    for i, j in combinations(range(len(table)), 2):
        rest = [term for k, term in enumerate(table) if k not in (i, j)]
        # A computed term comes first, so that a chain of steps continues from its last result.
        a, b = (table[j], table[i]) if table[j].step else (table[i], table[j])
        small, large = sorted((a, b), key=lambda term: term.value)
        results = [("+", a, b, a.value + b.value), ("*", a, b, a.value * b.value)]
        if large.value > small.value:
            results.append(("-", large, small, large.value - small.value))
        if large.value % small.value == 0:
            results.append(("/", large, small, large.value // small.value))
        for sign, left, right, value in results:
            text = f"{left.operand}{sign}{right.operand}"
            yield [*rest, Term(value, text, f"{left.value}{sign}{right.value}={value}")]


def solve(numbers: list[int], target: int, rng: random.Random) -> list[Term] | None:
    """Find the terms of a random solution, step by step; None if there is no solution."""

    def search(table: list[Term]) -> list[Term] | None:
        if len(table) == 1:
            return [] if table[0].value == target else None
        following = list(moves(table))
        rng.shuffle(following)
        for table_after in following:
            found = search(table_after)
            if found is not None:
                return [table_after[-1], *found]
        return None

    return search(given(numbers))


def miss(numbers: list[int], target: int, rng: random.Random) -> list[Term]:
    """Draw the terms of a try that misses.

    The steps are random, except the last: it comes closest without hitting the target.
    """
    for attempt in range(10):
        table, made = given(numbers), list[Term]()
        while len(table) > 2:
            table = rng.choice(list(moves(table)))
            made.append(table[-1])
        last = sorted((after[-1] for after in moves(table)), key=lambda term: abs(term.value - target))
        # When the closest step hits the target, try again. The last attempt skips the step that hits it.
        if last[0].value != target or attempt == 9:
            return [*made, next(term for term in last if term.value != target)]
    raise AssertionError("unreachable: the tenth attempt returns")


def teacher_trace(problem: Problem, rng: random.Random, error_rate: float) -> str:
    """Write up to `MAX_MISSES` misses, then the solution.

    After each miss the teacher gives up with probability `error_rate`. The tagged answer is the last try, so it is
    wrong exactly when the teacher gave up.
    """
    gold = json.loads(problem.gold)
    numbers, target = gold["numbers"], gold["target"]
    tries: list[list[Term]] = []
    for _ in range(rng.randint(0, MAX_MISSES)):
        tries.append(_fresh_miss(numbers, target, rng, {terms[-1].text for terms in tries}))
        if rng.random() < error_rate:
            break
    else:
        solution = solve(numbers, target, rng)
        if solution is None:
            raise ValueError(f"countdown problem {problem.question!r} has no solution to teach")
        tries.append(solution)
    written = "".join(f"{_write_try(terms, target)};" for terms in tries)
    return f"{written}<answer>{tries[-1][-1].text}</answer>"


def _write_try(terms: list[Term], target: int) -> str:
    """Write the steps, the target again, and the verdict beside it: small models cannot compare distant numbers."""
    return f"{','.join(term.step for term in terms)}?{target}{'y' if terms[-1].value == target else 'n'}"


def _fresh_miss(numbers: list[int], target: int, rng: random.Random, known: set[str]) -> list[Term]:
    """Draw a miss that is not in `known`, or any miss if ten draws find no new one."""
    for _ in range(9):
        terms = miss(numbers, target, rng)
        if terms[-1].text not in known:
            return terms
    return miss(numbers, target, rng)
