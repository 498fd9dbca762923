r"""Knights and knaves (Logic-RL): who of 2 to 8 people always tells the truth, and who always lies?

Every puzzle has exactly one solution, found by search. In the short notation (`words` 0, for small models),
`A:B-;B:A+|C-;C:!A+?` means: A says B is a knave; B says A is a knight or C is a knave; C says A is not a knight. The
other signs are `&` and, `>` if-then, `~` if and only if. With `words` 1, the puzzle is told in English. With
`data_path`, puzzles are read from there: `quiz`, `names`, and `solution`, a list of bool.

Options: `min_people` and `max_people` (default 2 and 3), each number equally often; `words`. The level is the number of
people.

The teacher tries the worlds in order, each up to the first statement that does not fit its speaker:
`<think>A+B+0n;A+B-1y1|0y</think><answer>(1) A is a knight\n(2) B is a knave</answer>`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence

from actors.tasks.base import Drawn, Problem, TaskConfig, draw_problems, read_options, read_range
from actors.tasks.datasets.records import comparable, read_problems
from actors.tasks.datasets.sources import Row
from actors.tasks.text.knights_knaves_logic import (
    LETTERS,
    Claim,
    Statement,
    World,
    draw_puzzle,
    parse_puzzle,
    shape,
    worlds,
    write_puzzle,
    written,
)

OPTIONS = {"min_people": (2, 2, 8), "max_people": (3, 2, 8), "words": (0, 0, 1)}
COMPLETION_ALPHABET = "<think>/answer ABCDEFGH+-01!&|>~yn;()12345678isavegk\n"
NAMES = (
    *("Ada", "Boris", "Clara", "Darius", "Elena", "Felix", "Greta", "Hugo", "Ines", "Jonas", "Kira", "Leon"),
    *("Marta", "Nils", "Olga", "Pavel", "Rosa", "Samuel", "Tilda", "Ursula", "Victor", "Wanda", "Yusuf", "Zora"),
)
SPEECH = (
    "{name} said that {statement}.",
    'In the words of {name}: "{statement}".',
    "{name} claims that {statement}.",
    '"{statement}", {name} declared.',
    "According to {name}, {statement}.",
    'You hear {name} say: "{statement}".',
)


def problems(config: TaskConfig) -> tuple[list[Problem], list[Problem]]:
    """Draw or read (training, held-out) problems.

    Puzzles that differ only in names and order are on the same side of the split.

    The gold is a JSON object: {"names": [text, ...], "is_knight": [bool, ...]}.

    Raises:
        ValueError: an unknown option, a value out of range, too few distinct problems, or rows without these fields.
    """
    options = read_options(config, OPTIONS)
    fewest, most = read_range(options, "min_people", "max_people")
    if config.data_path:
        return read_problems(config, _read_row)

    def draw(rng: random.Random) -> Drawn:
        num_people = rng.randint(fewest, most)
        puzzle, world = draw_puzzle(num_people, rng)
        names = rng.sample(NAMES, num_people) if options["words"] else list(LETTERS[:num_people])
        question = tell(puzzle, names, rng) if options["words"] else write_puzzle(puzzle)
        return Drawn(shape(puzzle), question, _gold(names, world), num_people)

    return draw_problems(config, draw)


def _gold(names: Sequence[str], world: Sequence[bool]) -> str:
    return json.dumps({"names": list(names), "is_knight": list(world)})


def _read_row(row: Row) -> Drawn:
    quiz, names, solution = (row.field(name) for name in ("quiz", "names", "solution"))
    lists_are_sound = (
        isinstance(names, list)
        and isinstance(solution, list)
        and len(names) == len(solution) > 0
        and all(isinstance(name, str) for name in names)
        and all(isinstance(is_knight, bool) for is_knight in solution)
    )
    if not isinstance(quiz, str) or not lists_are_sound:
        raise ValueError(
            f"{row.where}: knights_knaves reads quiz, a text, and names and solution, a name and a bool per person, not"
            f" {str(names)[:60]} and {str(solution)[:60]}"
        )
    return Drawn(comparable(quiz), quiz, _gold(names, solution), len(names))


# --- in English ------------------------------------------------------------------------------------------------------


def tell(puzzle: Sequence[Statement], names: Sequence[str], rng: random.Random) -> str:
    """Tell the puzzle as a story."""
    listed = f"{', '.join(names[:-1])} and {names[-1]}"
    said = " ".join(
        rng.choice(SPEECH).format(name=name, statement=_phrase(statement, names))
        for name, statement in zip(names, puzzle, strict=True)
    )
    return (
        "On an island everyone is either a knight, who always tells the truth, or a knave, who always lies. You meet"
        f" {len(names)} of its people: {listed}. {said} Who is a knight and who is a knave?"
    )


def _phrase(statement: Statement, names: Sequence[str]) -> str:
    def of(claim: Claim) -> str:
        return f"{names[claim.person]} is a {_kind(claim.is_knight)}"

    first, last = of(statement.claims[0]), of(statement.claims[-1])
    match statement.form:
        case "is":
            return first
        case "not":
            return first.replace(" is ", " is not ", 1)
        case "if":
            return f"if {first} then {last}"
        case "iff":
            return f"{first} if and only if {last}"
    return f"{first} {statement.form} {last}"


def _kind(is_knight: bool) -> str:
    return "knight" if is_knight else "knave"


# --- the teacher -----------------------------------------------------------------------------------------------------


def teacher_trace(problem: Problem, rng: random.Random, error_rate: float) -> str:
    """Write the worlds up to the first that seems to fit, and that world as the answer; if none does, the last world.

    Each check of a statement is wrong with probability `error_rate`.

    Raises:
        ValueError: the puzzle is not in the short notation.
    """
    if not problem.question.endswith("?") or ":" not in problem.question[:2]:
        raise ValueError(
            "knights_knaves has a teacher to pretrain from only for puzzles in short; set task.options.words=0 and"
            " leave data.path out, or give a model of your own, model.path=FOLDER"
        )
    puzzle = parse_puzzle(problem.question)
    tried: list[str] = []
    for world in worlds(len(puzzle)):
        checks, fits = _check(puzzle, world, rng, error_rate)
        tried.append(f"{''.join(str(Claim(i, is_knight)) for i, is_knight in enumerate(world))}{checks}")
        if fits:
            break
    return f"<think>{';'.join(tried)}</think><answer>{answer(LETTERS, world)}</answer>"


def _check(puzzle: Sequence[Statement], world: World, rng: random.Random, error_rate: float) -> tuple[str, bool]:
    """Return (checks, whether all are y).

    A check is the truth of a statement's claims, then y if the statement fits its speaker, else n. The checks end with
    the first n.
    """
    checks = ""
    for statement, is_knight in zip(puzzle, world, strict=True):
        fits = statement.holds(world) is is_knight
        if rng.random() < error_rate:
            fits = not fits
        truths = [str(int(claim.holds(world))) for claim in statement.claims]
        checks += f"{written(statement.form, truths)}{'y' if fits else 'n'}"
        if not fits:
            return checks, False
    return checks, True


def answer(names: Sequence[str], world: World) -> str:
    r"""Write the answer: `(1) Ada is a knight\n(2) Boris is a knave`."""
    kinds = (f"{name} is a {_kind(is_knight)}" for name, is_knight in zip(names, world, strict=False))
    return "\n".join(f"({number}) {kind}" for number, kind in enumerate(kinds, start=1))
