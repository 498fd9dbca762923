"""The verifier's configuration: the bounds of the scoring pool, and what becomes of what cannot be scored.

The rewards stand in the run's top-level key `reward`; docs/rewards.md.
"""

from __future__ import annotations

from dataclasses import dataclass

MIN_MEMORY_BYTES = 1 << 28
TREATMENTS = ("wrong", "no_answer", "skip", "retry")


@dataclass(frozen=True)
class VerifierConfig:
    """The scoring pool.

    Raises:
        ValueError: for a bound outside its range.
    """

    num_workers: int = 1
    """Scoring processes."""
    deadline_seconds: float = 5.0
    """Time for one completion, and, rounded up to a second, its time on the processor."""
    memory_bytes: int = 2 << 30
    """Address space of one scoring process."""
    on_timeout: str = "wrong"
    """What could not be scored in time counts as `wrong` or `no_answer`, is left out of its group (`skip`), or is
    scored again, alone (`retry`), and then counts as wrong."""
    on_error: str = "wrong"
    """The same for one at which the scoring process crashed or a reward raised."""
    max_retries: int = 1
    """How often `retry` tries again."""

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
    """Refuse what is no way to deal with a completion that could not be scored.

    Raises:
        ValueError: with the ways there are.
    """
    if value not in TREATMENTS:
        raise ValueError(f"verifier.{setting} is {value!r}; choose one of {', '.join(TREATMENTS)}")
