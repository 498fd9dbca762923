"""The generated tasks: solvable, split without overlap, reproducible, and a teacher with the given error rate."""

import ast
import json
import operator
import random
import re
from fractions import Fraction
from itertools import combinations, permutations

import pytest

from actors.tasks.base import Problem, TaskConfig, is_held_out
from actors.tasks.text import arithmetic, countdown, knights_knaves, multiply

ENVIRONMENTS = {
    "arithmetic": arithmetic,
    "countdown": countdown,
    "knights_knaves": knights_knaves,
    "multiply": multiply,
}
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def make(name: str, **settings) -> tuple[list[Problem], list[Problem]]:
    config = TaskConfig(name=name, **{"num_train": 400, "num_held_out": 100, **settings})
    return ENVIRONMENTS[name].problems(config)


def evaluate(expression: str) -> Fraction:
    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.BinOp):
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        assert isinstance(node, ast.Constant)
        return Fraction(node.value)

    return value(ast.parse(expression, mode="eval").body)


def reachable(values: list[Fraction]) -> set[Fraction]:
    """Every value that a full expression over these numbers can have, in exact arithmetic."""
    if len(values) == 1:
        return {values[0]}
    found: set[Fraction] = set()
    for i, j in combinations(range(len(values)), 2):
        a, b = values[i], values[j]
        rest = [value for k, value in enumerate(values) if k not in (i, j)]
        results = {a + b, a - b, b - a, a * b} | ({a / b} if b else set()) | ({b / a} if a else set())
        for result in results:
            found |= reachable([*rest, result])
    return found


def split_key(name: str, problem: Problem) -> tuple[object, ...]:
    if name == "countdown":
        return tuple(sorted(json.loads(problem.gold)["numbers"]))
    if name == "knights_knaves":
        names = json.loads(problem.gold)["names"]
        renamings = [str.maketrans("".join(names), "".join(order)) for order in permutations(names)]
        said = problem.question.removesuffix("?")
        return min(tuple(sorted(said.translate(renaming).split(";"))) for renaming in renamings)
    return tuple(sorted(map(int, re.findall(r"\d+", problem.question))))


def answer_of(completion: str) -> str:
    found = re.fullmatch(r".*;(?:\\boxed\{(\d+)\}|<answer>([-+*/()0-9]+)</answer>)", completion)
    assert found, completion
    return found[1] or found[2]


def roles_of(completion: str) -> list[tuple[str, bool]]:
    found = re.fullmatch(r"<think>[^<]+</think><answer>([^<]+)</answer>", completion)
    assert found, completion
    lines = [re.fullmatch(r"\((\d)\) (\w+) is a (knight|knave)", line) for line in found[1].split("\n")]
    assert [line and line[1] for line in lines] == [str(number) for number in range(1, len(lines) + 1)]
    return [(line[2], line[3] == "knight") for line in lines if line]


def is_right(name: str, problem: Problem, completion: str) -> bool:
    if name == "knights_knaves":
        return roles_of(completion) == list(zip(*json.loads(problem.gold).values(), strict=True))
    answer = answer_of(completion)
    if name != "countdown":
        return answer == problem.gold
    gold = json.loads(problem.gold)
    assert sorted(map(int, re.findall(r"\d+", answer))) == gold["numbers"]
    return evaluate(answer) == gold["target"]


@pytest.mark.parametrize("name", ENVIRONMENTS)
class TestEveryEnvironment:
    def test_counts_ids_and_distinct_questions(self, name: str) -> None:
        train, held_out = make(name)
        assert [problem.prompt_id for problem in train + held_out] == list(range(500))
        assert len(train) == 400
        assert len({problem.question for problem in train + held_out}) == 500

    def test_the_split_does_not_overlap_even_between_seeds(self, name: str) -> None:
        train, held_out = make(name, seed=0)
        other_train, other_held_out = make(name, seed=1)
        assert train != other_train
        training_keys = {split_key(name, problem) for problem in train + other_train}
        assert training_keys.isdisjoint(split_key(name, problem) for problem in held_out + other_held_out)

    def test_the_same_config_gives_the_same_problems(self, name: str) -> None:
        assert make(name, seed=7) == make(name, seed=7)

    def test_a_flawless_teacher_is_always_right(self, name: str) -> None:
        train, held_out = make(name)
        rng = random.Random(0)
        for problem in train + held_out:
            assert is_right(name, problem, ENVIRONMENTS[name].teacher_trace(problem, rng, 0.0)), problem

    def test_traces_stay_within_the_declared_alphabet(self, name: str) -> None:
        train, _ = make(name)
        rng = random.Random(0)
        written = {c for p in train for c in ENVIRONMENTS[name].teacher_trace(p, rng, 0.5)}
        assert written <= set(ENVIRONMENTS[name].COMPLETION_ALPHABET)

    def test_asking_for_more_than_there_is_says_so(self, name: str) -> None:
        options = {
            "countdown": {"min_numbers": 2, "max_numbers": 2, "max_value": 4},
            "knights_knaves": {"max_people": 2},
            "multiply": {"first_digits": 1, "second_digits": 1},
        }
        with pytest.raises(ValueError, match=r"found only \d+ training .* lower task.num_train"):
            make(name, num_train=9000, options=options.get(name, {"digits": 1}))

    def test_options_are_checked(self, name: str) -> None:
        with pytest.raises(ValueError, match=f"task.options.colour is not an option of {name}; it has "):
            make(name, options={"colour": 1})
        option, (_, _, largest) = next(iter(ENVIRONMENTS[name].OPTIONS.items()))
        with pytest.raises(ValueError, match=f"task.options.{option} is {largest + 1}; {name} takes "):
            make(name, options={option: largest + 1})

    def test_generated_tasks_need_a_number_of_problems(self, name: str) -> None:
        with pytest.raises(ValueError, match=r"task\.num_train is 0"):
            make(name, num_train=0)


