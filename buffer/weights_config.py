"""The settings of the weight store: where versions lie, how many, and what of them goes over the network how fast."""

from __future__ import annotations

from dataclasses import dataclass

MEMORY_VARIABLE = "SLIPSTREAM_MEMORY"
"""In the environment of a run's processes: a folder in shared memory that is removed with the run, however it ends."""


@dataclass(frozen=True)
class WeightsConfig:
    """The section `weights` of a run.

    Raises:
        ValueError: when a value is out of range.
    """

    address: str = ""
    """Where the store listens; the launcher chooses it."""
    shared_memory: bool = True
    """Versions lie in shared memory, in a folder that goes with the run; otherwise in RUN_DIR/weights."""
    keep_versions: int = 3
    """Versions in memory and served; one more is being written. A pull must end before its version leaves."""
    bytes_per_second: float = 0.0
    """What the store sends over the network, to all actors together; 0: as fast as it goes."""
    relay_fanout: int = 0
    """Relays that pull from the learner itself, and from each relay below it; 0: all of them from the learner."""
    deltas: bool = True
    """Actors that pull and have one of the kept versions are sent the difference where that is smaller."""

    def __post_init__(self) -> None:
        if self.keep_versions < 1:
            raise ValueError(f"weights.keep_versions={self.keep_versions} must be at least 1")
        if self.relay_fanout < 0:
            raise ValueError(f"weights.relay_fanout={self.relay_fanout} must be 0 (no tree) or above")
        if self.bytes_per_second < 0:
            raise ValueError(f"weights.bytes_per_second={self.bytes_per_second} must be 0 (no limit) or above")
