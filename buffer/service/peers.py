"""The last heartbeat of every process, and what of them goes into a status: a bounded part, and totals over all actors.

Owned by `buffer/service/service.py`. A run may have thousands of actors, and a status is asked for several times a
second. So it names the processes that the asker names, the learner, and the worst others: silent ones, then those that
wait longest. A process that has been silent for `COUNTED_SECONDS` is shown only to those that name it, and after
`FORGOTTEN_SECONDS` to nobody.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from heapq import nlargest

from buffer.actor_metrics import over_actors
from buffer.ledger.ledger_file import LedgerFile
from buffer.transport import messages

WORST = 50
"""Processes, and waits, that a status names beyond those that the asker names."""
FORGOTTEN_SECONDS = 900.0
MAX_PEERS = 10_000
COUNTED_SECONDS = 60.0
SILENT_SECONDS = 5.0
"""Silence that is worse than any wait."""
METRICS_KEPT = 64
TEXT_KEPT = 200
"""Characters of what a process waits for."""
SECONDS_PER_PEER = 2e-4
"""Totals are computed again after this time per process, so that frequent status requests cost little."""


@dataclass(frozen=True, slots=True)
class _Peer:
    heartbeat: messages.Heartbeat
    heard: float
    waiting_since: float

    def silent_seconds(self, now: float) -> float:
        return max(0.0, now - self.heard)

    def waiting_seconds(self, now: float) -> float:
        return max(0.0, now - self.waiting_since) if self.heartbeat.waiting_for else 0.0

    def counts(self, now: float) -> bool:
        return self.silent_seconds(now) < COUNTED_SECONDS

    def badness(self, now: float) -> tuple[float, float]:
        silent = self.silent_seconds(now)
        return silent if silent > SILENT_SECONDS else 0.0, self.waiting_seconds(now)

    def shown(self, now: float) -> messages.Peer:
        beat = self.heartbeat
        return messages.Peer(
            *(beat.role, beat.name, beat.policy_version, beat.waiting_for[:TEXT_KEPT], self.silent_seconds(now)),
            metrics=dict(list(beat.metrics.items())[:METRICS_KEPT]),
            waiting_seconds=self.waiting_seconds(now),
            activity=beat.activity[:TEXT_KEPT],
            activity_seconds=beat.activity_seconds + self.silent_seconds(now) if beat.activity else 0.0,
            num_pieces=beat.num_pieces,
            limit_seconds=beat.limit_seconds,
        )


class Peers:
    """The processes that have sent a heartbeat. `now` is seconds of a monotonic clock.

    Args:
        file: the ledger's, whose open transaction a change belongs to.
    """

    def __init__(self, file: LedgerFile) -> None:
        self._file = file
        self._forget_at = 0.0
        self._peers: dict[tuple[str, str], _Peer] = {}
        self._totals = messages.ActorTotals()
        self._totals_at: float | None = None

    def heard(self, heartbeat: messages.Heartbeat, now: float) -> None:
        """Note a heartbeat."""
        key = heartbeat.role, heartbeat.name
        known = self._peers.get(key)
        unchanged = known is not None and known.heartbeat.waiting_for == heartbeat.waiting_for
        since = known.waiting_since if known is not None and unchanged else now
        self._forget(now, is_full=known is None and len(self._peers) >= MAX_PEERS)
        self._file.guard(self._peers, key)
        self._peers[key] = _Peer(heartbeat, now, since)

    def _forget(self, now: float, *, is_full: bool) -> None:
        """Forget the processes that left: now and then all that were silent for long; the most silent one if full."""
        gone = [min(self._peers, key=lambda key: self._peers[key].heard)] if is_full else []
        if now >= self._forget_at:
            self._forget_at = now + FORGOTTEN_SECONDS / 10
            gone += [key for key, peer in self._peers.items() if peer.silent_seconds(now) > FORGOTTEN_SECONDS]
        for key in set(gone):
            self._file.guard(self._peers, key)
            del self._peers[key]

    def shown(self, now: float, names: Collection[str] = ()) -> tuple[messages.Peer, ...]:
        """Return the learner's ranks and the processes called `names`, as far as known, and the worst of the others."""
        wanted = set(names)
        first = {key: peer for key, peer in self._peers.items() if key[0] == "learner" or key[1] in wanted}
        others = (item for item in self._peers.items() if item[0] not in first and item[1].counts(now))
        chosen = dict(list(first.items())[: messages.MAX_NAMED])
        chosen |= nlargest(WORST, others, key=lambda item: item[1].badness(now))
        # In the order in which they came, so that no table jumps.
        if len(chosen) == len(self._peers):
            chosen = self._peers
        return tuple(peer.shown(now) for peer in chosen.values())

    def waits(self, now: float, known: Collection[str]) -> list[messages.Wait]:
        """Return the longest waits that heartbeats report, of processes that are not `known` already."""
        waiting = (p for p in self._peers.values() if p.heartbeat.waiting_for and p.heartbeat.name not in known)
        return [
            messages.Wait(p.heartbeat.name, p.heartbeat.waiting_for[:TEXT_KEPT], p.waiting_seconds(now))
            for p in nlargest(WORST, waiting, key=lambda peer: peer.waiting_seconds(now))
        ]

    def totals(self, now: float) -> messages.ActorTotals:
        """Return the totals over all actors, at most `SECONDS_PER_PEER` per process old."""
        if self._totals_at is None or now - self._totals_at >= SECONDS_PER_PEER * len(self._peers) - SECONDS_PER_PEER:
            self._totals_at, self._totals = now, self._count(now)
        return self._totals

    def _count(self, now: float) -> messages.ActorTotals:
        newest = max((peer.heartbeat.policy_version for peer in self._peers.values()), default=-1)
        actors = [p for p in self._peers.values() if p.heartbeat.role == "actor" and p.counts(now)]
        return messages.ActorTotals(
            num_actors=len(actors),
            num_silent=sum(peer.silent_seconds(now) > SILENT_SECONDS for peer in actors),
            num_waiting=sum(bool(peer.heartbeat.waiting_for) for peer in actors),
            oldest_version=min((peer.heartbeat.policy_version for peer in actors), default=-1),
            newest_version=newest,
            metrics=over_actors([peer.heartbeat.metrics for peer in actors], METRICS_KEPT),
        )
