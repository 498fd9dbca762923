"""The logic of knights, who tell the truth, and knaves, who lie: statements, worlds, and the search for solutions.

A world says for every person, by number, whether the person is a knight. A puzzle has one statement per person, in
order.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

World = tuple[bool, ...]

SIGNS = {"not": "!", "and": "&", "or": "|", "if": ">", "iff": "~"}
"""The sign of each form of statement in the short notation."""
LETTERS = "ABCDEFGH"


@dataclass(frozen=True, slots=True)
class Claim:
    """The claim that a person is a knight, or a knave."""

    person: int
    is_knight: bool

    def holds(self, world: World) -> bool:
        """Return whether the claim is true in `world`."""
        return world[self.person] is self.is_knight

    def __str__(self) -> str:
        return f"{LETTERS[self.person]}{'+' if self.is_knight else '-'}"


@dataclass(frozen=True, slots=True)
class Statement:
    """One person's statement: a claim, its negation, or two claims joined."""

    form: str
    """One claim: is, not. Claims about two different people: and, or, if, iff."""
    claims: tuple[Claim, ...]

    def holds(self, world: World) -> bool:
        """Return whether the statement is true in `world`."""
        first, last = self.claims[0].holds(world), self.claims[-1].holds(world)
        match self.form:
            case "is":
                return first
            case "not":
                return not first
            case "and":
                return first and last
            case "or":
                return first or last
            case "if":
                return not first or last
        return first is last

    def __str__(self) -> str:
        return written(self.form, [str(claim) for claim in self.claims])


def written(form: str, parts: Sequence[str]) -> str:
    """Join the parts of a statement by its sign: `B+&C-`, `!B+`, `B+`."""
    return f"{SIGNS[form]}{parts[0]}" if form == "not" else SIGNS.get(form, "").join(parts)


def fits(puzzle: Sequence[Statement], world: World) -> bool:
    """Return whether exactly the statements of the knights are true."""
    return all(statement.holds(world) is is_knight for statement, is_knight in zip(puzzle, world, strict=True))


def solutions(puzzle: Sequence[Statement]) -> list[World]:
    """Return every world that fits the puzzle, out of all 2^n."""
    return [world for world in worlds(len(puzzle)) if fits(puzzle, world)]


def worlds(num_people: int) -> list[World]:
    """Return all worlds, from all knights to all knaves."""
    return list(product((True, False), repeat=num_people))


def draw_puzzle(num_people: int, rng: random.Random) -> tuple[list[Statement], World]:
    """Draw a random puzzle with exactly one solution. Returns the puzzle and its solution."""
    while True:
        puzzle = [_draw_statement(speaker, num_people, rng) for speaker in range(num_people)]
        found = solutions(puzzle)
        if len(found) == 1:
            return puzzle, found[0]


def _draw_statement(speaker: int, num_people: int, rng: random.Random) -> Statement:
    form = rng.choice(("is", *SIGNS))
    if form in ("is", "not"):
        # Not about the speaker: every speaker would call themselves a knight.
        people = [rng.choice([person for person in range(num_people) if person != speaker])]
    else:
        people = rng.sample(range(num_people), 2)
    return Statement(form, tuple(Claim(person, rng.random() < 0.5) for person in people))


def shape(puzzle: Sequence[Statement]) -> str:
    """Return a key that is equal for puzzles that differ only in the people's order or names."""

    def of_one(speaker: int, statement: Statement) -> str:
        parts = [f"{'me' if c.person == speaker else 'other'}{'+' if c.is_knight else '-'}" for c in statement.claims]
        # Only `if` depends on the order of its claims.
        return written(statement.form, parts if statement.form == "if" else sorted(parts))

    return ";".join(sorted(of_one(speaker, statement) for speaker, statement in enumerate(puzzle)))


def write_puzzle(puzzle: Sequence[Statement]) -> str:
    """Write the puzzle in the short notation: `A:B-;B:A+&C-;C:!A+?`."""
    return ";".join(f"{LETTERS[i]}:{statement}" for i, statement in enumerate(puzzle)) + "?"


def parse_puzzle(text: str) -> list[Statement]:
    """Read a puzzle in the short notation; the inverse of `write_puzzle`.

    Raises:
        ValueError: the text is not in the short notation.
    """
    return [_parse_statement(part.partition(":")[2]) for part in text.removesuffix("?").split(";")]


def _parse_statement(text: str) -> Statement:
    for form, sign in SIGNS.items():
        if sign in text:
            return Statement(form, tuple(_parse_claim(part) for part in text.split(sign) if part))
    return Statement("is", (_parse_claim(text),))


def _parse_claim(text: str) -> Claim:
    if len(text) != 2 or text[0] not in LETTERS or text[1] not in "+-":
        raise ValueError(f"{text!r} is no claim; write a letter and + or -, as in B-")
    return Claim(LETTERS.index(text[0]), text[1] == "+")
