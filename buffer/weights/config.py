"""Settings for the transfer of weights from the learner to the actors."""

from __future__ import annotations

from dataclasses import dataclass

TRANSPORTS = ("file", "ipc", "nccl")
MEMORY_VARIABLE = "SLIPSTREAM_MEMORY"
"""Environment variable of a run's processes: a folder in shared memory, removed when the run ends for any reason."""


@dataclass(frozen=True)
class WeightsConfig:
    """The section `weights` of a run.

    Raises:
        ValueError: when a value is out of range.
    """

    address: str = ""
    """Address of the weight server in the learner; set by the launcher."""
    transport: str = "file"
    """file | ipc | nccl: how an actor gets a version from the learner."""
    shared_memory: bool = True
    """Whether versions are written to shared memory, in a folder removed with the run; otherwise to RUN_DIR/weights."""
    keep_versions: int = 3
    """Versions kept and served; one more is being written. A pull fails when its version is dropped before the end."""
    bytes_per_second: float = 0.0
    """Limit for bytes sent over the network, to all actors together; 0: no limit."""
    relay_fanout: int = 0
    """Relays that pull from the learner, and relays that pull from each relay; 0: all pull from the learner."""
    concurrent_pulls: int = 4
    """Pulls that a store or relay serves at the same time, each to its end; the others wait. Raise it when the link of
    the learner is many times faster than those of the actors."""
    deltas: bool = True
    """Whether an actor that has one of the kept versions pulls the delta from that version where a delta is smaller."""
    rendezvous_seconds: float = 300.0
    """nccl: timeout of the rendezvous of the NCCL group's members; at the first rendezvous, engines are still
    starting."""
    group_size: int = 0
    """nccl: number of members of the NCCL group: the learner's rank 0 and all workers of all actors; set by the
    launcher."""

    def __post_init__(self) -> None:
        if self.keep_versions < 1:
            raise ValueError(f"weights.keep_versions={self.keep_versions} must be at least 1")
        if self.concurrent_pulls < 1:
            raise ValueError(f"weights.concurrent_pulls={self.concurrent_pulls} must be at least 1")
        if self.relay_fanout < 0:
            raise ValueError(f"weights.relay_fanout={self.relay_fanout} must be 0 (no tree) or above")
        if not self.bytes_per_second >= 0:
            raise ValueError(f"weights.bytes_per_second={self.bytes_per_second} must be 0 (no limit) or above")
        if not self.rendezvous_seconds > 0:
            raise ValueError(f"weights.rendezvous_seconds={self.rendezvous_seconds} must be above 0")
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
