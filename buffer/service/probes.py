"""The weight probe at the buffer: passes the learner's probe to actors, in turn, and their reports back.

Owned by `buffer/service/service.py`. A round asks up to `ACTORS_PER_ROUND` of the live actors, those first whose last
turn is longest ago, so that every actor gets its turn. An actor gets the probe with each answer to its heartbeats until
its report is here, so a lost answer costs nothing. Nothing is stored: after a restart of the buffer the learner's next
request begins the round again.
"""

from __future__ import annotations

from buffer.transport.messages import MOST_PROBED_TOKENS, Probe, ProbeReport, ProbeReports, Refused

ACTORS_PER_ROUND = 32
LIVE_SECONDS = 15.0
"""Silence after which an actor is not asked and not waited for."""
MOST_TOKENS = 64


class Probes:
    """One round at a time. `now` is seconds of a monotonic clock."""

    def __init__(self) -> None:
        self._probe: Probe | None = None
        self._reports: dict[str, ProbeReport | None] = {}
        """By actor that is asked in this round; None: not here yet."""
        self._heard: dict[str, float] = {}
        self._last_turn: dict[str, int] = {}
        """Number of an actor's last turn; turns are counted over all actors."""
        self._num_turns = 0

    def request(self, probe: Probe, now: float) -> ProbeReports | Refused:
        """Answer the learner. Another probe than before begins a round; so does the same one while nobody is asked."""
        num_tokens = len(probe.token_ids)
        if not (0 < probe.num_scored <= MOST_PROBED_TOKENS and probe.num_scored < num_tokens <= MOST_TOKENS):
            return Refused(
                f"a probe scores {probe.num_scored} of {num_tokens} tokens; it may have {MOST_TOKENS} tokens and score"
                f" the last {MOST_PROBED_TOKENS} of them, but never the first"
            )
        self._heard = {name: heard for name, heard in self._heard.items() if now - heard <= LIVE_SECONDS}
        if self._probe is None or probe.probe_id != self._probe.probe_id or not self._reports:
            self._begin(probe)
        unanswered = [name for name, report in self._reports.items() if report is None and name in self._heard]
        reports = tuple(report for report in self._reports.values() if report is not None)
        return ProbeReports(reports, len(unanswered), len(self._heard))

    def _begin(self, probe: Probe) -> None:
        self._last_turn = {name: self._last_turn.get(name, 0) for name in self._heard}
        asked = sorted(self._last_turn, key=lambda name: (self._last_turn[name], name))[:ACTORS_PER_ROUND]
        self._probe, self._reports = probe, dict.fromkeys(asked)
        for name in asked:
            self._num_turns += 1
            self._last_turn[name] = self._num_turns

    def due(self, actor_id: str, now: float) -> tuple[Probe, ...]:
        """Note that the actor lives. Returns the probe if the actor is asked and has not answered."""
        self._heard[actor_id] = now
        is_asked = actor_id in self._reports and self._reports[actor_id] is None
        return (self._probe,) if self._probe is not None and is_asked else ()

    def report(self, report: ProbeReport) -> None:
        """Keep an actor's report. One that nobody asked for, that is late or of another length changes nothing."""
        probe, actor_id = self._probe, report.actor_id
        if probe is None or report.probe_id != probe.probe_id or len(report.logprobs) != probe.num_scored:
            return
        if actor_id in self._reports:
            self._reports[actor_id] = report
