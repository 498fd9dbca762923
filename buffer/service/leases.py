"""Lease requests: inventory, incarnations, and the requests that are parked until they can be granted.

Owned by `buffer/service/service.py`. A lease request waits for: admission (`buffer/ledger/admission.py`) and the
actor's share of the places (`buffer/service/fair_places.py`), an evaluation that the actor's weights are new enough
for, or the end of the run. Unblocked by: batches handed out, newer weights on the actor (its heartbeats count), ends of
leases. Gives up after: never; the client has a timeout.

A connection has at most one parked request. A newer request makes the buffer answer the older one with no leases. A
resent request that was answered before gets what it was granted and still has, from the ledger, so no lease is lost
when an answer is lost, also when the buffer restarts.

Inventory: a lease is alive because its holder says that it has it. `LeaseRequest.held` ends all other leases that were
granted to the connection's earlier requests. Why this ends only leases that the holder does not have:

- A client makes request n only after it has got, or given up, the answer to each earlier request. So at that moment it
  knows all it will ever know of leases granted to requests below n: those in `held`, and those it has finished.
- Leases granted to n itself or later are not touched, so an answer on its way is safe. That includes the first answer
  to n, when n is sent again.
- A finished lease is no longer leased, or its delivery or return is still to be received. If the request is received
  first, the actor has not got the receipt, so the group is in `held`.
- Reordering and resends: a copy of n that is received later repeats a claim that was true when n was made, and touches
  only leases granted before n. A copy of an earlier request finds that a newer one is known, and is granted nothing.
- A restart of the buffer, or silence for `lease_seconds`, makes it forget which requests were answered, except for
  those that still have leases. A copy of an old request may then be granted leases that nobody waits for. The client's
  next request has a larger number and does not hold them, so they end. A client that has room always makes a next
  request; one without room makes it when its next group is finished, at the latest.

A heartbeat ends only leases and evaluations granted to requests before the newest one that the buffer knows, because
the answer to that one may be on its way (`learn_inventory`). Its answer names the held groups that are not leased to
the sender, and the actor stops them. A group id whose lease has ended is never leased again, so this answer cannot be
outdated.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice

from buffer.config import BufferConfig
from buffer.ledger.admission import in_time, room, slot, wanted
from buffer.ledger.ledger import Holder, Ledger
from buffer.service.fair_places import Places, Speed
from buffer.service.incarnations import Incarnations
from buffer.service.progress import Progress
from buffer.service.waiting import Rank, Waiting
from buffer.transport import messages

log = logging.getLogger(__name__)

PRESUMED_DEAD_SECONDS = 15.0
"""Silence after which a parked request is not granted. A living process resends the request every few seconds."""

WANTS_NO_GROUPS: Rank = (math.inf, math.inf)
NO_LEASES = messages.LeaseReply(leases=(), evaluate_version=-1, closing=False)


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One answer, to be sent after the transaction's commit."""

    identity: bytes
    request_number: int
    message: messages.Message


@dataclass(slots=True)
class _Client:
    """One connection of one actor process."""

    actor_id: str
    heard: float
    answered: int
    """Number of the newest request that was answered, as far as the buffer knows; -1: none."""
    version_number: int = -1
    """Number of the request that `policy_version` is from. A late resend of an older request changes nothing."""
    policy_version: int = -1
    parked: tuple[int, messages.LeaseRequest] | None = None
    parked_since: float = 0.0
    speed: Speed = field(default_factory=Speed)
    num_evaluations: int = 0
    """Evaluations that this connection was assigned."""

    def learn(self, number: int, policy_version: int) -> None:
        if number > self.version_number:
            self.version_number, self.policy_version = number, policy_version


