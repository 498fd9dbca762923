"""What every task shares: a problem, the task's configuration, and the split that keeps held-out problems unseen.

Generated tasks give each problem a *key*, equal for problems that teach the same thing (12+34 and 34+12). The key alone
decides the side of the split, so no seed, count or option can move a held-out problem into training.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

HELD_OUT_SHARE = 8
"""One key in this many is held out."""


class Drawn(NamedTuple):
    """A problem before it has a number."""

    key: str
    """Equal for problems that teach the same thing."""
    question: str
    gold: str
    level: int = 0


Draw = Callable[[random.Random], Drawn]
"""Makes one random problem."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One question and the answer it is scored against."""

    prompt_id: int
    """Position in `Task.train`; held-out problems count on from there, so an id is unique within its task."""
    question: str
    gold: str
    """What the verifier compares with: text; a JSON list of texts, any of which is right; or the JSON object that the
    task's own reward reads (countdown, knights_knaves)."""
    level: int = 0
    """Difficulty: numbers in countdown, people in knights_knaves, `level_field` of a file; 0 where there is none."""


@dataclass(frozen=True)
class TaskConfig:
    """Which problems, in which template. Hydra makes it from `configs/task/`."""

    name: str = "arithmetic"
    """A generated task (`actors/tasks/task.py` lists them), or data: questions and answers read from `data_path`."""
    template: str = "plain"
    """A name in `configs/template/`, or the path of a file of one's own."""
    data_path: str = ""
    """A file (JSON lines, JSON, parquet), a folder, or hf:OWNER/NAME; tasks that generate need none."""
    eval_path: str = ""
    """Held-out problems, as `data_path`; empty takes the last records of `data_path`."""
    subset: str = ""
    """Of a data set with several: which one."""
    split: str = "train"
    eval_split: str = "test"
    """Of data sets with splits: those of `data_path` and of `eval_path`."""
    question_field: str = "problem"
    answer_field: str = "answer"
    level_field: str = ""
    """A field holding a number ("Level 5" is 5); empty: no levels. The three take nested names too: `answer.value`."""
    answer_pattern: str = ""
    r"""Regular expression with one group, whose last match in the answer field is the gold; `boxed`: the content of
    the last \boxed{}; empty: all of it."""
    num_train: int = 0
    """Training problems; 0 takes all that a data set has."""
    num_held_out: int = 0
    """Held-out problems; with `eval_path` at most so many, and 0 takes all."""
    min_level: int = 0
    max_level: int = 0
    """Only problems of these levels are trained on; 0: no bound. Held-out problems keep every level."""
    max_turns: int = 1
    """Turns of an episode at most; more than 1 for multi-turn tasks only."""
    seed: int = 0
    """Chooses among the generated problems; data sets are read in their own order."""
    options: dict[str, int] = field(default_factory=dict)
    """Numbers that only this task knows; its file under `actors/tasks/` names them."""

    def __post_init__(self) -> None:
        for name, value in (("num_train", self.num_train), ("num_held_out", self.num_held_out)):
            if value < 0:
                raise ValueError(f"task.{name} is {value}; it counts problems, so set it to 0 or more")
        if self.max_turns < 1:
            raise ValueError(f"task.max_turns is {self.max_turns}; an episode has 1 turn or more")
        if 0 < self.max_level < self.min_level:
            raise ValueError(
                f"task.min_level is {self.min_level} and task.max_level {self.max_level}, which leaves no level; raise"
                " task.max_level, or set it to 0 for no bound"
            )

    def trains_on(self, level: int) -> bool:
        """Whether the difficulty filter lets problems of this level into training."""
        return self.min_level <= level <= (self.max_level or level)


class Environment(Protocol):
    """What a generated task's module offers; the modules beside this one are the implementations."""

    COMPLETION_ALPHABET: str
    """Every character a teacher trace can hold."""

    def problems(self, config: TaskConfig) -> tuple[list[Problem], list[Problem]]:
        """(training, held-out) problems, the same for the same config, with no key on both sides."""
        ...

    def teacher_trace(self, problem: Problem, rng: random.Random, error_rate: float) -> str:
        """A completion by a noisy teacher: always right at `error_rate` 0."""
        ...


def read_options(config: TaskConfig, defaults: Mapping[str, tuple[int, int, int]]) -> dict[str, int]:
    """The task's options with defaults filled in, each checked against its range.

    Args:
        config: whose `options` to read.
        defaults: name -> (default, smallest, largest allowed value).

    Raises:
        ValueError: an option the task does not know, or a value outside its range.
    """
    for name, value in config.options.items():
        if name not in defaults:
            raise ValueError(
                f"task.options.{name} is not an option of {config.name}; it has {', '.join(sorted(defaults))}"
            )
        _, smallest, largest = defaults[name]
        if not smallest <= value <= largest:
            raise ValueError(f"task.options.{name} is {value}; {config.name} takes {smallest} to {largest}")
    return {name: config.options.get(name, default) for name, (default, _, _) in defaults.items()}


def read_range(options: Mapping[str, int], low: str, high: str) -> tuple[int, int]:
    """The two ends of a range of options.

    Raises:
        ValueError: they are the wrong way round.
    """
    if options[low] > options[high]:
        raise ValueError(
            f"task.options.{low} is {options[low]}, above task.options.{high}, which is {options[high]}; lower the"
            " first or raise the second"
        )
    return options[low], options[high]


def is_held_out(key: str) -> bool:
    """Whether the problem with this key belongs to the held-out side, whatever the seed."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") % HELD_OUT_SHARE == 0


def draw_problems(config: TaskConfig, draw: Draw) -> tuple[list[Problem], list[Problem]]:
    """Draws distinct problems until both sides are full.

    Raises:
        ValueError: `num_train` is 0, or there are fewer distinct problems than asked for.
    """
    if config.num_train == 0:
        raise ValueError(f"task.num_train is 0, but {config.name} generates its problems; set how many to train on")
    rng = random.Random(f"{config.name} {config.seed}")
    train: list[Drawn] = []
    held_out: list[Drawn] = []
    # The same question with another gold is another problem: what a bandit pays is not asked.
    seen: set[tuple[str, str]] = set()
    unproductive = 0
    while len(train) < config.num_train or len(held_out) < config.num_held_out:
        drawn = draw(rng)
        held = is_held_out(drawn.key)
        side, wanted = (held_out, config.num_held_out) if held else (train, config.num_train)
        if len(side) < wanted and drawn[1:3] not in seen and (held or config.trains_on(drawn.level)):
            seen.add(drawn[1:3])
            side.append(drawn)
            unproductive = 0
            continue
        unproductive += 1
        if unproductive > 1000 + 10 * len(seen):
            raise ValueError(
                f"{config.name} found only {len(train)} training and {len(held_out)} held-out problems, not the"
                f" {config.num_train} and {config.num_held_out} asked for; lower task.num_train or task.num_held_out,"
                " or widen task.options or the levels"
            )
    if (config.min_level or config.max_level) and not any(drawn.level for drawn in train):
        raise ValueError(
            f"task.min_level={config.min_level} and task.max_level={config.max_level} choose by level, but the problems"
            f" of {config.name} have none; leave both out"
        )
    return number_problems(train, held_out)


def number_problems(train: Sequence[Drawn], held_out: Sequence[Drawn]) -> tuple[list[Problem], list[Problem]]:
    """Gives each problem its prompt_id: training problems from 0, held-out ones from there on."""
    numbered = [Problem(i, drawn.question, drawn.gold, drawn.level) for i, drawn in enumerate([*train, *held_out])]
    return numbered[: len(train)], numbered[len(train) :]
