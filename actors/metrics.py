"""What an actor has done and how long it had nothing to do: the numbers of its heartbeats."""

from __future__ import annotations

import time
from typing import Any


class Meter:
    """Counts and clocks of one actor. Idle is the time without any request in the engine, after the first one."""

    def __init__(self) -> None:
        self.num_in_flight = 0
        self._samples = self._tokens = self._loads = 0
        self._started = self._busy_since = 0.0
        self._busy_seconds = self._fetch_seconds = self._pause_seconds = 0.0

    def in_flight(self) -> Any:
        """Context of one request in the engine."""
        return _InFlight(self)

    def enter(self) -> None:
        """A request goes to the engine."""
        now = time.monotonic()
        if not self.num_in_flight:
            self._busy_since = now
            self._started = self._started or now
        self.num_in_flight += 1

    def leave(self) -> None:
        """A request is finished."""
        self.num_in_flight -= 1
        if not self.num_in_flight:
            self._busy_seconds += time.monotonic() - self._busy_since

    def sampled(self, num_samples: int, num_tokens: int) -> None:
        """Completions came out of the engine."""
        self._samples += num_samples
        self._tokens += num_tokens

    def loaded(self, fetch_seconds: float, pause_seconds: float) -> None:
        """A version went into the engine."""
        self._loads += 1
        self._fetch_seconds += fetch_seconds
        self._pause_seconds += pause_seconds

    def metrics(self) -> dict[str, float]:
        """Totals since the start, and the share of time without work."""
        now = time.monotonic()
        busy = self._busy_seconds + (now - self._busy_since if self.num_in_flight else 0.0)
        elapsed = now - self._started if self._started else 0.0
        return {
            "requests_in_flight": float(self.num_in_flight),
            "samples": float(self._samples),
            "tokens": float(self._tokens),
            "tokens_per_second": self._tokens / elapsed if elapsed else 0.0,
            "idle_fraction": 1.0 - busy / elapsed if elapsed else 0.0,
            "weight_loads": float(self._loads),
            "weight_fetch_seconds": self._fetch_seconds,
            "weight_pause_seconds": self._pause_seconds,
        }


class _InFlight:
    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    def __enter__(self) -> None:
        self._meter.enter()

    def __exit__(self, *_: object) -> None:
        self._meter.leave()
