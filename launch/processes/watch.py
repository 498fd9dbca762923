"""Finds processes that are alive but do nothing: halted, silent, not answering, or a learner whose work stands still.

The supervisor then kills them. A learner's ranks say in their heartbeats how many pieces of work they have finished,
and how long the present one may take (`learner/monitoring/pace.py`). Ranks wait for each other, so the learner hangs
only if every rank that is heard of is beyond its limit: then nobody waits for a rank that is still at work.

Processes that have ended are left to the supervisor. Time in which the launcher itself was frozen is not counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Set

from buffer.transport.messages import Peer, Status

LONGEST_TURN_SECONDS = 1.0
"""Longest plausible time between two turns. Any time above it was spent frozen and is not counted."""
CONFIRMING_SECONDS = 5.0
"""Time that silence must last to count: a buffer that was frozen reports silence until it has read its messages."""


class Watch:
    """Call `turn` in every pass of the launcher's loop.

    Args:
        hung_seconds: how long a process may be halted, silent or not answering, and the lowest limit for a piece of the
            learner's work; 0: for ever.
    """

    def __init__(self, hung_seconds: float) -> None:
        self._hung_seconds = hung_seconds
        self._last_turn = 0.0
        self._awake = 0.0
        self._answered_at: float | None = None
        self._since: dict[tuple[str, str], float] = {}
        self._silent: dict[str, float] = {}
        self._ranks: list[Peer] = []
        self._num_pieces: dict[str, int] = {}

    @property
    def unanswered_seconds(self) -> float:
        """Time since the buffer's last answer; 0 before its first."""
        return 0.0 if self._answered_at is None else self._awake - self._answered_at

    def turn(
        self, now: float, status: Status | None, stopped: Set[str], running_seconds: Mapping[str, float]
    ) -> dict[str, str]:
        """Find the processes that hang.

        Args:
            now: time of a monotonic clock.
            status: the buffer's answer if one has arrived since the last turn.
            stopped: names of the halted processes.
            running_seconds: how long each process has been running, by name.

        Returns:
            The reason for each, by name.
        """
        self._awake += min(now - self._last_turn, LONGEST_TURN_SECONDS) if self._last_turn else 0.0
        self._last_turn = now
        if status is not None:
            self._answered_at = self._awake
            self._silent = {peer.name: peer.silent_seconds for peer in status.peers if peer.role == "actor"}
            self._ranks = [peer for peer in status.peers if peer.role == "learner"]
        if not self._hung_seconds:
            return {}
        hung = {}
        if standing := self._standing(running_seconds.get("learner", 0.0)):
            hung["learner"] = standing
        for name, seconds in running_seconds.items():
            if self._lasts(name, "halted", name in stopped) > self._hung_seconds:
                hung[name] = f"was halted for {self._hung_seconds:.0f} s"
            # Silence longer than this process has been running is its predecessor's.
            silent = self._hung_seconds < self._silent.get(name, 0.0) < seconds
            if self._lasts(name, "silent", silent) > CONFIRMING_SECONDS and self.unanswered_seconds < 1.0:
                hung[name] = f"was silent for {self._hung_seconds:.0f} s"
        if self._hung_seconds < self.unanswered_seconds < running_seconds.get("buffer", 0.0):
            hung["buffer"] = f"did not answer for {self._hung_seconds:.0f} s"
        return hung

    def _standing(self, running_seconds: float) -> str:
        """Why the learner, which has been running for so long, hangs; empty: it does not."""
        reasons, is_standing = [], True
        for rank in self._ranks:
            same = self._num_pieces.get(rank.name) == rank.num_pieces
            self._num_pieces[rank.name] = rank.num_pieces
            # Longer than this learner has been running its predecessor stood still.
            seconds = min(self._lasts(rank.name, "standing", same and rank.limit_seconds > 0), running_seconds)
            if rank.silent_seconds < CONFIRMING_SECONDS:
                is_standing &= max(rank.limit_seconds, self._hung_seconds) < seconds
                reasons.append(f"{rank.name} {rank.activity} and finished no piece of it for {seconds:.0f} s")
        limit = max((rank.limit_seconds for rank in self._ranks), default=0.0)
        if not reasons or not is_standing or self.unanswered_seconds > 1.0:
            return ""
        return f"stands still: {'; '.join(reasons)} (the limit is {limit:.0f} s)"

    def _lasts(self, name: str, what: str, holds: bool) -> float:
        """How long a condition has held for a process without a break."""
        if not holds:
            self._since.pop((name, what), None)
            return 0.0
        return self._awake - self._since.setdefault((name, what), self._awake)
