"""Heartbeats of one learner rank, from a thread of their own: they go on while a step takes as long as it may.

They begin before the rank loads its model. The training loop says what it does or waits for; the display shows it. A
deadlock of the ranks does not end the heartbeats, so they also carry the number of finished pieces of work, and how
long the present one may take (`learner/monitoring/pace.py`).
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass

from buffer.process import start_thread
from buffer.transport.connection import Connection
from buffer.transport.messages import Heartbeat, Message
from learner.monitoring.pace import Pace

BEAT_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class _State:
    policy_version: int
    waiting_for: str = ""
    activity: str = ""
    since: float = 0.0


class Heartbeats:
    """Sends a heartbeat every `BEAT_SECONDS` from the first `say` until `close`.

    Args:
        buffer: connection to the buffer.
        rank: of this learner rank.
    """

    def __init__(self, buffer: Connection, rank: int) -> None:
        self._buffer, self._name = buffer, f"learner-{rank}"
        self.metrics: dict[str, float] = {}
        """Sent with every heartbeat; replace it, do not change it."""
        self.pace = Pace()
        """Tell it of pieces of work that end within an activity."""
        self._state = _State(-1)
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def say(self, policy_version: int, *, waiting_for: str = "", activity: str | None = None) -> None:
        """Note the rank's version, and what it waits for or does. The next heartbeat says so.

        Args:
            policy_version: of this rank; -1: none yet.
            waiting_for: words that complete "waits for"; empty: it does not wait.
            activity: words that complete the rank's name, with the version at their end; empty: nothing that takes
                long; None: the activity so far goes on, also after a wait.
        """
        last = self._state
        since = last.since
        self.pace.wait(bool(waiting_for))
        if activity is None:
            activity = last.activity
        if activity != last.activity:
            self.pace.begin(activity)
            since = time.monotonic()
        self._state = _State(policy_version, waiting_for, activity, since)
        if self._thread is None:
            self._thread = start_thread("heartbeat", self._beat)

    def message(self) -> Heartbeat:
        """Return the heartbeat of this moment."""
        state = self._state
        activity = "" if state.waiting_for else state.activity
        return Heartbeat(
            "learner",
            self._name,
            state.policy_version,
            state.waiting_for,
            self.metrics,
            activity=activity,
            activity_seconds=time.monotonic() - state.since if activity else 0.0,
            num_pieces=self.pace.num_pieces,
            limit_seconds=self.pace.limit_seconds,
        )

    def send(self) -> Future[Message]:
        """Send a heartbeat now. Returns the future of its answer."""
        return self._buffer.request(self.message(), timeout_seconds=60.0)

    def _beat(self) -> None:
        last: Future[Message] | None = None
        # ConnectionError: this process has closed the connection, because it ends.
        with suppress(ConnectionError):
            while not self._closing.wait(BEAT_SECONDS):
                if last is None or last.done():
                    last = self.send()

    def close(self) -> None:
        """End the thread."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join()