@pytest.mark.parametrize("digits", [1, 2, 5])
def test_addition_golds_and_digits(digits: int) -> None:
    train, _ = make("arithmetic", num_train=30, num_held_out=5, options={"digits": digits})
    for problem in train:
        found = re.fullmatch(r"(\d+)\+(\d+)=", problem.question)
        assert found and len(found[1]) == len(found[2]) == digits
        assert int(found[1]) + int(found[2]) == int(problem.gold)


def test_addition_trace_is_the_documented_one() -> None:
    trace = arithmetic.teacher_trace(Problem(0, "47+85=", "132"), random.Random(0), 0.0)
    assert trace == r"7+5=12;4+8+1=13;\boxed{132}"


def test_addition_teacher_errs_per_step() -> None:
    train, _ = make("arithmetic", num_train=4000)
    rng = random.Random(0)
    right = sum(is_right("arithmetic", p, arithmetic.teacher_trace(p, rng, 0.3)) for p in train) / len(train)
    # Both steps right, 0.49; two slips can cancel out only through the carry, which is rare.
    assert right == pytest.approx(0.49, abs=0.03)


def test_a_slip_in_addition_reaches_the_answer() -> None:
    rng = random.Random(1)
    for _ in range(300):
        trace = arithmetic.teacher_trace(Problem(0, "47+85=", "132"), rng, 0.5)
        found = re.fullmatch(r"7\+5=(\d+);4\+8(\+1)?=(\d+);\\boxed\{(\d+)\}", trace)
        assert found
        ones, carry, tens, answer = int(found[1]), bool(found[2]), int(found[3]), int(found[4])
        assert carry == (ones >= 10)
        assert answer == tens * 10 + ones % 10


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (3, 3), (3, 1)])
def test_multiplication_golds_and_digits(shape: tuple[int, int]) -> None:
    options = {"first_digits": shape[0], "second_digits": shape[1]}
    train, _ = make("multiply", num_train=20, num_held_out=2, options=options)
    for problem in train:
        found = re.fullmatch(r"(\d+)\*(\d+)=", problem.question)
        assert found and (len(found[1]), len(found[2])) == shape
        assert int(found[1]) * int(found[2]) == int(problem.gold)
        assert is_right("multiply", problem, multiply.teacher_trace(problem, random.Random(0), 0.0))


def test_multiplication_trace_is_the_documented_one() -> None:
    trace = multiply.teacher_trace(Problem(0, "36*47=", "1692"), random.Random(0), 0.0)
    assert trace == "36*7=252;36*4=144;252+1440=1692;<answer>1692</answer>"


def test_multiplication_teacher_errs_per_step() -> None:
    train, _ = make("multiply", num_train=4000)
    rng = random.Random(0)
    right = sum(is_right("multiply", p, multiply.teacher_trace(p, rng, 0.2)) for p in train) / len(train)
    assert right == pytest.approx(0.8**3, abs=0.04)


@pytest.mark.parametrize("num_numbers", [2, 3, 4])
def test_countdown_is_solvable_by_brute_force(num_numbers: int) -> None:
    counts = {"min_numbers": num_numbers, "max_numbers": num_numbers}
    train, held_out = make("countdown", num_train=60, num_held_out=20, options=counts)
    for problem in train + held_out:
        gold = json.loads(problem.gold)
        assert len(gold["numbers"]) == problem.level == num_numbers
        assert 1 <= gold["target"] <= 99 and all(1 <= number <= 9 for number in gold["numbers"])
        assert problem.question == f"{','.join(map(str, gold['numbers']))}={gold['target']}:"
        assert gold["target"] in reachable([Fraction(number) for number in gold["numbers"]])


def test_countdown_ranges_are_options() -> None:
    train, _ = make("countdown", num_train=50, num_held_out=5, options={"max_value": 100, "max_target": 999})
    assert max(max(json.loads(problem.gold)["numbers"]) for problem in train) > 9


def test_countdown_mixes_three_and_four_numbers() -> None:
    train, held_out = make("countdown", options={"max_numbers": 4, "max_value": 99})
    for side in (train, held_out):
        assert {len(json.loads(problem.gold)["numbers"]) for problem in side} == {3, 4}
        assert all(problem.level == len(json.loads(problem.gold)["numbers"]) for problem in side)
    assert sum(problem.level == 4 for problem in train) / len(train) == pytest.approx(0.5, abs=0.1)
    with pytest.raises(
        ValueError, match=r"task\.options\.min_numbers is 4, above task\.options\.max_numbers, which is 3"
    ):
        make("countdown", options={"min_numbers": 4})


