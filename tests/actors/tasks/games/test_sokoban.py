"""Sokoban's levels, moves and rewards, each compared with a second implementation."""

import json
import random
from collections import deque

import pytest

from actors.tasks.base import Problem, TaskConfig
from actors.tasks.games import sokoban
from actors.tasks.games.grid import MOVES, canonical
from actors.tasks.games.sokoban_board import read_board

STEPS = {"U": (-1, 0), "D": (1, 0), "L": (0, -1), "R": (0, 1)}


def make(num_train: int = 150, num_held_out: int = 30, max_turns: int = 4, **options: int):
    config = TaskConfig("sokoban", num_train=num_train, num_held_out=num_held_out, max_turns=max_turns, options=options)
    return sokoban.problems(config)


def push(rows: list[str], move: str) -> list[str]:
    """The board after a move, by editing its symbols."""
    cells = {(r, c): symbol for r, row in enumerate(rows) for c, symbol in enumerate(row)}
    [player] = [cell for cell, symbol in cells.items() if symbol in "PS"]
    down, right = STEPS[move]
    ahead, beyond = ((player[0] + i * down, player[1] + i * right) for i in (1, 2))
    moving = [(player, ahead, "PS", "_O")]
    if cells[ahead] in "XV":
        if cells.get(beyond, "#") not in "_O":
            return rows
        moving.insert(0, (ahead, beyond, "XV", "_O"))
    elif cells[ahead] not in "_O":
        return rows
    for origin, to, (plain, on_target), (floor, target) in moving:
        cells[to] = on_target if cells[to] == target else plain
        cells[origin] = target if cells[origin] == on_target else floor
    return ["".join(cells[r, c] for c in range(len(rows))) for r in range(len(rows))]


def shortest(rows: list[str]) -> str:
    """The fewest moves that solve a board, by breadth-first search forwards."""
    queue, seen = deque([(rows, "")]), {tuple(rows)}
    while queue:
        board, moves = queue.popleft()
        if not any("X" in row for row in board):
            return moves
        for move in STEPS:
            following = push(board, move)
            if tuple(following) not in seen:
                seen.add(tuple(following))
                queue.append((following, moves + move))
    raise AssertionError(f"no solution of {rows}")


@pytest.mark.parametrize(
    "options", [{}, {"size": 7, "boxes": 2, "depth": 10, "walls": 3}, {"depth": 12, "actions_per_turn": 4, "walls": 0}]
)
def test_brute_force_solves_every_level_within_its_turns(options: dict[str, int]):
    train, held_out = make(num_train=20 if "boxes" in options else 60, num_held_out=6, **options)
    per_turn = options.get("actions_per_turn", 3)
    for problem in train + held_out:
        gold = json.loads(problem.gold)
        moves = shortest(gold["board"])
        # A problem's level is its fewest moves, and at most the depth that was asked for.
        assert 1 <= len(moves) == problem.level <= options.get("depth", 6) <= 4 * per_turn
        episode = sokoban.episode(problem, seed=0)
        episode.reset()
        turns = [moves[i : i + per_turn] for i in range(0, len(moves), per_turn)]
        steps = [episode.step(f"<answer>{'||'.join(turn)}</answer>") for turn in turns]
        assert [step.done for step in steps] == [False] * (len(turns) - 1) + [True]
        assert episode.solved
        boxes = sum(row.count("X") for row in gold["board"])
        assert sum(step.reward for step in steps) == pytest.approx(10 + boxes - 0.1 * len(moves))


def test_moves_agree_with_the_symbols_on_the_board():
    rng = random.Random(0)
    for problem in make(num_train=40, num_held_out=0, boxes=2, size=7, depth=8, walls=3)[0]:
        board, state = read_board(json.loads(problem.gold)["board"])
        rows = board.rows(state)
        for _ in range(30):
            move = rng.choice(sorted(MOVES))
            state = board.after(state, move)
            rows = push(rows, move[0])
            assert board.rows(state) == rows


def test_levels_are_the_same_for_the_same_seed_and_no_turned_one_is_on_the_other_side():
    assert make() == make()
    config = TaskConfig("sokoban", num_train=150, num_held_out=30, max_turns=4, seed=1)
    assert sokoban.problems(config) != make()
    train, held_out = make()
    images = [{canonical(json.loads(p.gold)["board"]) for p in side} for side in (train, held_out)]
    assert not images[0] & images[1]
    assert {problem.level for problem in train} == {1, 2, 3, 4, 5, 6}


