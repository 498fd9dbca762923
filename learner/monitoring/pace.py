"""How fast the work of one learner rank goes, and how long its present piece may take before the rank counts as hung.

A piece of work ends with the next one, with a finished microbatch, or with the beginning of a wait. Works are of the
same kind if their descriptions differ only in the version. `Heartbeats` owns a `Pace` and sends its values; the
launcher ends a learner all of whose ranks have been at one piece for longer than their limits
(`launch/processes/watch.py`).

The training thread calls the methods, and the heartbeat thread reads the values.
"""

from __future__ import annotations

import time
from collections.abc import Callable

TIMES_LONGEST = 10.0
"""A piece may take this many times as long as the longest piece measured in works of its kind."""
LEAST_SECONDS = 600.0
"""Lowest limit, because a disk, a network or a shared machine may be slow for minutes."""
UNMEASURED_SECONDS = 6 * 3600.0
"""Limit until a work of the kind has ended: a first one may compile kernels, or read a large model from a slow disk."""


class Pace:
    """The pieces of work of one rank.

    Args:
        clock: returns seconds of a monotonic clock.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.num_pieces = 0
        """Pieces that have ended, and waits."""
        self._kind = ""
        self._is_waiting = False
        self._began = 0.0
        """When the present piece began."""
        self._longest_here = 0.0
        """Longest piece so far of the work under way."""
        self._longest: dict[str, float] = {}
        """Longest piece of the works that have ended, by kind."""

    @property
    def limit_seconds(self) -> float:
        """How long the present piece may take; 0: as long as it likes, since the rank waits, or does no known work."""
        if self._is_waiting or not self._kind:
            return 0.0
        measured = self._longest.get(self._kind)
        if measured is None:
            return UNMEASURED_SECONDS
        return max(LEAST_SECONDS, TIMES_LONGEST * max(measured, self._longest_here))

    def begin(self, work: str) -> None:
        """End the work under way, and begin `work`, such as "publishes policy 41"; empty: none."""
        self.end_piece()
        if self._kind:
            self._longest[self._kind] = max(self._longest.get(self._kind, 0.0), self._longest_here)
        self._kind, self._longest_here = work.rstrip("0123456789 "), 0.0

    def end_piece(self) -> None:
        """Note that a piece of the work under way has ended, and the next one begins."""
        now = self._clock()
        if self._kind and not self._is_waiting:
            self._longest_here = max(self._longest_here, now - self._began)
        self._began = now
        self.num_pieces += 1

    def wait(self, is_waiting: bool) -> None:
        """Begin or end a wait, whose time does not count. The work under way goes on after it."""
        if is_waiting != self._is_waiting:
            self.end_piece()
            self._is_waiting = is_waiting
