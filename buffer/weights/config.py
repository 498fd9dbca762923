"""The settings of the weight store: where versions lie, how many, and what of them goes over the network how fast."""

from __future__ import annotations

from dataclasses import dataclass

TRANSPORTS = ("file", "ipc", "nccl")
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
    transport: str = "file"
    """file | ipc | nccl: how a version comes from the learner to an actor."""
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
    meeting_seconds: float = 300.0
    """nccl: how long the members of the group wait for each other; the first time, for engines to start."""
    group_size: int = 0
    """nccl: the learner's rank 0 and all workers of all actors; the launcher counts them."""

    def __post_init__(self) -> None:
        if self.keep_versions < 1:
            raise ValueError(f"weights.keep_versions={self.keep_versions} must be at least 1")
        if self.relay_fanout < 0:
            raise ValueError(f"weights.relay_fanout={self.relay_fanout} must be 0 (no tree) or above")
        if not self.bytes_per_second >= 0:
            raise ValueError(f"weights.bytes_per_second={self.bytes_per_second} must be 0 (no limit) or above")
        if not self.meeting_seconds > 0:
            raise ValueError(f"weights.meeting_seconds={self.meeting_seconds} must be above 0")
        self._check_transport()

    def _check_transport(self) -> None:
        if self.transport not in TRANSPORTS:
            raise ValueError(f"weights.transport={self.transport} is unknown; use one of {', '.join(TRANSPORTS)}")
        if self.transport == "file":
            return
        if self.relay_fanout or self.deltas or self.bytes_per_second:
            raise ValueError(
                f"weights.transport={self.transport} sends no bytes through the weight store, so relays, deltas and"
                f" rates mean nothing to it; choose the group, weights={self.transport}, and leave"
                " weights.relay_fanout, weights.deltas and weights.bytes_per_second out"
            )
