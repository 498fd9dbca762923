"""The verifier's data types: the input of a reward, its result, and its entry in the configuration.

`Completion`, `Score` and `RewardSpec` are plain data that crosses to the scoring processes and back. A reward is a
function of one `Completion`. Exactly one reward of a task is a `Grader`, which also decides the verdict.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Verdict(StrEnum):
    """The judgement of a completion.

    The grader gives `correct`, `wrong` and `no_answer`, the scorer `truncated`, the scoring pool the other three.
    """

    CORRECT = "correct"
    WRONG = "wrong"
    NO_ANSWER = "no_answer"
    TRUNCATED = "truncated"
    """No answer in a completion that the length limit ended."""
    TIMEOUT = "timeout"
    """Not scored within the deadline, or within the limit of processor time."""
    CRASH = "crash"
    """The scoring process died or ran out of memory."""
    ERROR = "error"
    """A reward raised, or returned something that is not a finite number."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled completion, as rewards see it."""

    text: str
    """The completion without its prompt."""
    gold: str
    """The reference answer; JSON where one text is not enough (countdown, knights_knaves, alternative golds)."""
    truncated: bool = False
    """Whether the length limit ended the completion."""
    num_tokens: int | None = None
    """Number of sampled tokens, so without observation tokens; None where only the text is known."""
    verdict: Verdict | None = None
    """The grader's verdict, for the rewards that run after the grader; None while the grader runs."""


@dataclass(frozen=True, slots=True)
class Score:
    """Reward and verdict of one completion."""

    reward: float
    """The weighted sum over the task's rewards: the number that is trained on."""
    breakdown: dict[str, float]
    """The value of each reward before weighting, by name."""
    verdict: Verdict
    skipped: bool = False
    """True: the completion could not be scored and must not be trained on. `reward` is then that of a wrong answer."""


RewardFunction = Callable[[Completion], float | None]
"""Maps one completion to its reward. None means that the reward abstains: the sum leaves it out."""


def _nothing_to_prepare() -> None:
    pass


@dataclass(frozen=True, slots=True)
class Grader:
    """The one reward of a task that also decides the verdict: a judge, and a reward for each of its verdicts."""

    judge: Callable[[Completion], Verdict]
    """Returns correct, wrong or no_answer."""
    rewards: Mapping[Verdict, float]
    """The rewards of correct, wrong and no_answer. Every other verdict gets the reward of one of these three."""
    prepare: Callable[[], None] = _nothing_to_prepare
    """Loads the libraries that `judge` needs. A scoring process calls this function once, before any deadline runs."""
    explain: Callable[[Completion], str] | None = None
    """Returns the name of the rule that decides a completion, for the tables of `python -m verifier check`; None for a
    grader without named rules."""


Reward = RewardFunction | Grader


@dataclass(frozen=True)
class RewardSpec:
    """One entry of a task's reward list."""

    name: str
    """A registered name, or `FILE.py:NAME` of a user's file, or `MODULE:NAME` of an installed module."""
    weight: float = 1.0
    """Factor of the reward in the sum."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the reward's factory."""
