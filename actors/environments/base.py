"""What every task shares: a problem, the task's configuration, and the split that keeps held-out problems unseen.

Generated tasks give each problem a *key*, equal for problems that teach the same thing (12+34 and 34+12). The key alone
decides the side of the split, so no seed, count or option can move a held-out problem into training.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

HELD_OUT_SHARE = 8
"""One key in this many is held out."""

Draw = Callable[[random.Random], tuple[str, str, str]]
"""Makes one random problem: (key, question, gold)."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One question and the answer it is scored against."""

    prompt_id: int
    """Position in `Task.train`; held-out problems count on from there, so an id is unique within its task."""
    question: str
    gold: str
    """What the verifier compares with: text, or a JSON object where the answer is not unique (countdown)."""


@dataclass(frozen=True)
class TaskConfig:
    """Which problems, in which template. Hydra makes it from `configs/task/`."""

    name: str = "arithmetic"
    """arithmetic, countdown, multiply (generated) or jsonl (read from files)."""
    template: str = "plain"
    """A name in `actors/templates.py`, or the path of a text file that holds {question} once."""
    data_path: str = ""
    """jsonl: the training file, one JSON object per line."""
    eval_path: str = ""
    """jsonl: the held-out file, with the same fields; empty takes the last records of `data_path`."""
    question_field: str = "problem"
    answer_field: str = "answer"
    answer_pattern: str = ""
    """jsonl: regular expression with one group, whose last match in the answer field is the gold; empty takes all."""
    num_train: int = 0
    """Training problems; for jsonl 0 takes all that are not held out."""
    num_held_out: int = 0
    """Held-out problems; for jsonl with `eval_path` 0 takes all."""
    seed: int = 0
    """Chooses among the generated problems; jsonl files are read in their own order."""
    options: dict[str, int] = field(default_factory=dict)
    """Numbers that only this task knows; its file under `actors/environments/` names them."""

    def __post_init__(self) -> None:
        for name, value in (("num_train", self.num_train), ("num_held_out", self.num_held_out)):
            if value < 0:
                raise ValueError(f"task.{name} is {value}; it counts problems, so set it to 0 or more")


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
    train: list[tuple[str, str]] = []
    held_out: list[tuple[str, str]] = []
    seen: set[str] = set()
    unproductive = 0
    while len(train) < config.num_train or len(held_out) < config.num_held_out:
        key, question, gold = draw(rng)
        side, wanted = (held_out, config.num_held_out) if is_held_out(key) else (train, config.num_train)
        if len(side) < wanted and question not in seen:
            seen.add(question)
            side.append((question, gold))
            unproductive = 0
            continue
        unproductive += 1
        if unproductive > 1000 + 10 * len(seen):
            raise ValueError(
                f"{config.name} found only {len(train)} training and {len(held_out)} held-out problems, not the"
                f" {config.num_train} and {config.num_held_out} asked for; lower task.num_train or task.num_held_out,"
                " or widen task.options"
            )
    return number_problems(train, held_out)


def number_problems(
    train: list[tuple[str, str]], held_out: list[tuple[str, str]]
) -> tuple[list[Problem], list[Problem]]:
    """Gives each (question, gold) its prompt_id: training problems from 0, held-out ones from there on."""
    numbered = [Problem(i, question, gold) for i, (question, gold) in enumerate(train + held_out)]
    return numbered[: len(train)], numbered[len(train) :]
