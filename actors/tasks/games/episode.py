"""The protocol of multi-turn tasks.

Only the episode changes its state, its rewards and its success. The model's text is an argument of `step` and nothing
more, so a forged observation or a claimed reward has no effect. The modules `sokoban`, `frozen_lake` and `bandit`
implement the protocol, and `actors/rollouts/episode.py` runs the episodes.
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
    """The text that the model sees next. It repeats nothing that the model wrote."""
    reward: float
    """The reward of this turn."""
    done: bool
    """Whether the episode is over. Further steps are an error."""
    valid: bool = True
    """False if the turn has no readable action."""


class Episode(Protocol):
    """One episode of a multi-turn problem. It owns the state, the rewards and the success."""

    @property
    def solved(self) -> bool:
        """Whether the goal is reached, which makes the trajectory's verdict correct."""
        ...

    def reset(self) -> str:
        """Start over with the same randomness. Returns the first observation, which is the problem's question."""
        ...

    def step(self, text: str) -> Step:
        """Take the actions that the model's turn `text` names. Any text is allowed."""
        ...

    def teacher_turn(self, rng: random.Random, error_rate: float) -> str:
        """Write the turn of a noisy teacher in this state. Each action is random with probability `error_rate`."""
        ...


class MultiTurnEnvironment(Protocol):
    """The interface of a multi-turn task's module."""

    COMPLETION_ALPHABET: str
    """Every character that a teacher's turn or a later observation can contain."""

    def problems(self, config: TaskConfig) -> tuple[list[Problem], list[Problem]]:
        """Return problems as `Environment.problems` does.

        The gold is a JSON object from which an episode can be created.
        """
        ...

    def episode(self, problem: Problem, seed: int) -> Episode:
        """Make a new episode of `problem`, not yet reset. `seed` alone determines its randomness."""
        ...
