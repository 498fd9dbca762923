"""Tasks: prompts to sample from, gold answers to score against, and a teacher's traces to pretrain a small model on.

Every process that loads a task from the same config gets the same problems. `Task.fingerprint` proves it, so a lease
names a prompt by its number. Training and held-out problems never overlap.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from actors.tasks.base import Environment, Problem, TaskConfig
from actors.tasks.datasets import data
from actors.tasks.games import bandit, frozen_lake, sokoban
from actors.tasks.games.episode import Episode, MultiTurnEnvironment
from actors.tasks.templates import Template, load_template
from actors.tasks.text import arithmetic, countdown, knights_knaves, multiply

__all__ = ["Problem", "Task", "TaskConfig", "load_task", "write_traces"]

GENERATED: dict[str, Environment] = {
    "arithmetic": arithmetic,
    "countdown": countdown,
    "knights_knaves": knights_knaves,
    "multiply": multiply,
}
MULTI_TURN: dict[str, MultiTurnEnvironment] = {"bandit": bandit, "frozen_lake": frozen_lake, "sokoban": sokoban}
_GENERATORS: dict[str, Environment | MultiTurnEnvironment] = {**GENERATED, **MULTI_TURN}


@dataclass(frozen=True)
class Task:
    """The problems and their template."""

    name: str
    train: Sequence[Problem]
    """Indexed by prompt_id."""
    held_out: Sequence[Problem]
    """Their prompt_ids continue after those of `train`."""
    template: Template
    max_turns: int = 1
    """Largest number of turns of an episode."""

    @property
    def is_multi_turn(self) -> bool:
        """Whether a completion is an episode, which gives the rewards itself, instead of one answer that is graded."""
        return self.name in MULTI_TURN

    def episode(self, problem: Problem, seed: int) -> Episode:
        """Make a new episode of a multi-turn task's problem, with the randomness of `seed`."""
        return MULTI_TURN[self.name].episode(problem, seed)

    @property
    def stop(self) -> tuple[str, ...]:
        """Strings that end a completion, in addition to the end-of-sequence token. They are part of the completion."""
        return self.template.stop

    def prompt(self, problem: Problem) -> str:
        """Return the text that the model continues."""
        return self.template.render(problem.question)

    @cached_property
    def levels(self) -> NDArray[np.int64]:
        """[number of training problems] int64: level by prompt_id."""
        return np.fromiter((problem.level for problem in self.train), np.int64, len(self.train))

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of a SHA-256 over all prompts, gold answers, levels and turn settings.

        The turn settings are the template's `between` and `stop`, and `max_turns`.
        """
        digest = hashlib.sha256(json.dumps([self.template.between, self.template.stop, self.max_turns]).encode())
        for side in (self.train, self.held_out):
            digest.update(json.dumps([[self.prompt(p), p.gold, p.level] for p in side]).encode())
        return digest.hexdigest()[:16]

    @cached_property
    def alphabet(self) -> str:
        """The characters that a character tokenizer needs, sorted: those of all prompts and of all teacher traces.

        A task from a data set has no teacher. Its alphabet is the characters of its prompts and gold answers.
        """
        texts: Iterable[str] = (text for p in (*self.train, *self.held_out) for text in (self.prompt(p), p.gold))
        if self.name in _GENERATORS:
            prompts = (self.prompt(problem) for problem in (*self.train, *self.held_out))
            texts = (_GENERATORS[self.name].COMPLETION_ALPHABET, *prompts)
        return "".join(sorted(set().union(*texts)))


def load_task(config: TaskConfig) -> Task:
    """Generate or read the problems of a task.

    Raises:
        ValueError: an unknown task or template, an option out of range, or data that is missing or malformed. The
            message is one sentence for the user.
    """
    template = load_template(config.template)
    if config.name == "data":
        train, held_out = data.problems(config)
    else:
        train, held_out = _generator(config.name).problems(config)
    task = Task(config.name, train, held_out, template, config.max_turns)
    if task.is_multi_turn and not template.between:
        raise ValueError(
            f"task.template {config.template!r} does not say what stands between two turns, which {config.name} needs;"
            " use turns or qwen_turns"
        )
    if config.max_turns > 1 and not task.is_multi_turn:
        raise ValueError(
            f"task.max_turns is {config.max_turns}, but {config.name} is answered in one turn; set it to 1"
        )
    return task


def write_traces(
    config: TaskConfig, path: Path, *, num_traces: int, error_rate: float, seed: int, clean_share: float = 0.0
) -> None:
    """Write a noisy teacher's completions of random training problems, to pretrain a small model on.

    Args:
        config: a generated task.
        path: gets one JSON object {"prompt", "completion"} per line. The file appears complete or not at all.
        num_traces: number of lines.
        error_rate: probability of a teacher's error, in [0, 1]; the task's `teacher_trace` says where it errs.
        seed: seed of the choice of problems and of the errors.
        clean_share: share of the lines, from the first on, without errors. A model that reads the file in order learns
            the task before the errors, in half the time that errors from the start would take.

    Raises:
        ValueError: the task has no teacher, or `error_rate` or `clean_share` is outside [0, 1].
    """
    for name, value in (("error_rate", error_rate), ("clean_share", clean_share)):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} is {value}; choose it between 0 and 1")
    if config.name == "data":
        raise ValueError(f"task data has no teacher to pretrain from; use one of {', '.join(_GENERATORS)}")
    task = load_task(config)
    rng = random.Random(f"traces {seed}")
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        line = 0
        while line < num_traces:
            rate = error_rate if line >= clean_share * num_traces else 0.0
            for prompt, completion in islice(_teach(task, rng.choice(task.train), rng, rate), num_traces - line):
                file.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")
                line += 1
    partial.replace(path)


def _teach(task: Task, problem: Problem, rng: random.Random, error_rate: float) -> Iterator[tuple[str, str]]:
    """Yield (prompt, completion) pairs of a noisy teacher.

    An episode gives one pair per turn, with the earlier turns in the prompt.
    """
    prompt = task.prompt(problem)
    if not task.is_multi_turn:
        yield prompt, GENERATED[task.name].teacher_trace(problem, rng, error_rate)
        return
    episode = task.episode(problem, rng.getrandbits(32))
    episode.reset()
    for _ in range(task.max_turns):
        turn = episode.teacher_turn(rng, error_rate)
        yield prompt, turn
        step = episode.step(turn)
        if step.done:
            return
        prompt += turn + task.template.next_turn(step.observation)


def _generator(name: str) -> Environment | MultiTurnEnvironment:
    if name not in _GENERATORS:
        raise ValueError(f"task.name {name!r} is unknown; choose one of {', '.join([*_GENERATORS, 'data'])}")
    return _GENERATORS[name]
