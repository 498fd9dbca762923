"""The verifier's vocabulary: what a reward sees, what it may answer, and how a configuration names it.

Everything here is plain data that crosses to the scoring workers and back. A reward is a function of one `Completion`;
exactly one reward of a task is its `Grader`, which also decides the verdict.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Verdict(StrEnum):
    """How a completion was judged; `timeout`, `crash` and `error` are the scoring pool's, not the grader's."""

    CORRECT = "correct"
    WRONG = "wrong"
    NO_ANSWER = "no_answer"
    TRUNCATED = "truncated"
    """No answer, and the length limit ended the completion."""
    TIMEOUT = "timeout"
    """Not scored within the deadline, or within its share of the processor."""
    CRASH = "crash"
    """The scoring process died or had no memory left."""
    ERROR = "error"
    """A reward raised, or answered what is no number."""


@dataclass(frozen=True, slots=True)
class Completion:
    """What a reward sees of one sampled completion."""

    text: str
    """The completion without its prompt."""
    gold: str
    """The reference answer; JSON where it is more than one text (countdown, knights_knaves, several golds)."""
    truncated: bool = False
    """True when the length limit ended it."""
    num_tokens: int | None = None
    """Sampled tokens, observations left out; None where only the text is known."""
    verdict: Verdict | None = None
    """The grader's, for the rewards that are asked after it; None for the grader."""


@dataclass(frozen=True, slots=True)
class Score:
    """The number that is trained on, its parts before weighting, and the verdict."""

    reward: float
    breakdown: dict[str, float]
    verdict: Verdict
    skipped: bool = False
    """True: could not be scored and must not be trained on; `reward` is then that of a wrong answer."""


RewardFunction = Callable[[Completion], float | None]
"""A reward of one completion; None leaves it out of the sum."""


def _nothing_to_prepare() -> None:
    pass


@dataclass(frozen=True, slots=True)
class Grader:
    """The one reward of a task that decides the verdict: a judge, and what each of its verdicts is worth."""

    judge: Callable[[Completion], Verdict]
    """Returns correct, wrong or no_answer."""
    rewards: Mapping[Verdict, float]
    """The reward of correct, wrong and no_answer; other verdicts borrow one of these."""
    prepare: Callable[[], None] = _nothing_to_prepare
    """Loads what judging needs; called once per worker, before any deadline runs."""
    explain: Callable[[Completion], str] | None = None
    """Which rule decides a completion, for the tables of `python -m verifier check`; None where there are no rules."""


Reward = RewardFunction | Grader


@dataclass(frozen=True)
class RewardSpec:
    """One reward of a task as the configuration names it."""

    name: str
    """A registered name, `FILE.py:NAME` for one of a file of one's own, or `MODULE:NAME` of an installed module."""
    weight: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the reward's factory."""
