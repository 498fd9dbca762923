"""Knights and knaves: exactly one solution, by an independent search; short notation, English, and data files."""

import json
import random
import re
from itertools import product

import pytest

from actors.tasks.base import Problem, TaskConfig
from actors.tasks.text import knights_knaves
from actors.tasks.text.knights_knaves_logic import Claim, Statement, parse_puzzle, shape, write_puzzle

JOINED = {"&": lambda a, b: a and b, "|": lambda a, b: a or b, ">": lambda a, b: b or not a, "~": lambda a, b: a == b}
SPOKEN = {" if and only if ": "~", " and ": "&", " or ": "|"}
SPEECHES = (
    r"(\w+) said that (.+)\.",
    r'In the words of (\w+): "(.+)"\.',
    r"(\w+) claims that (.+)\.",
    r'"(?P<said>.+)", (?P<name>\w+) declared\.',
    r"According to (\w+), (.+)\.",
    r'You hear (\w+) say: "(.+)"\.',
)


def make(**settings) -> tuple[list[Problem], list[Problem]]:
    config = TaskConfig(name="knights_knaves", **{"num_train": 150, "num_held_out": 30, **settings})
    return knights_knaves.problems(config)


def is_true(statement: str, world: dict[str, bool]) -> bool:
    """The truth of a statement in the short notation, by an independent parser: `!B+`, `B+`, `B+&C-`."""
    if statement[0] == "!":
        return not is_true(statement[1:], world)
    if len(statement) == 2:
        return world[statement[0]] == (statement[1] == "+")
    return JOINED[statement[2]](is_true(statement[:2], world), is_true(statement[3:], world))


def fitting(statements: dict[str, str]) -> list[dict[str, bool]]:
    """Every assignment in which knights, and only they, tell the truth."""
    worlds = (dict(zip(statements, world, strict=True)) for world in product((True, False), repeat=len(statements)))
    return [w for w in worlds if all(is_true(said, w) is w[name] for name, said in statements.items())]


def heard(question: str, names: list[str]) -> dict[str, str]:
    """The statements of an English puzzle in the short notation, with the names' initials."""
    initial = {name: name[0] for name in names}
    body = question.partition(f"and {names[-1]}. ")[2].removesuffix(" Who is a knight and who is a knave?")
    said: dict[str, str] = {}
    for speech in re.split(r"(?<=\.) ", body):
        found = next(found for pattern in SPEECHES if (found := re.fullmatch(pattern, speech)))
        name, sentence = (found["name"], found["said"]) if "name" in found.groupdict() else found.groups()
        said[initial[name]] = short(sentence, initial)
    assert list(said) == list(initial.values())
    return said


def short(sentence: str, initial: dict[str, str]) -> str:
    if sentence.startswith("if "):
        first, last = sentence.removeprefix("if ").split(" then ")
        return f"{short(first, initial)}>{short(last, initial)}"
    for spoken, sign in SPOKEN.items():
        if spoken in sentence:
            return sign.join(short(part, initial) for part in sentence.split(spoken))
    found = re.fullmatch(r"(\w+) is (not )?a (knight|knave)", sentence)
    assert found, sentence
    return f"{'!' if found[2] else ''}{initial[found[1]]}{'+' if found[3] == 'knight' else '-'}"


def test_every_puzzle_in_short_has_exactly_the_gold_as_solution() -> None:
    train, held_out = make(num_train=300, options={"max_people": 8})
    assert {problem.level for problem in train} == set(range(2, 9))
    for problem in train + held_out:
        gold = json.loads(problem.gold)
        statements = dict(part.split(":") for part in problem.question.removesuffix("?").split(";"))
        assert list(statements) == gold["names"] and len(statements) == problem.level
        assert fitting(statements) == [dict(zip(gold["names"], gold["is_knight"], strict=True))]
    said = "".join(problem.question for problem in train)
    assert all(sign in said for sign in "!&|>~")


