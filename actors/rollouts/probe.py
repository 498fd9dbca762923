"""Answers weight probes: scores the learner's sequence with this actor's engine and reports the log-probabilities.

The learner compares them with its own under the version that the engine names (`learner/monitoring/weight_probe.py`).
So they come from the engine that samples, by the way that tokens are sampled.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

from buffer.transport.messages import Message, Probe, ProbeReport

if TYPE_CHECKING:
    from actors.engine.engine import Engine

LEAST_LOGPROB = -1e4
"""Reported for anything below it, and for what is no number: messages carry only finite numbers."""


class Prober:
    """Answers one probe at a time.

    Args:
        actor_id: the actor's name.
        temperature: sampling temperature.
        engine: a started engine.
    """

    def __init__(self, actor_id: str, temperature: float, engine: Engine) -> None:
        self._actor_id, self._temperature, self._engine = actor_id, temperature, engine
        self._probe: Probe | None = None
        self._offered = asyncio.Event()

    def offer(self, probes: Sequence[Probe], policy_version: int) -> None:
        """Take a probe, unless one is being answered or this actor's `policy_version` is too old for it."""
        if self._probe is None and probes and policy_version >= probes[0].policy_version:
            self._probe = probes[0]
            self._offered.set()

    async def run(self, send: Callable[[Message], Awaitable[Message]]) -> None:
        """Answer probes until cancelled; `send` takes a report to the buffer.

        Waits for: a probe that the buffer sends with its answer to a heartbeat.
        """
        while True:
            await self._offered.wait()
            self._offered.clear()
            assert self._probe is not None
            report = await self._answer(self._probe)
            if report is not None:
                await send(report)
            self._probe = None

    async def _answer(self, probe: Probe) -> ProbeReport | None:
        """Return the report; None when weights were loaded in between, since the buffer repeats the probe."""
        started = time.monotonic()
        request_id = f"probe-{probe.probe_id}"
        scored = await self._engine.score(probe.token_ids, probe.num_scored, self._temperature, request_id)
        if scored is None:
            return None
        # Written so that nan becomes the least value too.
        logprobs = tuple(logprob if logprob > LEAST_LOGPROB else LEAST_LOGPROB for logprob in scored.logprobs)
        seconds = time.monotonic() - started
        return ProbeReport(self._actor_id, probe.probe_id, scored.policy_version, logprobs, seconds)
