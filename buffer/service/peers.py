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
"""Silence that is worse than any wait, with a heartbeat every second."""
HEARTBEATS_PER_SECOND = 500.0
"""Actors are asked to send fewer heartbeats than one a second when they would send more than this together."""
LONGEST_HEARTBEAT_SECONDS = 10.0
"""Longest time that they are asked to leave between two. Parked requests of an actor that has been silent for longer
than `PRESUMED_DEAD_SECONDS` are not granted."""
METRICS_KEPT = 64
TEXT_KEPT = 200
"""Characters of what a process waits for."""
SECONDS_PER_PEER = 2e-4
"""With more than `WORST` processes, the worst ones are looked for, and the totals computed, again only after this time
per process, so that frequent status requests cost little."""


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

    def badness(self, now: float, silent_after: float) -> tuple[float, float]:
        silent = self.silent_seconds(now)
        return silent if silent > silent_after else 0.0, self.waiting_seconds(now)

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
        self._looked_at: float | None = None
        self._totals = messages.ActorTotals()
        self._worst: list[tuple[str, str]] = []
        """Processes, the worst first, that a status may name although nobody asked for them."""
        self._longest_waits: list[tuple[str, str]] = []

    def heard(self, heartbeat: messages.Heartbeat, now: float) -> None:
        """Note a heartbeat."""
        key = heartbeat.role, heartbeat.name
        known = self._peers.get(key)
        unchanged = known is not None and known.heartbeat.waiting_for == heartbeat.waiting_for
        since = known.waiting_since if known is not None and unchanged else now
        self._forget(now, is_full=known is None and len(self._peers) >= MAX_PEERS)
        self._file.guard(self._peers, key)
        self._peers[key] = _Peer(heartbeat, now, since)

    @property
    def heartbeat_seconds(self) -> float:
        """Least time between two heartbeats of an actor."""
        return min(len(self._peers) / HEARTBEATS_PER_SECOND, LONGEST_HEARTBEAT_SECONDS)

    @property
    def _silent_after(self) -> float:
        """Silence that is worse than any wait: two heartbeats that did not come."""
        return max(SILENT_SECONDS, 2 * self.heartbeat_seconds)

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
        self._look(now)
        wanted = set(names)
        first = {key: peer for key, peer in self._peers.items() if key[0] == "learner" or key[1] in wanted}
        chosen = dict(list(first.items())[: messages.MAX_NAMED])
        others = [key for key in self._worst if key in self._peers and key not in first][:WORST]
        chosen |= {key: self._peers[key] for key in others}
        # In the order in which they came, so that no table jumps.
        if len(chosen) == len(self._peers):
            chosen = self._peers
        return tuple(peer.shown(now) for peer in chosen.values())

    def waits(self, now: float, known: Collection[str]) -> list[messages.Wait]:
        """Return the longest waits that heartbeats report, of processes that are not `known` already."""
        self._look(now)
        found = [self._peers[key] for key in self._longest_waits if key in self._peers and key[1] not in known]
        return [
            messages.Wait(p.heartbeat.name, p.heartbeat.waiting_for[:TEXT_KEPT], p.waiting_seconds(now))
            for p in found[:WORST]
            if p.heartbeat.waiting_for
        ]

    def totals(self, now: float) -> messages.ActorTotals:
        """Return the totals over all actors."""
        self._look(now)
        return self._totals

    def _look(self, now: float) -> None:
        """Look at all processes, unless that was done a short while ago."""
        number = len(self._peers)
        if self._looked_at is not None and number > WORST and now - self._looked_at < SECONDS_PER_PEER * number:
            return
        self._looked_at, silent_after = now, self._silent_after
        self._totals = self._count(now, silent_after)
        # Twice as many as a status names, because some of them may be named already.
        counted = (item for item in self._peers.items() if item[1].counts(now))
        worst = nlargest(2 * WORST, counted, key=lambda item: item[1].badness(now, silent_after))
        waiting = (item for item in self._peers.items() if item[1].heartbeat.waiting_for)
        longest = nlargest(2 * WORST, waiting, key=lambda item: item[1].waiting_seconds(now))
        self._worst, self._longest_waits = [key for key, _ in worst], [key for key, _ in longest]

    def _count(self, now: float, silent_after: float) -> messages.ActorTotals:
        newest = max((peer.heartbeat.policy_version for peer in self._peers.values()), default=-1)
        actors = [p for p in self._peers.values() if p.heartbeat.role == "actor" and p.counts(now)]
        return messages.ActorTotals(
            num_actors=len(actors),
            num_silent=sum(peer.silent_seconds(now) > silent_after for peer in actors),
            num_waiting=sum(bool(peer.heartbeat.waiting_for) for peer in actors),
            oldest_version=min((peer.heartbeat.policy_version for peer in actors), default=-1),
            newest_version=newest,
            metrics=over_actors([peer.heartbeat.metrics for peer in actors], METRICS_KEPT),
            silent_after_seconds=silent_after,
        )
