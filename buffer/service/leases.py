"""Lease requests: parked until they can be granted, and answered the same way when an actor resends them.

Owned by `buffer/service/service.py`. A lease request waits for: admission (`buffer/ledger/admission.py`), an
evaluation that the actor's weights are new enough for, or the end of the run. Unblocked by: batches handed out, newer
weights on the actor (its heartbeats count), ends of leases. Gives up after: never; the client has a timeout.

A connection has at most one parked request. A newer request makes the buffer answer the older one with no leases. A
resent request gets the same answer again, from memory or, after a restart of the buffer, from the ledger. So no lease
is lost when an answer is lost.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from dataclasses import dataclass, field, replace
from heapq import nsmallest

from buffer.config import BufferConfig
from buffer.ledger.admission import in_time, room, slot, wanted
from buffer.ledger.ledger import Holder, Ledger
from buffer.service.progress import Progress
from buffer.transport import messages

log = logging.getLogger(__name__)

REPLIES_KEPT = 8
"""Answers remembered per connection, for requests that were resent before their answer arrived."""
PRESUMED_DEAD_SECONDS = 15.0
"""Silence after which a parked request is not granted. A living process resends the request every few seconds."""

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
    version_number: int = -1
    """Number of the request that `policy_version` is from. A late resend of an older request changes nothing."""
    policy_version: int = -1
    parked: tuple[int, messages.LeaseRequest] | None = None
    parked_since: float = 0.0
    replies: OrderedDict[int, messages.LeaseReply] = field(default_factory=OrderedDict)

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
        self._clients: dict[bytes, _Client] = {}
        self.handling: tuple[bytes, int] | None = None
        """The parked request that `Service.wake` tries to answer now: identity and number."""

    def heard(self, identity: bytes, now: float) -> None:
        """Extend the sender's leases, because any message proves that the sender is alive."""
        self._ledger.extend_deadline(holder_name(identity), now)
        if identity in self._clients:
            self._clients[identity].heard = now

    def learn_version(self, identity: bytes, number: int, policy_version: int) -> None:
        """Note the version of the actor's weights, from its heartbeat `number`."""
        client = self._remembering(identity)
        if client is not None:
            client.learn(number, policy_version)

    def request(self, identity: bytes, request: messages.LeaseRequest, number: int, now: float) -> list[Outgoing]:
        """Park a new request for `grant`. A resent or refused request is answered at once."""
        if request.data_fingerprint != self._config.data_fingerprint:
            reason = (
                f"actor {request.actor_id} reads prompts with fingerprint {request.data_fingerprint!r}, the run's is"
                f" {self._config.data_fingerprint!r}; give every process the same data"
            )
            return [Outgoing(identity, number, messages.Refused(reason))]
        client = self._remembering(identity)
        known = self._granted_before(identity, request, number) if client is None else client.replies.get(number)
        if client is None:
            self._replace_predecessors(identity, request.actor_id)
            client = self._clients[identity] = _Client(request.actor_id, now)
        client.learn(number, request.policy_version)
        if known is not None:
            return [self._remember(identity, client, number, known)]
        newest = max(client.replies, default=-1) if client.parked is None else client.parked[0]
        if number < newest:
            return [Outgoing(identity, number, NO_LEASES)]
        superseded = client.parked is not None and client.parked[0] < number
        if client.parked is None:
            client.parked_since = now
        client.parked = (number, request)
        return [Outgoing(identity, newest, NO_LEASES)] if superseded else []

    def leave(self, identity: bytes) -> int:
        """End everything that the connection holds, because its process ends. Returns the number of ended leases."""
        if self._remembering(identity) is not None:
            del self._clients[identity]
        return self._ledger.release(holder_name(identity))

    def expire(self, now: float) -> None:
        """End the leases of silent actors. Forget silent connections."""
        seconds = self._config.lease_seconds
        for name in self._ledger.silent_holders(now):
            released = self._ledger.release(name)
            if released:
                log.warning("%s was silent for %.0f s: %d leases pending again", name, seconds, released)
        for identity in [i for i, client in self._clients.items() if now - client.heard > seconds]:
            self._remembering(identity)
            del self._clients[identity]

    def grant(self, now: float) -> list[Outgoing]:
        """Answer every parked request that can be answered."""
        outgoing: list[Outgoing] = []
        for identity, client in self._clients.items():
            if client.parked is None or now - client.heard > PRESUMED_DEAD_SECONDS:
                continue
            number, request = client.parked
            self.handling = identity, number
            reply = self._try(Holder(holder_name(identity), request.actor_id, number), client, request, now)
            if reply is not None:
                self._remembering(identity)
                client.parked = None
                outgoing.append(self._remember(identity, client, number, reply))
        self.handling = None
        return outgoing

    def withdraw(self, identity: bytes, number: int) -> bool:
        """Forget a parked request, because it is refused. Returns False when there is none."""
        client = self._clients.get(identity)
        if client is None or client.parked is None or client.parked[0] != number:
            return False
        client.parked = None
        return True

    def _remembering(self, identity: bytes) -> _Client | None:
        """Return the connection's state, to be changed: if the transaction is undone, the state is as it is now."""
        client = self._clients.get(identity)
        if client is None:
            self._ledger.file.guard(self._clients, identity)
        else:
            kept = replace(client, replies=client.replies.copy())
            self._ledger.file.on_undo(lambda: self._clients.update({identity: kept}))
        return client

    def waits(self, now: float, most: int) -> list[messages.Wait]:
        """Return up to `most` actors that have waited longest for leases, and what each one waits for."""
        waiting = [c for c in self._clients.values() if c.parked and now - c.heard <= PRESUMED_DEAD_SECONDS]
        longest = nsmallest(most, waiting, key=lambda client: client.parked_since)
        return [
            messages.Wait(c.actor_id, self._what_a_lease_lacks(c.policy_version), now - c.parked_since) for c in longest
        ]

    def _what_a_lease_lacks(self, policy_version: int) -> str:
        counts, next_version = self._ledger.counts, self._progress.next_version
        if self._progress.closing:
            return "the last evaluation"
        if slot(policy_version, next_version, self._limits) < 0:
            return f"newer weights: it has policy {policy_version}, the next batch is for policy {next_version}"
        if self._batches_ahead() < self._limits.num_slots and not self._wanted(policy_version):
            return "the end of the run: all groups that the run needs are leased or delivered"
        outstanding = f"{counts['leased']} leased and {counts['ready']} ready groups"
        return f"room: the batches within max_staleness are full, with {outstanding}"

    def _try(
        self, holder: Holder, client: _Client, request: messages.LeaseRequest, now: float
    ) -> messages.LeaseReply | None:
        evaluations, closing = self._ledger.evaluations, self._progress.closing
        evaluate_version = evaluations.take(client.policy_version, holder.name, holder.request_number)
        if evaluate_version >= 0:
            self._ledger.start_deadline(holder.name, now)
        number = 0 if closing else min(request.num_groups, self._admissible(client.policy_version))
        leases = [self._ledger.issue(holder, client.policy_version, now) for _ in range(number)]
        # Until all evaluations are finished, idle actors keep waiting in case the actor that evaluates dies.
        finished = closing and not evaluations.num_unfinished()
        if leases or evaluate_version >= 0 or finished:
            return self._reply(leases, evaluate_version)
        return None

    def _admissible(self, policy_version: int) -> int:
        """Return the number of groups that an actor at `policy_version` may start now."""
        number = room(self._outstanding(), policy_version, self._progress.next_version, self._limits)
        return min(number, self._wanted(policy_version)) if number else 0

    def _outstanding(self) -> Counter[int]:
        """Count leased and ready groups by oldest version, without leased groups that no batch waits for."""
        leased = self._ledger.leased
        if self._config.on_stale != "wait":
            leased = in_time(leased, self._progress.next_version, self._limits)
        return leased + self._ledger.ready

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

    def _granted_before(
        self, identity: bytes, request: messages.LeaseRequest, number: int
    ) -> messages.LeaseReply | None:
        """Return the answer to a resent request that was granted before a restart of the buffer.

        None if the request was not granted then.
        """
        holder = Holder(holder_name(identity), request.actor_id, number)
        leases = self._ledger.leases_of(holder)
        version = self._ledger.evaluations.taken(holder.name, number)
        return self._reply(leases, version) if leases or version >= 0 else None

    def _replace_predecessors(self, identity: bytes, actor_id: str) -> None:
        """End the leases of the actor's previous process, because its new process does not sample those groups."""
        replaced = {i: c for i, c in self._clients.items() if c.actor_id == actor_id and i != identity}
        for old in replaced:
            self._remembering(old)
            del self._clients[old]
        names = {holder_name(old) for old in replaced}
        names.update(self._ledger.other_holders(holder_name(identity), actor_id))
        for name in sorted(names):
            released = self._ledger.release(name)
            log.info("%s replaces %s: %d leases pending again", holder_name(identity), name, released)

    def _reply(self, leases: list[tuple[str, int]], evaluate_version: int) -> messages.LeaseReply:
        granted = []
        for group_id, prompt_id in leases:
            stage = self._ledger.curriculum.stage_of(int(group_id.partition(".")[0]))
            how = stage.samples_per_group, stage.max_new_tokens
            granted.append(messages.Lease(group_id, prompt_id, *how))
        return messages.LeaseReply(tuple(granted), evaluate_version, self._progress.closing)

    def _remember(self, identity: bytes, client: _Client, number: int, reply: messages.LeaseReply) -> Outgoing:
        client.replies[number] = reply
        if len(client.replies) > REPLIES_KEPT:
            client.replies.popitem(last=False)
        return Outgoing(identity, number, reply)


def holder_name(identity: bytes) -> str:
    """Return a connection's name in the ledger and the logs."""
    return identity.decode("utf-8", "backslashreplace")
