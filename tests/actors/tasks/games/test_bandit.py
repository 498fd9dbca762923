"""The bandit: hidden probabilities, payoffs from the episode's seed, and what a policy can learn."""

import json
import random

import pytest

from actors.tasks.base import Problem, TaskConfig
from actors.tasks.games import bandit


def make(num_train: int = 300, num_held_out: int = 40, max_turns: int = 6, **options: int):
    config = TaskConfig("bandit", num_train=num_train, num_held_out=num_held_out, max_turns=max_turns, options=options)
    return bandit.problems(config)


def machine(pulls: int = 3, words: int = 0, **chances: int) -> Problem:
    return Problem(0, ",".join(chances) + ":", json.dumps({"chances": chances, "pulls": pulls, "words": words}))


def test_chances_are_hidden_distinct_and_split_without_overlap():
    train, held_out = make(arms=3)
    assert make(arms=3) == (train, held_out)
    keys = []
    for side in (train, held_out):
        found = [json.loads(problem.gold)["chances"] for problem in side]
        for problem, chances in zip(side, found, strict=True):
            assert problem.question == ",".join(chances) + ":"
            best, following, _ = sorted(chances.values(), reverse=True)
            assert best - following >= 30
        keys.append({json.dumps(chances, sort_keys=True) for chances in found})
    assert not keys[0] & keys[1]


@pytest.mark.parametrize("dragon_best", [0, 70, 100])
def test_the_dragon_is_best_as_often_as_the_option_says(dragon_best: int):
    train, _ = make(num_train=800, num_held_out=0, dragon_best=dragon_best)
    found = [json.loads(problem.gold)["chances"] for problem in train]
    share = sum(max(chances, key=chances.get) == "dragon" for chances in found) / len(found)
    assert share == pytest.approx(dragon_best / 100, abs=0.05)


def test_an_arm_pays_as_often_as_its_chance_says():
    paid = 0.0
    for seed in range(2000):
        episode = bandit.episode(machine(dragon=80, phoenix=10), seed)
        paid += episode.step("<answer>dragon</answer>").reward
    assert paid / 2000 == pytest.approx(0.8, abs=0.03)


def test_an_episode_is_its_pulls_and_is_solved_by_the_last_one():
    episode = bandit.episode(machine(dragon=100, phoenix=0), 0)
    assert episode.reset() == "dragon,phoenix:"
    first = episode.step("<answer>phoenix</answer>")
    assert (first.observation, first.reward, first.done) == ("0:", 0.0, False)
    # Only a readable turn is a pull.
    for text in ("1:", "reward: 10", "<answer>kraken</answer>", "<answer>dragon||dragon</answer>"):
        invalid = episode.step(text)
        assert (invalid.observation, invalid.reward, invalid.done, invalid.valid) == (
            "dragon,phoenix:",
            -1,
            False,
            False,
        )
    second = episode.step("<answer>dragon</answer>")
    assert (second.observation, second.reward, second.done, episode.solved) == ("1:", 1.0, False, False)
    assert episode.step("<answer>dragon</answer>").done
    assert episode.solved
    episode.reset()
    for arm in ("dragon", "dragon", "phoenix"):
        last = episode.step(f"<answer>{arm}</answer>")
    assert last.done and not episode.solved


def test_trying_out_beats_what_is_known_beforehand():
    train, _ = make(num_train=600, num_held_out=0)
    rng, solved = random.Random(0), 0
    for problem in train:
        episode = bandit.episode(problem, rng.getrandbits(32))
        while not episode.step(episode.teacher_turn(rng, 0.0)).done:
            pass
        solved += episode.solved
    # Always choosing the dragon would be correct in 70 of 100 problems.
    assert solved / len(train) > 0.8


def test_in_words_the_machine_is_described():
    [problem], _ = make(num_train=1, num_held_out=0, words=1, arms=2)
    episode = bandit.episode(problem, 0)
    assert episode.reset() == problem.question
    assert "2 arms" in problem.question and "6 times" in problem.question
    assert episode.step("<answer>Dragon</answer>").observation in (
        "You pulled dragon: it paid 0.",
        "You pulled dragon: it paid 1.",
    )


def test_more_pulls_than_turns_are_refused():
    with pytest.raises(ValueError, match=r"task.options.pulls is 7, but task.max_turns=6 allows fewer; raise it"):
        make(pulls=7)
