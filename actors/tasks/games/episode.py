"""Multi-turn tasks: what a module offers whose problems are played over several turns.

An episode is the only owner of its state, its rewards and its success. What the model writes is an argument of `step`
and nothing more, so a forged observation or a claimed reward changes none of them. The modules `sokoban`, `frozen_lake`
and `bandit` are the implementations; `actors/rollouts/episode.py` leads the model through them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Protocol

from actors.tasks.base import Problem, TaskConfig


@dataclass(frozen=True, slots=True)
class Step:
    """The environment's answer to one turn of the model."""

    observation: str
    """What the model sees next; nothing of it repeats what the model wrote."""
    reward: float
    """Of this turn alone."""
    done: bool
    """Whether the episode is over; further steps are an error."""
    valid: bool = True
    """False where the turn held no action that could be read."""


class Episode(Protocol):
    """One play of a multi-turn problem. It alone keeps state, rewards and success; text it is given it only reads."""

    @property
    def solved(self) -> bool:
        """Whether the aim is reached; the verdict of the trajectory."""
        ...

    def reset(self) -> str:
        """Starts over, with the same noise. Returns the first observation: the problem's question."""
        ...

    def step(self, text: str) -> Step:
        """Plays the action that the model's turn `text` names; any text at all is allowed."""
        ...

    def teacher_turn(self, rng: random.Random, error_rate: float) -> str:
        """What a noisy teacher writes in this state; each of its actions is a random one with that probability."""
        ...


class MultiTurnEnvironment(Protocol):
    """What the module of a multi-turn task offers."""

    COMPLETION_ALPHABET: str
    """Every character a teacher's turn or a later observation can hold."""

    def problems(self, config: TaskConfig) -> tuple[list[Problem], list[Problem]]:
        """As `Environment.problems`; the gold is a JSON object that says all that an episode is made of."""
        ...

    def episode(self, problem: Problem, seed: int) -> Episode:
        """A play of `problem`, whose noise follows from `seed` alone; not yet reset."""
        ...
