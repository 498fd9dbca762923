"""Finds processes that live and do nothing: halted, silent, or without an answer. The supervisor kills what is found.

A process that ends is the supervisor's business; this is about those that do not end. Time in which the launcher itself
was frozen counts for nobody.
"""

from __future__ import annotations

from collections.abc import Mapping, Set

from buffer.transport.messages import Status

LONGEST_TURN_SECONDS = 1.0
"""A turn of the launcher takes less; what it takes longer it was not there to see."""
CONFIRMING_SECONDS = 5.0
"""A buffer that was frozen calls everybody silent until it has read what was sent to it meanwhile."""


class Watch:
    """Call `turn` every time the launcher looks after its processes.

    Args:
        hung_seconds: how long nothing may be heard of a process; 0: for ever.
    """

    def __init__(self, hung_seconds: float) -> None:
        self._hung_seconds = hung_seconds
        self._last_turn = 0.0
        self._awake = 0.0
        self._answered_at: float | None = None
        self._since: dict[tuple[str, str], float] = {}
        self._silent: dict[str, float] = {}

    @property
    def unanswered_seconds(self) -> float:
        """How long the buffer has not answered; 0 before its first answer."""
        return 0.0 if self._answered_at is None else self._awake - self._answered_at

    def turn(
        self, now: float, status: Status | None, stopped: Set[str], running_seconds: Mapping[str, float]
    ) -> dict[str, str]:
        """Who hangs, and why it is thought so.

        Args:
            now: of a monotonic clock.
            status: the buffer's answer, if one came since the last turn.
            stopped: names of the processes that are halted.
            running_seconds: how long each has been running, by name.
        """
        self._awake += min(now - self._last_turn, LONGEST_TURN_SECONDS) if self._last_turn else 0.0
        self._last_turn = now
        if status is not None:
            self._answered_at = self._awake
            self._silent = {peer.name: peer.silent_seconds for peer in status.peers if peer.role == "actor"}
        if not self._hung_seconds:
            return {}
        hung = {}
        for name, seconds in running_seconds.items():
            if self._lasts(name, "halted", name in stopped) > self._hung_seconds:
                hung[name] = f"was halted for {self._hung_seconds:.0f} s"
            # What was heard before this process started was said by its predecessor.
            silent = self._hung_seconds < self._silent.get(name, 0.0) < seconds
            if self._lasts(name, "silent", silent) > CONFIRMING_SECONDS and self.unanswered_seconds < 1.0:
                hung[name] = f"was silent for {self._hung_seconds:.0f} s"
        if self._hung_seconds < self.unanswered_seconds < running_seconds.get("buffer", 0.0):
            hung["buffer"] = f"did not answer for {self._hung_seconds:.0f} s"
        return hung

    def _lasts(self, name: str, what: str, holds: bool) -> float:
        """For how long something has held without a break."""
        if not holds:
            self._since.pop((name, what), None)
            return 0.0
        return self._awake - self._since.setdefault((name, what), self._awake)