LEVEL = Problem(0, "", json.dumps({"board": ["#####", "#P__#", "#_XO#", "#___#", "#####"], "depth": 4} | {
    "actions_per_turn": 2, "words": 0,
}))  # fmt: skip


def test_rewards_are_those_of_the_table():
    episode = sokoban.episode(LEVEL, 0)
    assert episode.reset() == "P11X22O23:"
    assert episode.step("<answer>U</answer>").reward == pytest.approx(-0.1)
    blocked = episode.step("<answer>U||U</answer>")
    assert (blocked.observation, blocked.reward, blocked.valid) == ("P11X22O23:", pytest.approx(-0.2), True)
    invalid = episode.step("<answer>U||U||U</answer>")
    assert (invalid.observation, invalid.reward, invalid.valid) == ("P11X22O23:", -1.0, False)
    # The second move of the turn is ignored, because the first one solves the problem.
    episode.step("<answer>D</answer>")
    solved = episode.step("<answer>R||L</answer>")
    assert (solved.observation, solved.reward, solved.done) == ("P22V23:", pytest.approx(10.9), True)
    assert episode.solved
    assert episode.reset() == "P11X22O23:"
    assert not episode.solved


def test_a_box_off_its_target_costs_what_it_paid():
    board = ["######", "#PV_O#", "#_X__#", "#____#", "#____#", "######"]
    gold = json.dumps({"board": board, "depth": 9, "actions_per_turn": 1, "words": 0})
    episode = sokoban.episode(Problem(0, "", gold), 0)
    off = episode.step("<answer>R</answer>")
    assert (off.observation, off.reward) == ("S12X13X22O14:", pytest.approx(-1.1))
    assert episode.step("<answer>R</answer>").reward == pytest.approx(0.9)


def test_a_teacher_without_errors_takes_the_shortest_way_and_its_errors_are_as_often_as_asked():
    train, _ = make(num_train=300, num_held_out=0, max_turns=3)
    turns, rng = [], random.Random(0)
    for problem in train:
        episode = sokoban.episode(problem, 0)
        episode.reset()
        written = []
        while not episode.solved:
            written.append(episode.teacher_turn(rng, 0.0))
            episode.step(written[-1])
        turns.append(written)
        assert sum(turn.count("||") + 1 for turn in written) == problem.level
    noisy = sum(sokoban.episode(p, 0).teacher_turn(rng, 0.4) != t[0] for p, t in zip(train, turns, strict=True))
    assert 0.3 < noisy / len(train) < 0.8


def test_the_teacher_thinks_of_its_next_push_and_where_it_is_made_from():
    episode = sokoban.episode(LEVEL, 0)
    written = []
    while not episode.solved:
        written.append(episode.teacher_turn(random.Random(0), 0.0))
        episode.step(written[-1])
    assert written == ["R21<answer>D||R</answer>"]
    assert episode.teacher_turn(random.Random(0), 0.0) == "<answer></answer>"


def test_in_words_the_rules_are_told_and_the_whole_board_is_shown():
    [problem], _ = make(num_train=1, num_held_out=0, words=1)
    episode = sokoban.episode(problem, 0)
    assert episode.reset() == problem.question
    assert problem.question.startswith("You play Sokoban") and "1 to 3 moves" in problem.question
    assert problem.question.endswith("\n".join(json.loads(problem.gold)["board"]))
    assert episode.step("<answer>U</answer>").observation.startswith("Give valid moves.\n######")
    assert episode.step("<answer>Up || Up</answer>").valid


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_turns": 1, "depth": 4}, r"depth is 4, but task.max_turns=1 turns of .*=3 moves are only 3; raise one"),
        ({"size": 5, "walls": 4}, r"walls=4 and boxes=1 fill more than half of the 9 cells inside a board of .*size=5"),
        ({"boxes": 9}, r"task.options.boxes is 9; sokoban takes 1 to 3"),
        ({"num_train": 5000, "size": 5, "walls": 0}, r"sokoban found only \d+ training"),
    ],
)
def test_what_cannot_be_made_is_refused_in_one_sentence(settings: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message) as refused:
        make(**settings)
    assert "\n" not in str(refused.value)
