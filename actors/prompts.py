"""Tasks: the prompts an actor samples from, the golds they are scored against, and traces to pretrain a small model on.

A task is the same in every process that loads it from the same config; `Task.fingerprint` proves it, so the buffer can
speak of prompts by number alone. Training and held-out problems never overlap.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from actors.environments import arithmetic, countdown, jsonl, multiply
from actors.environments.base import Environment, Problem, TaskConfig
from actors.templates import Template, load_template

__all__ = ["Problem", "Task", "TaskConfig", "load_task", "write_traces"]

GENERATED: dict[str, Environment] = {"arithmetic": arithmetic, "countdown": countdown, "multiply": multiply}


@dataclass(frozen=True)
class Task:
    """Problems with their template."""

    name: str
    train: Sequence[Problem]
    """Indexed by prompt_id."""
    held_out: Sequence[Problem]
    """Their prompt_ids go on where those of `train` end."""
    template: Template

    @property
    def stop(self) -> tuple[str, ...]:
        """Strings that end a completion, besides the end-of-sequence token; they belong to the completion."""
        return self.template.stop

    def prompt(self, problem: Problem) -> str:
        """The text the model continues."""
        return self.template.render(problem.question)

    @cached_property
    def fingerprint(self) -> str:
        """First 16 hexadecimal digits of the SHA-256 of all prompts and golds, in order."""
        digest = hashlib.sha256()
        for side in (self.train, self.held_out):
            digest.update(json.dumps([[self.prompt(problem), problem.gold] for problem in side]).encode())
        return digest.hexdigest()[:16]

    @cached_property
    def alphabet(self) -> str:
        """The characters a character tokenizer needs, sorted: those of all prompts and of every teacher trace.

        Tasks read from files have no teacher; theirs are the characters of prompts and golds.
        """
        texts: Iterable[str] = (text for p in (*self.train, *self.held_out) for text in (self.prompt(p), p.gold))
        if self.name in GENERATED:
            prompts = (self.prompt(problem) for problem in (*self.train, *self.held_out))
            texts = (GENERATED[self.name].COMPLETION_ALPHABET, *prompts)
        return "".join(sorted(set().union(*texts)))


def load_task(config: TaskConfig) -> Task:
    """Generates or reads the problems.

    Raises:
        ValueError: an unknown task or template, options out of range, or data that is missing or not as described;
            the message is one sentence for the user.
    """
    template = load_template(config.template)
    if config.name == "jsonl":
        train, held_out = jsonl.problems(config)
    else:
        train, held_out = _environment(config.name).problems(config)
    return Task(name=config.name, train=train, held_out=held_out, template=template)


def write_traces(
    config: TaskConfig, path: Path, *, num_traces: int, error_rate: float, seed: int, clean_share: float = 0.0
) -> None:
    """Writes a noisy teacher's completions of random training problems, to pretrain a small model on.

    Args:
        config: a generated task.
        path: gets one JSON object {"prompt", "completion"} per line; appears whole or not at all.
        num_traces: number of lines.
        error_rate: how often the teacher errs, in [0, 1]; the environment says at what.
        seed: of the choice of problems and of the errors.
        clean_share: the first lines, as a share of all, are free of errors. Read in order they teach the facts before
            the bad habits, in half the time that noise from the start takes.

    Raises:
        ValueError: a task without a teacher, or an error rate or share outside [0, 1].
    """
    for name, value in (("error_rate", error_rate), ("clean_share", clean_share)):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} is {value}; choose it between 0 and 1")
    environment = _environment(config.name)
    task = load_task(config)
    rng = random.Random(f"traces {seed}")
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        for line in range(num_traces):
            problem = rng.choice(task.train)
            completion = environment.teacher_trace(
                problem, rng, error_rate if line >= clean_share * num_traces else 0.0
            )
            file.write(json.dumps({"prompt": task.prompt(problem), "completion": completion}) + "\n")
    partial.replace(path)


def _environment(name: str) -> Environment:
    if name in GENERATED:
        return GENERATED[name]
    if name == "jsonl":
        raise ValueError(f"task jsonl has no teacher to pretrain from; use one of {', '.join(GENERATED)}")
    raise ValueError(f"task.name {name!r} is unknown; choose one of {', '.join([*GENERATED, 'jsonl'])}")
