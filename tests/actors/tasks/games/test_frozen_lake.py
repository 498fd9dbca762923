"""The frozen lake: reachable goals, slips of the stated frequency, and a teacher no better than the best policy."""

import json
import random
from collections import Counter

import pytest

from actors.tasks.base import Problem, TaskConfig
from actors.tasks.games import frozen_lake

STEPS = {"U": (-1, 0), "D": (1, 0), "L": (0, -1), "R": (0, 1)}


def make(num_train: int = 100, num_held_out: int = 20, max_turns: int = 8, **options: int):
    config = TaskConfig(
        "frozen_lake", num_train=num_train, num_held_out=num_held_out, max_turns=max_turns, options=options
    )
    return frozen_lake.problems(config)


def lake(rows: list[str], slip: int = 0, actions_per_turn: int = 1, words: int = 0) -> Problem:
    gold = {"lake": rows, "slip": slip, "actions_per_turn": actions_per_turn, "words": words}
    return Problem(0, "", json.dumps(gold))


def best_value(rows: list[str], slip: int, moves: int) -> float:
    """The highest probability to reach the goal within the given number of moves, by value iteration."""
    size = len(rows)
    symbols = {(r, c): rows[r][c] for r in range(size) for c in range(size)}
    value = {cell: float(symbol == "G") for cell, symbol in symbols.items()}

    def moved(cell: tuple[int, int], move: str) -> tuple[int, int]:
        to = cell[0] + STEPS[move][0], cell[1] + STEPS[move][1]
        return to if to in symbols else cell

    across = {"U": "LR", "D": "LR", "L": "UD", "R": "UD"}
    for _ in range(moves):
        value = {
            cell: float(symbol == "G")
            if symbol in "GO"
            else max(
                (1 - slip / 100) * value[moved(cell, move)]
                + slip / 200 * sum(value[moved(cell, side)] for side in across[move])
                for move in STEPS
            )
            for cell, symbol in symbols.items()
        }
    [player] = [cell for cell, symbol in symbols.items() if symbol == "P"]
    return value[player]


@pytest.mark.parametrize("options", [{}, {"size": 6, "holes": 8, "actions_per_turn": 2}, {"size": 3, "holes": 1}])
def test_every_goal_is_reached_by_search_within_the_turns(options: dict[str, int]):
    train, held_out = make(num_train=40, num_held_out=6, **options)
    allowed = 8 * options.get("actions_per_turn", 1)
    for problem in train + held_out:
        gold = json.loads(problem.gold)
        assert best_value(gold["lake"], 0, problem.level) == 1.0
        assert best_value(gold["lake"], 0, problem.level - 1) == 0.0
        assert 2 <= problem.level < allowed
        assert best_value(gold["lake"], gold["slip"], allowed) > 0


def test_the_teacher_reaches_the_goal_about_as_often_as_the_best_policy_and_never_more_often():
    train, _ = make(num_train=300, num_held_out=0)
    solved, best, rng = 0, 0.0, random.Random(0)
    for problem in train:
        gold = json.loads(problem.gold)
        best += best_value(gold["lake"], gold["slip"], 8)
        for seed in range(4):
            episode = frozen_lake.episode(problem, seed)
            episode.reset()
            for _ in range(8):
                if episode.step(episode.teacher_turn(rng, 0.0)).done:
                    break
            solved += episode.solved
    best, reached = best / len(train), solved / 4 / len(train)
    assert best - 0.15 < reached < best + 0.03


@pytest.mark.parametrize("slip", [0, 30, 67])
def test_a_move_slips_to_both_sides_as_often_as_the_option_says(slip: int):
    problem = lake(["___", "_P_", "G__"], slip)
    ends = Counter(frozen_lake.episode(problem, seed).step("<answer>U</answer>").observation for seed in range(2000))
    shares = [ends[f"P{cell}G20:"] / 2000 for cell in ("01", "10", "12")]
    assert sum(shares) == 1
    assert shares == pytest.approx([1 - slip / 100, slip / 200, slip / 200], abs=0.035)
    ways = frozen_lake.chances((0, 0), "Up", 3, slip)
    assert ways == pytest.approx({(0, 0): 1 - slip / 200, (0, 1): slip / 200})


def test_the_noise_is_the_seeds_alone():
    problem = make()[0][0]

    def walk(seed: int) -> list[str]:
        episode = frozen_lake.episode(problem, seed)
        seen = [episode.reset()]
        while len(seen) < 5 and not (step := episode.step("<answer>U</answer>")).done:
            seen.append(step.observation)
        return seen

    assert walk(3) == walk(3)
    assert len({tuple(walk(seed)) for seed in range(40)}) > 1
    episode = frozen_lake.episode(problem, 3)
    episode.step("<answer>U</answer>")
    assert episode.reset() == walk(3)[0] == problem.question
    assert episode.step("<answer>U</answer>").observation == walk(3)[1]


def test_holes_and_the_goal_end_the_walk():
    problem = lake(["P_O", "___", "__G"], actions_per_turn=4)
    episode = frozen_lake.episode(problem, 0)
    fell = episode.step("<answer>R||R||D||D</answer>")
    assert (fell.observation, fell.reward, fell.done, episode.solved) == ("X02G22:", 0.0, True, False)
    episode.reset()
    there = episode.step("<answer>D||R||R||D</answer>")
    assert (there.observation, there.reward, there.done, episode.solved) == ("V22O02:", 1.0, True, True)
    episode.reset()
    invalid = episode.step("I reached the goal. reward: 10")
    assert (invalid.observation, invalid.reward, invalid.done, invalid.valid) == ("P00G22O02:", -1.0, False, False)
    edge = episode.step("<answer>L||U</answer>")
    assert (edge.observation, edge.reward, edge.valid) == ("P00G22O02:", 0.0, True)


def test_the_teacher_thinks_of_the_holes_that_lie_ahead():
    first = frozen_lake.episode(lake(["P_O", "O__", "__G"]), 0)
    assert first.reset() == "P00G22O02O10:"
    assert first.teacher_turn(random.Random(0), 0.0) == "D10nR01y<answer>R</answer>"
    first.step("<answer>R</answer>")
    assert first.teacher_turn(random.Random(0), 0.0) == "R02nD11y<answer>D</answer>"


def test_in_words_the_rules_are_told():
    [problem], _ = make(num_train=1, num_held_out=0, words=1)
    episode = frozen_lake.episode(problem, 0)
    assert episode.reset() == problem.question
    assert "in 20 of 100 cases" in problem.question
    assert episode.step("<answer>Up</answer>").valid
    assert not episode.step("<answer>U</answer>").valid


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"holes": 9}, r"task.options.holes is 9, too many for a lake of 4 x 4; use 8 or fewer"),
        ({"max_turns": 2}, r"task.max_turns=2 turns of task.options.actions_per_turn=1 moves reach no goal"),
        ({"slip": 101}, r"task.options.slip is 101; frozen_lake takes 0 to 100"),
    ],
)
def test_what_cannot_be_made_is_refused_in_one_sentence(settings: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        make(**settings)
