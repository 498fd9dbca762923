"""The parts that all tasks share: a problem, the task's configuration, and the split into training and held-out.

A generated task gives each problem a *key*, which is equal for problems that teach the same thing (12+34 and 34+12).
The key alone decides the side of the split. No seed, count or option can therefore move a held-out problem into
training.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

HELD_OUT_SHARE = 8
"""One in this many keys is held out."""


class Drawn(NamedTuple):
    """A problem without a prompt_id."""

    key: str
    """Equal for problems that teach the same thing."""
    question: str
    gold: str
    level: int = 0


Draw = Callable[[random.Random], Drawn]
"""Draws one random problem."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A question and its gold answer."""

    prompt_id: int
    """Position in `Task.train`. The ids of held-out problems continue after those, so an id is unique in its task."""
    question: str
    gold: str
    """What the verifier compares an answer with: a text; a JSON list of texts, any of which is correct; or a JSON
    object for a task's own reward (countdown, knights_knaves)."""
    level: int = 0
    """Difficulty, such as the number of people in knights_knaves, or `level_field` of a data set; 0: no level."""


@dataclass(frozen=True)
class TaskConfig:
    """The problems and their template. The files in `configs/task/` set the fields."""

    name: str = "arithmetic"
    """A generated task (listed in `actors/tasks/task.py`), or `data`: questions and answers from `data_path`."""
    template: str = "plain"
    """A name in `configs/template/`, or the path of a template file."""
    data_path: str = ""
    """A file (JSON lines, JSON, parquet), a folder, or hf:OWNER/NAME. Empty for generated problems."""
    eval_path: str = ""
    """Source of the held-out problems, as `data_path`. Empty: the last records of `data_path`."""
    subset: str = ""
    """The subset to read, for a data set with several."""
    split: str = "train"
    eval_split: str = "test"
    """The splits to read from `data_path` and from `eval_path`, for data sets with splits."""
    question_field: str = "problem"
    answer_field: str = "answer"
    level_field: str = ""
    """Field with a number, the problem's level ("Level 5" is 5); empty: no levels. The names of all three fields may be
    nested, such as `answer.value`."""
    answer_pattern: str = ""
    r"""Regular expression with one group; the group's last match in the answer field is the gold. `boxed`: the content
    of the last \boxed{}. Empty: the whole answer."""
    num_train: int = 0
    """Number of training problems; 0: all problems of the data set."""
    num_held_out: int = 0
    """Number of held-out problems; with `eval_path` the largest number, and 0: all of them."""
    min_level: int = 0
    max_level: int = 0
    """Lowest and highest level of training problems; 0: no bound. Held-out problems keep all levels."""
    max_turns: int = 1
    """Largest number of turns of an episode; more than 1 only for multi-turn tasks."""
    seed: int = 0
    """Seed of the generated problems. Data sets are read in their own order."""
    options: dict[str, int] = field(default_factory=dict)
    """Settings of one task, documented in its file under `actors/tasks/`."""

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
        """Return whether problems of this level are trained on."""
        return self.min_level <= level <= (self.max_level or level)


class Environment(Protocol):
    """The interface of a single-turn task's module. The modules in `actors/tasks/text/` implement it."""

    COMPLETION_ALPHABET: str
    """Every character that a teacher trace can contain."""

    def problems(self, config: TaskConfig) -> tuple[list[Problem], list[Problem]]:
        """Return (training, held-out) problems. Equal configs give equal problems, and no key is on both sides."""
        ...

    def teacher_trace(self, problem: Problem, rng: random.Random, error_rate: float) -> str:
        """Write the completion of a noisy teacher; always correct with `error_rate` 0."""
        ...


def read_options(config: TaskConfig, defaults: Mapping[str, tuple[int, int, int]]) -> dict[str, int]:
    """Return the task's options with their defaults filled in.

    Args:
        config: its `options` are read.
        defaults: name -> (default, smallest allowed value, largest allowed value).

    Raises:
        ValueError: the task has no such option, or a value is outside its range.
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
    """Return the values of the options `low` and `high`.

    Raises:
        ValueError: `low` is above `high`.
    """
    if options[low] > options[high]:
        raise ValueError(
            f"task.options.{low} is {options[low]}, above task.options.{high}, which is {options[high]}; lower the"
            " first or raise the second"
        )
    return options[low], options[high]


def is_held_out(key: str) -> bool:
    """Return whether problems with this key are held out."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") % HELD_OUT_SHARE == 0


def draw_problems(config: TaskConfig, draw: Draw) -> tuple[list[Problem], list[Problem]]:
    """Draw distinct (training, held-out) problems until both sides are full.

    Raises:
        ValueError: `num_train` is 0, or there are too few distinct problems.
    """
    if config.num_train == 0:
        raise ValueError(f"task.num_train is 0, but {config.name} generates its problems; set how many to train on")
    rng = random.Random(f"{config.name} {config.seed}")
    train: list[Drawn] = []
    held_out: list[Drawn] = []
    # Equal questions with different gold answers are different problems: a bandit's question does not show its payoffs.
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
    """Number the problems: training problems from 0, then the held-out ones."""
    numbered = [Problem(i, drawn.question, drawn.gold, drawn.level) for i, drawn in enumerate([*train, *held_out])]
    return numbered[: len(train)], numbered[len(train) :]
