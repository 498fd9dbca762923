"""The verifier's configuration: the rewards of a task and the bounds of the scoring pool."""

from __future__ import annotations

from dataclasses import dataclass

from verifier.base import RewardSpec, Verdict
from verifier.rewards import build_scorer

MIN_MEMORY_BYTES = 1 << 28
ON_TIMEOUT = ("wrong", "no_answer")


@dataclass(frozen=True)
class VerifierConfig:
    """Rewards and scoring pool.

    Raises:
        ValueError: for an unknown reward or a bound outside its range.
    """

    rewards: list[RewardSpec]
    """Named, weighted rewards; exactly one of them is a grader."""
    num_workers: int = 1
    """Scoring processes."""
    deadline_seconds: float = 5.0
    """Time for one group, and again for each of its completions when the group exceeded it."""
    memory_bytes: int = 2 << 30
    """Address space of one scoring process."""
    on_timeout: str = "wrong"
    """Whose reward a completion gets that could not be scored: `wrong` or `no_answer`."""

    def __post_init__(self) -> None:
        build_scorer(self.rewards)
        if self.num_workers < 1:
            raise ValueError(f"verifier.num_workers is {self.num_workers}; at least 1 is needed")
        if not 0 < self.deadline_seconds < float("inf"):
            raise ValueError(f"verifier.deadline_seconds is {self.deadline_seconds}; give a number above 0")
        if self.memory_bytes < MIN_MEMORY_BYTES:
            raise ValueError(
                f"verifier.memory_bytes is {self.memory_bytes}; a scoring process needs at least {MIN_MEMORY_BYTES}"
            )
        check_on_timeout(self.on_timeout)


def check_on_timeout(on_timeout: str) -> Verdict:
    """The verdict whose reward `on_timeout` names.

    Raises:
        ValueError: when it names none.
    """
    if on_timeout not in ON_TIMEOUT:
        raise ValueError(f"verifier.on_timeout is {on_timeout!r}; choose one of {', '.join(ON_TIMEOUT)}")
    return Verdict(on_timeout)
