"""The section `verifier` of a run: limits of the scoring pool, and how completions without a score are treated.

The rewards are not here but in the top-level key `reward` (docs/rewards.md).
"""

from __future__ import annotations

from dataclasses import dataclass

MIN_MEMORY_BYTES = 1 << 28
TREATMENTS = ("wrong", "no_answer", "skip", "retry")


@dataclass(frozen=True)
class VerifierConfig:
    """Settings of the scoring pool.

    Raises:
        ValueError: for a value outside its range.
    """

    num_workers: int = 1
    """Number of scoring processes per actor."""
    deadline_seconds: float = 5.0
    """Wall-clock limit for one completion. Rounded up to a whole second it also limits the processor time."""
    memory_bytes: int = 2 << 30
    """Limit of the address space of one scoring process."""
    on_timeout: str = "wrong"
    """Treatment of a completion that was not scored in time. `wrong` and `no_answer`: it gets the reward of that
    verdict. `skip`: it is left out of its group. `retry`: it is scored again in a new process, and counts as wrong when
    that fails too."""
    on_error: str = "wrong"
    """Treatment of a completion whose scoring process crashed or whose reward raised; the same values."""
    max_retries: int = 1
    """Largest number of times that `retry` scores a completion again."""

    def __post_init__(self) -> None:
        if self.num_workers < 1:
            raise ValueError(f"verifier.num_workers is {self.num_workers}; at least 1 is needed")
        if not 0 < self.deadline_seconds < float("inf"):
            raise ValueError(f"verifier.deadline_seconds is {self.deadline_seconds}; give a number above 0")
        if self.memory_bytes < MIN_MEMORY_BYTES:
            raise ValueError(
                f"verifier.memory_bytes is {self.memory_bytes}; a scoring process needs at least {MIN_MEMORY_BYTES}"
            )
        check_treatment("on_timeout", self.on_timeout)
        check_treatment("on_error", self.on_error)
        if self.max_retries < 1:
            raise ValueError(
                f"verifier.max_retries is {self.max_retries}; use 1 or more, and on_timeout or on_error without"
                " retry for none"
            )


def check_treatment(setting: str, value: str) -> None:
    """Check a value of `on_timeout` or `on_error`.

    Raises:
        ValueError: for an unknown value; the message lists the known ones.
    """
    if value not in TREATMENTS:
        raise ValueError(f"verifier.{setting} is {value!r}; choose one of {', '.join(TREATMENTS)}")