def test_every_puzzle_in_english_says_the_same_and_has_one_solution() -> None:
    train, _ = make(options={"max_people": 5, "words": 1})
    checked = 0
    for problem in train:
        gold = json.loads(problem.gold)
        if len({name[0] for name in gold["names"]}) == problem.level:
            world = {name[0]: is_knight for name, is_knight in zip(gold["names"], gold["is_knight"], strict=True)}
            assert fitting(heard(problem.question, gold["names"])) == [world], problem.question
            checked += 1
    assert checked > 100


def test_a_puzzle_is_read_as_it_is_written() -> None:
    puzzle = [Statement("not", (Claim(1, False),)), Statement("if", (Claim(2, True), Claim(0, False)))]
    assert write_puzzle(puzzle) == "A:!B-;B:C+>A-?"
    assert parse_puzzle("A:!B-;B:C+>A-?") == puzzle
    with pytest.raises(ValueError, match="'Z9' is no claim"):
        parse_puzzle("A:Z9?")


def test_puzzles_that_differ_in_order_alone_have_one_shape() -> None:
    assert shape(parse_puzzle("A:B-;B:A+&B-?")) == shape(parse_puzzle("A:A-&B+;B:A-?"))
    assert shape(parse_puzzle("A:A+>B-;B:A+?")) != shape(parse_puzzle("A:B->A+;B:A+?"))
    train, held_out = make(options={"max_people": 4})
    unseen = {shape(parse_puzzle(problem.question)) for problem in held_out}
    assert unseen.isdisjoint(shape(parse_puzzle(problem.question)) for problem in train)


def test_the_documented_trace() -> None:
    problem = Problem(0, "A:B-;B:A-|B+?", '{"names": ["A", "B"], "is_knight": [false, true]}')
    assert knights_knaves.teacher_trace(problem, random.Random(0), 0.0) == (
        "<think>A+B+0n;A+B-1y0|0y</think><answer>(1) A is a knight\n(2) B is a knave</answer>"
    )


def test_the_teacher_errs_per_check_and_answers_with_what_it_took_or_tried_last() -> None:
    train, _ = make(num_train=1000)
    rng, right = random.Random(0), 0
    for problem in train:
        trace = knights_knaves.teacher_trace(problem, rng, 0.1)
        # The trace fits into the embedded model's context behind the prompt.
        assert len(trace) <= 220
        answer = trace.partition("<answer>")[2]
        last = re.findall(r"(?:[A-C][+-])+", trace.partition("</think>")[0])[-1]
        assert [line[4] + "-+"["knight" in line] for line in answer.removesuffix("</answer>").split("\n")] == (
            re.findall(r"[A-C][+-]", last)
        )
        right += answer == knights_knaves.teacher_trace(problem, rng, 0.0).partition("<answer>")[2]
    assert 0.3 < right / len(train) < 0.7


def test_puzzles_in_english_have_no_teacher() -> None:
    train, _ = make(num_train=5, num_held_out=1, options={"words": 1})
    with pytest.raises(ValueError, match=r"only for puzzles in short; set task\.options\.words=0 and leave data\.path"):
        knights_knaves.teacher_trace(train[0], random.Random(0), 0.0)


def test_puzzles_of_a_file(tmp_path) -> None:
    rows = [
        {
            "quiz": f"Puzzle {i}?",
            "names": ["Ann", "Bob", "Cid"][: 2 + i % 2],
            "solution": [True, False, True][: 2 + i % 2],
        }
        for i in range(6)
    ]
    path = tmp_path / "puzzles.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    train, held_out = make(data_path=str(path), num_train=0, num_held_out=2, min_level=3)
    assert [problem.question for problem in train] == ["Puzzle 1?", "Puzzle 3?"]
    assert json.loads(train[0].gold) == {"names": ["Ann", "Bob", "Cid"], "is_knight": [True, False, True]}
    assert [problem.level for problem in held_out] == [2, 3]
    rows[3]["solution"] = [True, "no", True]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(ValueError, match=r"puzzles\.jsonl line 4: knights_knaves reads quiz, a text, and names"):
        make(data_path=str(path), num_train=0, num_held_out=2)
