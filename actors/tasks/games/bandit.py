"""Bandit: every arm pays 1 with a hidden probability, 0 otherwise. Solved: the last pull is of the best arm.

The probabilities are drawn for every problem, so the model has to find the best arm by pulling. The dragon is the best
arm in `dragon_best` percent of the problems; with a single pull, only this can be learned. The episode's seed decides
the payoffs. The reward of a turn is the payoff of its pull, or -1 without a readable action.

Options: `arms`; `pulls`, at most `task.max_turns`; `dragon_best`, in percent; `words`, where 1 asks in English
sentences. With `words` 0, the question `phoenix,dragon:` is answered `<answer>dragon</answer>`, and the observation
`1:` or `0:` is the payoff.
"""

from __future__ import annotations

import json
import random
from collections import Counter

from actors.tasks.base import Drawn, Problem, TaskConfig, draw_problems, read_options
from actors.tasks.games.actions import ALPHABET, INVALID_REWARD, noisy, read_actions, write_actions
from actors.tasks.games.episode import Step

OPTIONS = {"arms": (2, 2, 6), "pulls": (6, 1, 100), "dragon_best": (70, 0, 100), "words": (0, 0, 1)}
ARMS = ("dragon", "phoenix", "griffin", "unicorn", "kraken", "sphinx")
COMPLETION_ALPHABET = "".join(sorted(set("".join(ARMS)))) + ALPHABET + ",:01"
SMALLEST_GAP = 30
"""Smallest difference between the two best arms, in percent; a few pulls would not reveal a smaller one."""
RULES = (
    "You play a slot machine with {number} arms: {listed}. Each pays 1 or 0 with a chance of its own, which you do not"
    " know. You pull {pulls} times; earn as much as you can, and pull the best arm last.\n"
    "Name the arm to pull next in <answer> tags, for example <answer>{first}</answer>."
)


def problems(config: TaskConfig) -> tuple[list[Problem], list[Problem]]:
    """Draw (training, held-out) problems. Problems with the same probabilities are on the same side of the split.

    Raises:
        ValueError: an unknown option, a value out of range, more pulls than turns, or too few problems.
    """
    options = read_options(config, OPTIONS)
    if options["pulls"] > config.max_turns:
        raise ValueError(
            f"task.options.pulls is {options['pulls']}, but task.max_turns={config.max_turns} allows fewer; raise it"
        )
    arms = ARMS[: options["arms"]]

    def draw(rng: random.Random) -> Drawn:
        while True:
            percents = sorted((rng.randint(1, 99) for _ in arms), reverse=True)
            if percents[0] - percents[1] >= SMALLEST_GAP:
                break
        dragon_best = rng.random() < options["dragon_best"] / 100
        best = arms[0] if dragon_best else rng.choice(arms[1:])
        others = [arm for arm in arms if arm != best]
        rng.shuffle(others)
        chances = dict(zip([best, *others], percents, strict=True))
        key = json.dumps(chances, sort_keys=True)
        listed = rng.sample(arms, len(arms))
        gold = {
            "chances": {arm: chances[arm] for arm in listed},
            **{name: options[name] for name in ("pulls", "words")},
        }
        return Drawn(key, _question(listed, options), json.dumps(gold))

    return draw_problems(config, draw)


def _question(listed: list[str], options: dict[str, int]) -> str:
    if options["words"]:
        return RULES.format(number=len(listed), listed=", ".join(listed), first=listed[0], pulls=options["pulls"])
    return ",".join(listed) + ":"


def episode(problem: Problem, seed: int) -> BanditEpisode:
    """Make an episode of `problem` with the payoffs of `seed`."""
    return BanditEpisode(json.loads(problem.gold), seed)


class BanditEpisode:
    """One episode: `pulls` pulls.

    Args:
        gold: the problem's gold: `chances`, in percent by arm, `pulls` and `words`.
        seed: seed of the payoffs.
    """

    def __init__(self, gold: dict[str, object], seed: int) -> None:
        chances = gold["chances"]
        assert isinstance(chances, dict)
        self._chances: dict[str, int] = chances
        self._options = {name: int(str(gold[name])) for name in ("pulls", "words")}
        self._best = max(chances, key=lambda arm: self._chances[arm])
        self._seed = seed
        self.reset()

    @property
    def solved(self) -> bool:
        """Whether all pulls were made and the last one was of the best arm."""
        return len(self._pulled) == self._options["pulls"] and self._pulled[-1][0] == self._best

    def reset(self) -> str:
        """Start over with the same payoffs. Returns the question."""
        self._pulled: list[tuple[str, int]] = []
        self._payoffs = random.Random(self._seed)
        return _question(list(self._chances), self._options)

    def step(self, text: str) -> Step:
        """Pull the arm that `text` names."""
        arms = read_actions(text, {arm: arm for arm in self._chances}, 1)
        if arms is None:
            notice = "No arm was named." if self._options["words"] else ",".join(self._chances) + ":"
            return Step(notice, INVALID_REWARD, done=False, valid=False)
        paid = int(self._payoffs.random() < self._chances[arms[0]] / 100)
        self._pulled.append((arms[0], paid))
        observation = f"You pulled {arms[0]}: it paid {paid}." if self._options["words"] else f"{paid}:"
        return Step(observation, float(paid), done=len(self._pulled) == self._options["pulls"])

    def teacher_turn(self, rng: random.Random, error_rate: float) -> str:
        """Pull the arm with the best estimate so far, or with probability `error_rate` a random arm."""
        pulls, paid = Counter[str](), Counter[str]()
        for arm, payoff in self._pulled:
            pulls[arm] += 1
            paid[arm] += payoff
        # Laplace's rule of succession: the estimate of an arm that was never pulled is 1/2.
        best = max(self._chances, key=lambda arm: (paid[arm] + 1) / (pulls[arm] + 2))
        return write_actions([noisy(best, list(self._chances), rng, error_rate)])
