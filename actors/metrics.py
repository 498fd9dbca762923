"""The metrics of one actor's heartbeats: how much it generated, how long it was idle, what its weight loads cost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Meter:
    """Counters and clocks of one actor. The actor is idle while no request is in the engine, after the first one."""

    def __init__(self) -> None:
        self.num_in_flight = 0
        """Requests in the engine."""
        self._samples = self._tokens = self._loads = self._overdue = 0
        self._started = self._busy_since = 0.0
        self._busy_seconds = self._fetch_seconds = self._pause_seconds = 0.0

    @contextmanager
    def in_flight(self) -> Iterator[None]:
        """Count one request as in the engine while the context is open."""
        now = time.monotonic()
        if not self.num_in_flight:
            self._busy_since = now
            self._started = self._started or now
        self.num_in_flight += 1
        try:
            yield
        finally:
            self.num_in_flight -= 1
            if not self.num_in_flight:
                self._busy_seconds += time.monotonic() - self._busy_since

    def sampled(self, num_samples: int, num_tokens: int) -> None:
        """Count completions and their sampled tokens."""
        self._samples += num_samples
        self._tokens += num_tokens

    def overdue(self) -> None:
        """Count one group whose time was over."""
        self._overdue += 1

    def loaded(self, fetch_seconds: float, pause_seconds: float) -> None:
        """Count one weight load: the time of its fetch, and the time for which it paused generation."""
        self._loads += 1
        self._fetch_seconds += fetch_seconds
        self._pause_seconds += pause_seconds

    def metrics(self) -> dict[str, float]:
        """Return totals since the actor started, and rates since its first request."""
        now = time.monotonic()
        busy = self._busy_seconds + (now - self._busy_since if self.num_in_flight else 0.0)
        elapsed = now - self._started if self._started else 0.0
        return {
            "requests_in_flight": float(self.num_in_flight),
            "samples": float(self._samples),
            "tokens": float(self._tokens),
            "tokens_per_second": self._tokens / elapsed if elapsed else 0.0,
            "idle_fraction": 1.0 - busy / elapsed if elapsed else 0.0,
            "groups_overdue": float(self._overdue),
            "weight_loads": float(self._loads),
            "weight_fetch_seconds": self._fetch_seconds,
            "weight_pause_seconds": self._pause_seconds,
        }