def test_the_difficulty_filter_chooses_what_is_trained_on() -> None:
    train, held_out = make("countdown", options={"max_numbers": 4}, min_level=4)
    assert {problem.level for problem in train} == {4} and len(train) == 400
    assert {problem.level for problem in held_out} == {3, 4}
    with pytest.raises(ValueError, match=r"found only 0 training .* or widen task.options or the levels"):
        make("countdown", min_level=4)
    with pytest.raises(ValueError, match=r"task\.min_level is 5 and task\.max_level 4, which leaves no level"):
        TaskConfig(min_level=5, max_level=4)


@pytest.mark.parametrize("error_rate", [0.2, 0.5])
def test_countdown_teacher_gives_up_after_each_miss_at_the_error_rate(error_rate: float) -> None:
    train, _ = make("countdown", num_train=1500)
    rng = random.Random(0)
    right = sum(is_right("countdown", p, countdown.teacher_trace(p, rng, error_rate)) for p in train) / len(train)
    expected = [(1 - error_rate) ** num_misses for num_misses in range(countdown.MAX_MISSES + 1)]
    assert right == pytest.approx(sum(expected) / len(expected), abs=0.04)


def test_countdown_tries_reckon_correctly_and_answer_with_the_last() -> None:
    train, _ = make("countdown", num_train=1000)
    rng = random.Random(0)
    repeated = 0
    for problem in train:
        trace = countdown.teacher_trace(problem, rng, 0.3)
        target = json.loads(problem.gold)["target"]
        written = [one.partition("?") for one in trace.split(";")[:-1]]
        tries = [[step.split("=") for step in steps.split(",")] for steps, _, _ in written]
        assert [check for _, _, check in written[:-1]] == [f"{target}n"] * (len(tries) - 1)
        assert written[-1][2] == f"{target}{'y' if is_right('countdown', problem, trace) else 'n'}"
        assert 1 <= len(tries) <= countdown.MAX_MISSES + 1
        assert all(evaluate(step[0]) == int(step[1]) for steps in tries for step in steps)
        assert all(int(steps[-1][1]) != target for steps in tries[:-1])
        assert evaluate(answer_of(trace)) == int(tries[-1][-1][1])
        repeated += len({str(steps) for steps in tries}) < len(tries)
    assert repeated / len(train) < 0.05


def test_countdown_trace_is_the_documented_one() -> None:
    problem = Problem(0, "7,8=15:", '{"numbers": [7, 8], "target": 15}')
    traces = {countdown.teacher_trace(problem, random.Random(seed), 0.0) for seed in range(200)}
    assert "7+8=15?15y;<answer>7+8</answer>" in traces
    assert "8-7=1?15n;7+8=15?15y;<answer>7+8</answer>" in traces


def test_an_unsolvable_countdown_cannot_be_taught() -> None:
    problem = Problem(0, "1,1,1=99:", '{"numbers": [1, 1, 1], "target": 99}')
    with pytest.raises(ValueError, match="'1,1,1=99:' has no solution to teach"):
        for seed in range(20):
            countdown.teacher_trace(problem, random.Random(seed), 0.0)


def test_countdown_solve_agrees_with_brute_force() -> None:
    rng = random.Random(3)
    assert countdown.solve([3, 7, 12], 22, rng) is not None
    assert countdown.solve([1, 1, 1], 99, rng) is None
    assert Fraction(99) not in reachable([Fraction(1)] * 3)


def test_countdown_misses_even_where_every_try_could_hit() -> None:
    for seed in range(20):
        made = countdown.miss([1, 1], 1, random.Random(seed))
        assert made[-1].value != 1


@pytest.mark.parametrize("name", ["countdown", "multiply"])
def test_questions_in_words(name: str) -> None:
    train, _ = make(name, num_train=20, num_held_out=2, options={"words": 1})
    for problem in train:
        assert re.fullmatch(
            r"What is \d+ \* \d+\?|Using the numbers \[[\d, ]+\], create an equation that equals \d+\.",
            problem.question,
        )
        assert is_right(name, problem, ENVIRONMENTS[name].teacher_trace(problem, random.Random(0), 0.0))


def test_about_one_key_in_eight_is_held_out() -> None:
    share = sum(is_held_out(str(key)) for key in range(4000)) / 4000
    assert share == pytest.approx(1 / 8, abs=0.02)


@pytest.mark.parametrize("right", [0, 9, 10, 1692])
def test_a_slip_changes_exactly_one_digit(right: int) -> None:
    rng = random.Random(0)
    drawn = {str(multiply.slip(right, rng)) for _ in range(500)}
    for wrong in drawn:
        assert len(wrong) == len(str(right))
        assert sum(a != b for a, b in zip(wrong, str(right), strict=True)) == 1
    # Every digit was replaced by each of the nine others, except by a leading zero.
    assert len(drawn) == 9 * len(str(right)) - (len(str(right)) > 1)
