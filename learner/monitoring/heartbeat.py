"""Heartbeats of one learner rank, from a thread of their own: they go on while a step takes as long as it may.

`Observer` owns the `Heartbeats`. The training loop says what it does or waits for; the display shows it.
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
        self._state = _State(0)
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def say(self, policy_version: int, *, waiting_for: str = "", activity: str = "") -> None:
        """Note the rank's version, and what it waits for or does. The next heartbeat says so."""
        now = time.monotonic()
        last = self._state
        if (last.waiting_for, last.activity) == (waiting_for, activity):
            now = last.since
        self._state = _State(policy_version, waiting_for, activity, now)
        if self._thread is None:
            self._thread = start_thread("heartbeat", self._beat)

    def message(self) -> Heartbeat:
        """Return the heartbeat of this moment."""
        state = self._state
        seconds = time.monotonic() - state.since if state.activity else 0.0
        return Heartbeat(
            "learner",
            self._name,
            state.policy_version,
            state.waiting_for,
            self.metrics,
            activity=state.activity,
            activity_seconds=seconds,
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