class Leases:
    """Grants leases and evaluations. `now` is seconds of a monotonic clock."""

    def __init__(self, config: BufferConfig, ledger: Ledger, progress: Progress) -> None:
        self._config = config
        self._ledger = ledger
        self._progress = progress
        self._limits = config.limits
        self.places = Places(config.limits, waits=config.on_stale == "wait")
        self._useless = self._num_useless()
        self._out_of_turn: list[tuple[int, int, bytes]] = []
        """A heap of waiting connections that have had their turn: the batch with which the next one begins."""
        self._incarnations = Incarnations(ledger.file)
        self._clients: dict[bytes, _Client] = {}
        self._waiting = Waiting()
        self._alarms: list[tuple[float, int, bytes, _Client]] = []
        """A heap with one entry per client: when to look next whether it is silent, which is never too late."""
        self._numbers = itertools.count()
        self._evaluation_since: float | None = None
        """Since when an actor could run the oldest pending evaluation."""
        self.handling: tuple[bytes, int] | None = None
        """The parked request that `Service.wake` tries to answer now: identity and number."""

    # What the buffer hears.

    def heard(self, identity: bytes, now: float) -> None:
        """Extend the sender's leases, because any message proves that the sender is alive."""
        self._ledger.extend_deadline(holder_name(identity), now)
        client = self._clients.get(identity)
        if client is not None:
            was_silent = not self._is_alive(client, now)
            client.heard = now
            if was_silent:
                self.places.set_speed(identity, self.places.crowding.capacity(client.speed))
                self._queue(identity, client)

    def take_over(self, identity: bytes, actor_id: str) -> None:
        """Note that this process works under the name. If it is a new one, end the leases of the one before."""
        name = holder_name(identity)
        replaced = self._incarnations.hear(name, actor_id)
        if replaced is None:
            return
        self._changing(replaced.encode())
        self._forget(replaced.encode())
        for old in sorted({replaced, *self._ledger.other_holders(name, actor_id)}):
            released = self._ledger.release(old)
            log.info("%s replaces %s: %d leases pending again", name, old, released)

    def is_replaced(self, identity: bytes) -> bool:
        """Return whether a newer process has taken the sender's name over."""
        return self._incarnations.is_replaced(holder_name(identity))

    def learn_version(self, identity: bytes, number: int, policy_version: int, now: float) -> None:
        """Note the version of the actor's weights, from its heartbeat `number`."""
        client = self._clients.get(identity)
        if client is None:
            return
        if client.policy_version == policy_version:
            # Most heartbeats say nothing new, and thousands of actors send them.
            if number > client.version_number:
                self._ledger.file.on_undo(partial(setattr, client, "version_number", client.version_number))
                client.version_number = number
            return
        self._changing(identity)
        before = client.policy_version
        client.learn(number, policy_version)
        if client.policy_version != before:
            self.places.load(client.policy_version, now)
            self._queue(identity, client)

    def learn_inventory(self, identity: bytes, number: int, held: Collection[str], evaluating: Collection[int]) -> None:
        """End what the sender does not have any more, by its heartbeat `number`.

        A parked request says what its sender had when it was first sent. If the ledger loses receipts in a power cut,
        their groups are leased again, to a sender that may never send another request because they leave no room. A
        lost report leaves its evaluation running, and an actor sends no other request while one is parked.
        """
        client, name, evaluations = self._clients.get(identity), holder_name(identity), self._ledger.evaluations
        has_finished_groups = self._ledger.held[name] > len(held)
        if client is None or not (has_finished_groups or evaluations.num_unfinished):
            return
        # The sender had the answers to all requests before this one when it sent this one, and the heartbeat after it.
        newest = client.answered if client.parked is None else client.parked[0]
        if number <= newest:
            return
        if evaluations.release(name, newest, evaluating):
            log.warning("%s does not have an evaluation that is assigned to it: pending again", name)
        if has_finished_groups and self._ledger.release_unheld(Holder(name, client.actor_id, newest), held):
            log.warning("%s has finished groups that are leased to it: pending again", name)
            self.given_back(identity)

    def finished(self, identity: bytes, group_id: str, now: float) -> None:
        """Note that the sender has delivered a group that was leased to it."""
        client = self._clients.get(identity)
        if client is not None:
            self.places.crowding.finish(client.speed, group_id, now)
            client.speed.finish(now, has_more=self._ledger.held[holder_name(identity)] > 0)
            if self._is_alive(client, now):
                self.places.set_speed(identity, self.places.crowding.capacity(client.speed))
            self._queue(identity, client)

    def given_back(self, identity: bytes) -> None:
        """Note that the sender has fewer leases."""
        client = self._clients.get(identity)
        if client is not None:
            self._queue(identity, client)

    def request(self, identity: bytes, request: messages.LeaseRequest, number: int, now: float) -> list[Outgoing]:
        """Park a new request for `grant`. A resent or refused request is answered at once."""
        if request.data_fingerprint != self._config.data_fingerprint:
            reason = (
                f"actor {request.actor_id} reads prompts with fingerprint {request.data_fingerprint!r}, the run's is"
                f" {self._config.data_fingerprint!r}; give every process the same data"
            )
            return [Outgoing(identity, number, messages.Refused(reason))]
        client = self._changing(identity) or self._join(identity, request.actor_id, now)
        if request.policy_version > client.policy_version:
            self.places.load(request.policy_version, now)
        client.learn(number, request.policy_version)
        before = client.parked
        if number <= client.answered or (before is not None and number < before[0]):
            return [Outgoing(identity, number, self._granted_to(identity, number))]
        if before is None or number > before[0]:
            self._take_inventory(identity, request, number)
            client.parked = number, request
        if before is None:
            client.parked_since = now
        self._queue(identity, client)
        return [Outgoing(identity, before[0], NO_LEASES)] if before is not None and before[0] < number else []

    def leave(self, identity: bytes) -> int:
        """End everything that the connection holds, because its process ends. Returns the number of ended leases."""
        self._changing(identity)
        self._forget(identity)
        return self._ledger.release(holder_name(identity))

    def withdraw(self, identity: bytes, number: int) -> bool:
        """Forget a parked request, because it is refused. Returns False when there is none."""
        client = self._clients.get(identity)
        if client is None or client.parked is None or client.parked[0] != number:
            return False
        client.parked = None
        self._waiting.remove(identity)
        return True

    def take_batch(self, now: float) -> None:
        """Note that a batch was handed out."""
        useless = self._num_useless()
        self.places.take_batch(now, useless - self._useless)
        self._useless = useless

    def _num_useless(self) -> int:
        """Return the number of groups that became too stale, or lost tokens because they were."""
        counters = self._ledger.file.counters()
        return counters.get("stale", 0) + counters.get("masked", 0)

    def expire(self, now: float) -> None:
        """End the leases of silent actors. Forget silent connections."""
        for name in self._ledger.silent_holders(now):
            released = self._ledger.release(name)
            if released:
                log.warning(
                    "%s was silent for %.0f s: %d leases pending again", name, self._config.lease_seconds, released
                )
        due = []
        while self._alarms and self._alarms[0][0] < now:
            due.append(heapq.heappop(self._alarms)[2:])
        for identity, client in due:
            if self._clients.get(identity) is not client:
                continue
            if now - client.heard > self._config.lease_seconds:
                self._changing(identity)
                self._forget(identity)
                continue
            if not self._is_alive(client, now):
                self._set_aside(identity)
            self._watch(identity, client, now)

    def grant(self, now: float) -> list[Outgoing]:
        """Answer every parked request that can be answered."""
        if self._progress.closing and not self._ledger.evaluations.num_unfinished:
            # Until all evaluations are finished, idle actors keep waiting in case the actor that evaluates dies.
            return [self._answer(identity) for identity in list(self._waiting.oldest())]
        versions = self._assign_evaluations(now)
        leases = {} if self._progress.closing else self._issue(now)
        self._note_idle(now)
        self.handling = None
        answered = dict.fromkeys((*versions, *leases))
        return [self._answer(i, leases.get(i, ()), versions.get(i, -1)) for i in answered]

    def waits(self, now: float, most: int) -> list[messages.Wait]:
        """Return up to `most` actors that have waited longest for leases, and what each one waits for."""
        alive = (i for i in self._waiting.oldest() if self._is_alive(self._clients[i], now))
        waiting = [(identity, self._clients[identity]) for identity in islice(alive, most)]
        return [
            messages.Wait(c.actor_id, self._what_a_lease_lacks(i, c.policy_version), now - c.parked_since)
            for i, c in waiting
        ]

    def _what_a_lease_lacks(self, identity: bytes, policy_version: int) -> str:
        counts, next_version = self._ledger.counts, self._progress.next_version
        if self._progress.closing:
            return "the last evaluation"
        if slot(policy_version, next_version, self._limits) < 0:
            return f"newer weights: it has policy {policy_version}, the next batch is for policy {next_version}"
        if self._batches_ahead() < self._limits.num_slots and not self._wanted(policy_version):
            return "the end of the run: all groups that the run needs are leased or delivered"
        if self._admissible(policy_version) and self.places.had_its_part(identity):
            return "its next turn: it had its part of the places, and the learner does not wait"
        if self._admissible(policy_version):
            held, in_flight = self._ledger.held[holder_name(identity)], counts["leased"]
            return f"places beyond its share: it has {held} of {in_flight} leased groups"
        outstanding = f"{counts['leased']} leased and {counts['ready']} ready groups"
        return f"room: the batches within max_staleness are full, with {outstanding}"

    # Requests.

    def _join(self, identity: bytes, actor_id: str, now: float) -> _Client:
        """Make a client of a connection that is new, or that the buffer does not remember."""
        client = _Client(actor_id, now, self._ledger.newest_request(holder_name(identity)))
        self._clients[identity] = client
        self.places.set_speed(identity, 0.0)
        self._watch(identity, client, now)
        return client

    def _take_inventory(self, identity: bytes, request: messages.LeaseRequest, number: int) -> None:
        """End what was granted before a new request and its sender does not have."""
        holder = Holder(holder_name(identity), request.actor_id, number)
        ended = self._ledger.release_unheld(holder, request.held, request.evaluating)
        if ended:
            log.warning("%s does not have %d groups that were leased to it: pending again", holder.name, ended)

    def _changing(self, identity: bytes) -> _Client | None:
        """Return the connection's state, to be changed: if the transaction is undone, the state is as it is now.

        What was measured of the actor's speed is not undone.
        """
        client = self._clients.get(identity)
        kept = None if client is None else replace(client)
        self._ledger.file.on_undo(lambda: self._restore(identity, kept))
        return client

    def _restore(self, identity: bytes, kept: _Client | None) -> None:
        self._forget(identity)
        if kept is not None:
            self._clients[identity] = kept
            self.places.set_speed(identity, self.places.crowding.capacity(kept.speed))
            self._queue(identity, kept)
            self._watch(identity, kept, kept.heard)

    def _queue(self, identity: bytes, client: _Client) -> None:
        """Put a parked request in its place among those that wait, which its version and its rank decide.

        The rank is the number of batches with which its next turn begins, 0 unless it had its part, and then its load.
        """
        if client.parked is not None:
            load = self._ledger.held[holder_name(identity)] / self.places.part(identity)
            rank = (0.0, load) if client.parked[1].num_groups > 0 else WANTS_NO_GROUPS
            self._waiting.put(identity, client.policy_version, rank)

    def _watch(self, identity: bytes, client: _Client, now: float) -> None:
        """Look at the client again when it would be presumed dead, or after that when it would be forgotten."""
        seconds = self._config.lease_seconds
        if now - client.heard <= PRESUMED_DEAD_SECONDS:
            seconds = min(seconds, PRESUMED_DEAD_SECONDS)
        heapq.heappush(self._alarms, (client.heard + seconds, next(self._numbers), identity, client))

    def _set_aside(self, identity: bytes) -> None:
        """Grant nothing to a client, and share no places with it, until it is heard again."""
        self._waiting.remove(identity)
        self.places.remove(identity)

    def _forget(self, identity: bytes) -> None:
        self._set_aside(identity)
        self.places.forget(identity)
        self._clients.pop(identity, None)

    def _answer(self, identity: bytes, leases: Sequence[tuple[str, int]] = (), evaluate_version: int = -1) -> Outgoing:
        """Answer the parked request of a client."""
        client = self._changing(identity)
        assert client is not None and client.parked is not None
        client.answered, client.parked = client.parked[0], None
        self._waiting.remove(identity)
        return Outgoing(identity, client.answered, self._reply(leases, evaluate_version))

    def _granted_to(self, identity: bytes, number: int) -> messages.LeaseReply:
        """Return what this request was granted and still has."""
        name = holder_name(identity)
        return self._reply(self._ledger.leases_of(name, number), self._ledger.evaluations.taken(name, number))

    # Grants.

    def _assign_evaluations(self, now: float) -> dict[bytes, int]:
        """Assign pending evaluations to waiting actors: those that had the fewest first, then those with fewest groups.

        The first actor with new weights would else get every evaluation. So the choice waits until the others have had
        time to load them.

        Returns:
            The versions to evaluate, by connection.
        """
        assigned: dict[bytes, int] = {}
        evaluations = self._ledger.evaluations
        if evaluations.oldest_pending is None:
            self._evaluation_since = None
        while (version := evaluations.oldest_pending) is not None:
            if all(known < version for known in self._waiting.versions()):
                break
            if self._evaluation_since is None:
                self._evaluation_since = now
            if now - self._evaluation_since < self.places.patience and not self._progress.closing:
                break
            able = [
                (client.num_evaluations, self._ledger.held[holder_name(identity)], client.parked_since, identity)
                for identity in self._waiting.with_version(version)
                if identity not in assigned and self._is_alive(client := self._clients[identity], now)
            ]
            if not able:
                break
            identity = min(able)[3]
            client = self._clients[identity]
            assert client.parked is not None
            self._changing(identity)
            self.handling = identity, client.parked[0]
            evaluations.assign(version, holder_name(identity), client.parked[0])
            self._ledger.start_deadline(holder_name(identity), now)
            client.num_evaluations += 1
            assigned[identity] = version
        return assigned

    def _issue(self, now: float) -> dict[bytes, list[tuple[str, int]]]:
        """Lease groups to waiting actors, as many as admission has room for. Returns the leases by connection."""
        issued: dict[bytes, list[tuple[str, int]]] = {}
        while self._out_of_turn and self._out_of_turn[0][0] <= self.places.num_batches:
            identity = heapq.heappop(self._out_of_turn)[2]
            if identity in self._waiting:
                self._queue(identity, self._clients[identity])
        while True:
            rooms = {version: self._admissible(version) for version in self._waiting.versions()}
            numbers = self._allot({version: number for version, number in rooms.items() if number}, now)
            for identity, number in numbers.items():
                client, name = self._clients[identity], holder_name(identity)
                assert client.parked is not None
                self.handling = identity, client.parked[0]
                holder = Holder(name, client.parked[1].actor_id, client.parked[0])
                leases = [self._ledger.issue(holder, client.policy_version, now) for _ in range(number)]
                client.speed.begin([group_id for group_id, _ in leases], self._ledger.held[name], now)
                issued.setdefault(identity, []).extend(leases)
            # Rooms of different versions overlap, so `_allot` may have left some of them.
            if not numbers or len(rooms) == 1:
                return issued
            for identity in numbers:
                self._waiting.remove(identity)

    def _allot(self, rooms: dict[int, int], now: float) -> dict[bytes, int]:
        """Divide the room, one group at a time, each to the least loaded actor, as long as it is below its share.

        An actor that had its part of the batch's places comes after the others until its next turn.

        Args:
            rooms: number of groups that may be started with weights of each version. Each group takes one of them all.
            now: the time.

        Returns:
            Number of groups by connection.
        """
        numbers: dict[bytes, int] = {}
        leased = self._leased().total()
        while True:
            heads = [head for version in rooms if (head := self._waiting.first(version)) is not None]
            rank, _, identity = min(heads, default=(WANTS_NO_GROUPS, 0, b""))
            if rank == WANTS_NO_GROUPS:
                return numbers
            client, number = self._clients[identity], numbers.get(identity, 0)
            assert client.parked is not None
            held = self._ledger.held[holder_name(identity)] + number
            if not self._is_alive(client, now):
                self._set_aside(identity)
                continue
            if held >= self.places.share(identity) and self.places.keep(leased, now):
                return numbers
            if self.places.is_out_of_turn(identity, now):
                if rank[0] > self.places.num_batches:
                    return numbers
                turn = self.places.next_turn(identity)
                heapq.heappush(self._out_of_turn, (turn, next(self._numbers), identity))
                self._waiting.put(identity, client.policy_version, (turn, rank[1]))
                continue
            self.places.take(identity)
            if not number:
                self._changing(identity)
            numbers[identity] = number + 1
            leased += 1
            rooms = {version: left - 1 for version, left in rooms.items() if left > 1}
            if number + 1 == client.parked[1].num_groups:
                self._waiting.remove(identity)
            else:
                load = (held + 1) / self.places.part(identity)
                self._waiting.put(identity, client.policy_version, (0.0, load))

    def _note_idle(self, now: float) -> None:
        """Note that the learner waits, and an actor without groups too, because the others have all places."""
        if self.places.is_late or not self.places.learner_waits:
            return
        for version in self._waiting.versions():
            first = self._waiting.first(version)
            has_none = first is not None and first[0][1] == 0.0
            is_in_time = slot(version, self._progress.next_version, self._limits) >= 0
            if has_none and is_in_time and not self._admissible(version):
                self.places.note_late(now)

    @staticmethod
    def _is_alive(client: _Client, now: float) -> bool:
        return now - client.heard <= PRESUMED_DEAD_SECONDS

    def _admissible(self, policy_version: int) -> int:
        """Return the number of groups that an actor at `policy_version` may start now."""
        number = room(self._outstanding(), policy_version, self._progress.next_version, self._limits)
        return min(number, self._wanted(policy_version)) if number else 0

    def _outstanding(self) -> Counter[int]:
        """Count leased and ready groups by oldest version, without leased groups that no batch waits for."""
        return self._leased() + self._ledger.ready

    def _leased(self) -> Counter[int]:
        """Count leased groups by version, without those that no batch waits for."""
        if self._config.on_stale == "wait":
            return self._ledger.leased
        return in_time(self._ledger.leased, self._progress.next_version, self._limits)

    def _wanted(self, policy_version: int) -> int:
        """Return the number of new groups that the batches ahead need."""
        outstanding, reusable = self._outstanding(), self._ledger.batches.reusable
        where = policy_version, self._progress.next_version, self._limits, self._batches_ahead()
        return wanted(outstanding, reusable, *where)

    def _batches_ahead(self) -> int:
        """Return the number of batches to sample for: the slots, but at most the batches that the run still needs."""
        done = self._progress.next_version // self._limits.updates_per_batch
        left = self._config.num_batches - done if self._config.num_batches else self._limits.num_slots
        return max(0, min(left, self._limits.num_slots))

    def _reply(self, leases: Sequence[tuple[str, int]], evaluate_version: int) -> messages.LeaseReply:
        granted = []
        for group_id, prompt_id in leases:
            stage = self._ledger.curriculum.stage_of(int(group_id.partition(".")[0]))
            how = stage.samples_per_group, stage.max_new_tokens
            granted.append(messages.Lease(group_id, prompt_id, *how))
        return messages.LeaseReply(tuple(granted), evaluate_version, self._progress.closing)


def holder_name(identity: bytes) -> str:
    """Return a connection's name in the ledger and the logs."""
    return identity.decode("utf-8", "backslashreplace")
