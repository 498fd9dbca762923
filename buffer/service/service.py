"""The buffer's answer to each message, without sockets.

Owned by `buffer/service/server.py`. Inside one ledger transaction the server calls `receive` for each message and then
`wake`, and it sends the returned answers after the commit. `buffer/service/leases.py` handles lease requests.

A batch request waits for: enough ready groups, and leased groups that would otherwise become too stale. Unblocked by:
deliveries, ends of leases. Gives up after: never; the client has a timeout. Every request may arrive again with the
same number, also after a restart of the buffer, and takes effect only once.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from buffer.config import BufferConfig
from buffer.ledger.admission import in_time, must_wait, oldest
from buffer.ledger.batches import BatchRow
from buffer.ledger.ledger import Ledger
from buffer.ledger.sampler import SAMPLERS, balance, next_batch
from buffer.ledger.stale_tokens import mask_older_tokens
from buffer.service.leases import Leases, Outgoing, holder_name
from buffer.service.peers import TEXT_KEPT, WORST, Peers
from buffer.service.probes import Probes
from buffer.service.progress import Progress
from buffer.transport import messages
from buffer.transport.packed_group import BYTES_PER_TOKEN, PackedGroup, check_bounds
from buffer.transport.roles import refusal
from buffer.transport.schema import WireError

log = logging.getLogger(__name__)

SHARD_BYTES = 16 << 20
"""Bytes of groups that the shards of one batch carry together. The ranks fetch the other groups one by one, so that
the buffer answers others in between; small groups cost no request each."""
Note = Callable[[bytes, Exception, float], None]
"""Called with a peer's name, what is wrong with its message, and the time."""
HELLOS_KEPT = 20
"""Earlier learners whose late hello is recognized."""
REPORTS_SHOWN = 20
HOLDERS_SHOWN = 8
REASONS_SHOWN = 32


@dataclass(frozen=True, slots=True)
class _ParkedBatch:
    request_number: int
    request: messages.BatchRequest
    since: float


class Service:
    """Answers messages from the ledger. `now` is seconds of a monotonic clock."""

    def __init__(self, config: BufferConfig, ledger: Ledger, note: Note = lambda *_: None) -> None:
        self._config, self._note = config, note
        self._ledger = ledger
        self._limits = config.limits
        self._progress = Progress(ledger.file)
        self._leases = Leases(config, ledger, self._progress)
        self._batches: dict[tuple[bytes, int], _ParkedBatch] = {}
        self._unchanged = -1
        """Number of changes of the ledger when no batch could be formed; while it stands, none can be."""
        self._peers = Peers(ledger.file)
        self._probes = Probes()
        self._learner_heard: float | None = None
        self.out_of_space_since: float | None = None
        """Monotonic time since when the ledger's disk is full; None: it is not. Set by `Turns`."""
        self.last_error = ""
        """The last message that raised, in one sentence for the display; empty: none. Set by `Turns`."""

    def receive(
        self, identity: bytes, message: messages.Message, number: int, now: float, role: str = ""
    ) -> list[Outgoing]:
        """Handle a message of a peer with this role. Returns the answers that are due at once; `wake` the others."""
        if reason := refusal(role, message):
            self._ledger.file.count("wrong_role")
            self._note(identity, ValueError(reason), now)
            return [Outgoing(identity, number, messages.Refused(reason))]
        self._leases.heard(identity, now)
        if reason := self._refuse_replaced(identity, message):
            self._ledger.file.count("replaced")
            return [Outgoing(identity, number, messages.Refused(reason, is_replaced=True))]
        if reason := self._refuse_late(message):
            self._ledger.file.count("earlier_learner")
            return [Outgoing(identity, number, messages.Refused(reason))]
        match message:
            case messages.LeaseRequest():
                if message.policy_version > self._newest_possible:
                    message = replace(message, policy_version=self._newest_possible)
                return self._leases.request(identity, message, number, now)
            case messages.BatchRequest():
                since = self._since(identity, message, now)
                self._ledger.file.guard(self._batches, (identity, message.rank))
                self._batches[identity, message.rank] = _ParkedBatch(number, message, since)
                self._set_policy_version(message.policy_version)
                return []
            case messages.LearnerHello():
                self._learner_heard = now
                reply = self._learner_hello(identity, message, number)
            case messages.Heartbeat():
                reply = self._heartbeat(identity, message, number, now)
            case messages.ActorGoodbye():
                log.info("%s says goodbye: %d leases pending again", message.actor_id, self._leases.leave(identity))
                reply = messages.Done()
            case messages.StatusRequest():
                reply = self.status(now, message.names)
            case messages.ProbeRequest():
                reply = self._probes.request(message.probe, now)
            case _:
                reply = self._from_actor(identity, message, now) or self._from_learner(message)
        return [Outgoing(identity, number, reply)]

    @property
    def _newest_possible(self) -> int:
        """The newest version that actors can have.

        One batch above the ledger's own: under durability normal a power failure may cost the ledger its last batch.
        """
        return self._progress.newest_version + self._limits.updates_per_batch

    def _refuse_late(self, message: messages.Message) -> str:
        """Return why a message of a learner that was replaced is refused; empty: it is not of such a learner."""
        epoch = self._progress.epoch
        # A learner that has not said hello yet has no epoch, and may say that it loads its model.
        if isinstance(message, messages.Heartbeat) and not (message.role == "learner" and message.epoch):
            return ""
        said = getattr(message, "epoch", epoch)
        if said == epoch:
            return ""
        return (
            f"{type(message).__name__} is from learner {said}, but learner {epoch} has started since; only the newest"
            " one goes on"
        )

    def _refuse_replaced(self, identity: bytes, message: messages.Message) -> str:
        """Return why an actor's process is refused; empty: no newer one has taken its name over.

        A process that was not heard before takes the name over.
        """
        match message:
            case messages.LeaseRequest(actor_id=name) | messages.Heartbeat(role="actor", name=name):
                self._leases.take_over(identity, name)
            case (
                messages.GroupDelivery(actor_id=name)
                | messages.LeaseReturn(actor_id=name)
                | messages.EvaluationReport(actor_id=name)
            ):
                pass
            case _:
                return ""
        if not self._leases.is_replaced(identity):
            return ""
        return f"another process took the name {name} over; give this one another --name"

    def wake(self, now: float, *, may_expire: bool = True) -> list[Outgoing]:
        """Answer every parked request that can be answered. First end the leases of silent actors, if `may_expire`."""
        if may_expire:
            self._leases.expire(now)
        outgoing: list[Outgoing] = []
        self._leases.handling = None
        for key, parked in list(self._batches.items()):
            self._leases.handling = key[0], parked.request_number
            reply = self._shard(parked.request, now - parked.since, now)
            if reply is not None:
                self._ledger.file.guard(self._batches, key)
                del self._batches[key]
                outgoing.append(Outgoing(key[0], parked.request_number, reply))
        self._leases.handling = None
        self._leases.places.learner_waits = bool(self._batches)
        return outgoing + self._leases.grant(now)

    @property
    def handling(self) -> tuple[bytes, int] | None:
        """Identity and number of the parked request whose answer raised in `wake`; None: the error was elsewhere."""
        return self._leases.handling

    def withdraw(self, identity: bytes, number: int) -> bool:
        """Forget a parked request, because it is refused. Returns False when there is none."""
        keys = [key for key, p in self._batches.items() if (key[0], p.request_number) == (identity, number)]
        for key in keys:
            del self._batches[key]
        return bool(keys) or self._leases.withdraw(identity, number)

    def status(self, now: float, names: Sequence[str] = ()) -> messages.Status:
        """Answer a `StatusRequest` that names the processes `names`."""
        ledger, progress = self._ledger, self._progress
        counts = dict.fromkeys(("pending", "leased", "ready", "used", "done"), 0)
        counts |= _largest(ledger.counts)
        counts |= {"issued": ledger.file.meta("issued", 0)} | ledger.file.counters()
        actors, peers = self._peers.totals(now), self._peers.shown(now, names)
        reports, waits, stage = ledger.evaluations.latest(REPORTS_SHOWN), self.waits(now), ledger.curriculum.status()
        known = counts, progress.policy_version, progress.closing, peers, reports, waits, stage
        notes = self.last_error, ledger.file.meta("poison_note", "")
        return messages.Status(*known, notes=tuple(filter(None, notes)), actors=actors, epoch=progress.epoch)

    def waits(self, now: float) -> tuple[messages.Wait, ...]:
        """Return the longest waits, longest first: of parked requests, and those that heartbeats of others report."""
        waits = self._leases.waits(now, WORST)
        for parked in self._batches.values():
            who, for_what = f"learner-{parked.request.rank}", self._what_a_batch_lacks(parked.request)
            waits.append(messages.Wait(who, for_what, now - parked.since))
        waits += self._peers.waits(now, {wait.who for wait in waits})
        waits = sorted(waits, key=lambda wait: -wait.seconds)[:WORST]
        if self.out_of_space_since is not None:
            waits.append(messages.Wait("buffer", "space on the ledger's disk", now - self.out_of_space_since))
        return tuple(sorted(waits, key=lambda wait: -wait.seconds))

    def _what_a_batch_lacks(self, request: messages.BatchRequest) -> str:
        ledger = self._ledger
        available = ledger.ready.total() + ledger.batches.num_reusable(request.policy_version)
        missing = self._limits.groups_per_batch - available
        holders, others = ledger.leased_by_actor(HOLDERS_SHOWN)
        where = ", ".join(f"{number} at {actor}" for actor, number in holders.items())
        where += f", {others} elsewhere" if others else ""
        where = f"leased: {where}" if where else "none is leased"
        if missing > 0:
            return f"{missing} more groups for policy {request.policy_version} ({where})"
        return f"older groups that would become too stale ({where})"

    def _from_actor(self, identity: bytes, message: messages.Message, now: float) -> messages.Message | None:
        ledger, holder = self._ledger, holder_name(identity)
        match message:
            case messages.GroupDelivery():
                group_id = message.group.header.group_id
                try:
                    self._check_bounds(message.group)
                except WireError as error:
                    self._note(identity, error, now)
                    return messages.GroupReceipt(group_id, ledger.refuse_delivery(group_id))
                outcome = ledger.deliver(message.group, self._progress.next_version)
                if outcome in ("stored", "dropped"):
                    self._leases.finished(identity, group_id, now)
                else:
                    log.info("group %s of %s is %s", group_id, message.actor_id, outcome)
                return messages.GroupReceipt(group_id, outcome)
            case messages.LeaseReturn():
                given_back = sum(ledger.give_back(group_id, holder, message.reason) for group_id in message.group_ids)
                self._leases.given_back(identity)
                log.info("%s gave %d leases back %s", message.actor_id, given_back, message.reason)
                return messages.Done()
            case messages.ProbeReport():
                self._probes.report(message)
                return messages.Done()
            case messages.EvaluationReport():
                if ledger.evaluations.report(message, holder):
                    log.info("policy %d: pass@1 %.3f", message.policy_version, message.pass_at_1)
                return messages.Done()
            case _:
                return None

    def _check_bounds(self, group: PackedGroup) -> None:
        config = self._config
        check_bounds(
            group,
            vocab_size=config.vocab_size,
            max_tokens=config.max_tokens,
            samples_per_group=config.samples_per_group,
            newest_version=self._newest_possible,
        )

    def _from_learner(self, message: messages.Message) -> messages.Message:
        match message:
            case messages.CheckpointCommitted() | messages.EvaluationRequest() if (
                message.policy_version > self._progress.next_version
            ):
                return messages.Refused(
                    f"{type(message).__name__} is for policy {message.policy_version}, but batches were handed out only"
                    f" up to policy {self._progress.next_version}"
                )
            case messages.CheckpointBegun():
                return self._begin_checkpoint(message.policy_version)
            case messages.CheckpointCommitted():
                done = self._ledger.commit(message.policy_version, self._progress.next_version)
                log.info("policy %d is committed: %d groups done", message.policy_version, done)
                return messages.Done()
            case messages.GroupRequest():
                return self._group(message)
            case messages.EvaluationRequest():
                self._ledger.evaluations.request(message.policy_version)
                return messages.Done()
            case messages.EvaluationQuery():
                evaluations = self._ledger.evaluations
                return messages.EvaluationReports(
                    evaluations.reports(message.since_version), is_running=bool(evaluations.holders())
                )
            case messages.Close():
                if not self._progress.closing:
                    self._progress.set(closing=True)
                    log.info("closing: no more leases")
                return messages.Done()
            case _:
                return messages.Refused(f"the buffer does not answer {type(message).__name__}")

    def _begin_checkpoint(self, version: int) -> messages.Message:
        """Make the batches that the checkpoint contains durable; refuse a checkpoint with batches not in the ledger."""
        next_version = self._progress.next_version
        if version > next_version:
            return messages.Refused(
                f"the checkpoint of policy {version} contains batches that the ledger does not: its next batch is for"
                f" policy {next_version}; the ledger lost its last moments, so the learner must start again from an"
                " older checkpoint"
            )
        self._ledger.file.make_durable()
        return messages.Done()

    # Batches.

    def _since(self, identity: bytes, request: messages.BatchRequest, now: float) -> float:
        """Return when the rank first sent this request. A resend does not restart the wait."""
        parked = self._batches.get((identity, request.rank))
        return parked.since if parked and parked.request == request else now

    def _shard(self, request: messages.BatchRequest, waited_seconds: float, now: float) -> messages.Message | None:
        """Return the rank's shard of the batch, which is formed for the first rank that asks.

        None while the learner has to wait.
        """
        version, world_size, limits = request.policy_version, request.world_size, self._limits
        if not 0 <= request.rank < world_size or limits.groups_per_batch % (world_size * limits.updates_per_batch):
            return messages.Refused(
                f"rank {request.rank} of {world_size} cannot have an equal share of {limits.groups_per_batch} groups in"
                f" each of {limits.updates_per_batch} optimizer steps; make buffer.groups_per_batch a multiple of the"
                " number of learner ranks times buffer.updates_per_batch"
            )
        rows = self._ledger.batches.batch(version)
        if not rows:
            refused = self._refuse_batch(version)
            if refused is not None or not self._cut(version, waited_seconds, now):
                return refused
            rows = self._ledger.batches.batch(version)
        costs = [row.cost(request.attention_crossover_tokens) for row in rows]
        shards = balance(costs, world_size, self._limits.updates_per_batch)
        mine = [rows[index] for index in shards[request.rank]]
        num_first = bisect_right(
            list(accumulate(row.num_tokens * BYTES_PER_TOKEN for row in mine)), SHARD_BYTES // world_size
        )
        groups = tuple(self._contents(row, version) for row in mine[:num_first])
        rest = tuple((row.occurrence, row.num_tokens) for row in mine[num_first:])
        return messages.Shard(version, len(rows), tuple(row.staleness for row in mine), groups, rest)

    def _group(self, request: messages.GroupRequest) -> messages.Message:
        """Read one group of a batch when it is asked for, so that no turn holds a whole batch of large groups."""
        version = request.policy_version
        row = self._ledger.batches.row(version, request.occurrence)
        if row is None:
            return messages.Refused(
                f"group {request.occurrence} is not, or no longer, in the batch for policy {version}"
            )
        return messages.ShardGroup(self._contents(row, version))

    def _contents(self, row: BatchRow, version: int) -> PackedGroup:
        """Return the group's contents; with on_stale=mask, the loss masks leave out tokens that are too stale."""
        packed, most = self._ledger.payload(row.occurrence), self._config.max_staleness
        masks = self._config.on_stale == "mask" and row.staleness > most
        return mask_older_tokens(packed, version - most) if masks else packed

    def _refuse_batch(self, version: int) -> messages.Refused | messages.NoMoreBatches | None:
        wanted, next_version = self._config.num_batches, self._progress.next_version
        if wanted and next_version >= wanted * self._limits.updates_per_batch:
            return messages.Refused(f"all {wanted} batches were handed out; raise buffer.num_batches to go on")
        if self._ledger.zero_advantage.stop_reason is not None:
            return messages.NoMoreBatches(self._ledger.zero_advantage.stop_reason)
        if version != next_version:
            return messages.Refused(
                f"the next batch is for policy {next_version}, not {version}; a learner that starts or goes back must"
                f" send LearnerHello first, and make {self._limits.updates_per_batch} optimizer steps per batch"
            )
        return None

    def _cut(self, version: int, waited_seconds: float, now: float) -> bool:
        """Form the batch for `version` and hand it out. Returns False when the learner has to wait."""
        ledger, config = self._ledger, self._config
        if self._unchanged == ledger.file.num_changes:
            return False
        is_early = self._is_early(version)
        candidates = [] if is_early else ledger.candidates(version)
        waits = config.on_stale == "wait"
        following = version + self._limits.updates_per_batch
        leased = ledger.leased if waits else in_time(ledger.leased, following, self._limits)
        groups = candidates, leased, ledger.ready
        chosen = next_batch(SAMPLERS[config.sampler], *groups, version, self._limits, seed=config.seed, waits=waits)
        if not chosen:
            if is_early or candidates:
                self._leases.places.note_late(now)
            ledger.file.guard(self.__dict__, "_unchanged")
            self._unchanged = ledger.file.num_changes
            return False
        ledger.use(chosen, version)
        self._progress.set(next_version=following)
        if not waits:
            ledger.drop_stale(following)
        ledger.curriculum.advance(following)
        staleness = [row.staleness for row in ledger.batches.batch(version)]
        too_old = sum(number > self._limits.max_staleness for number in staleness)
        if too_old and config.on_stale == "mask":
            ledger.file.count("masked", too_old)
        self._leases.take_batch(now)
        log.info(
            "batch for policy %d: %d groups, staleness mean %.2f max %d, waited %.1f s",
            *(version, len(chosen), sum(staleness) / len(staleness), max(staleness), waited_seconds),
        )
        return True

    def _is_early(self, version: int) -> bool:
        """Return whether the counts alone say that the batch for `version` must wait, as `next_batch` would say.

        While the learner waits, every turn asks. Reading the candidates each time would cost as much as the batch.
        """
        ledger, config, size = self._ledger, self._config, self._limits.groups_per_batch
        if config.on_stale != "wait" or config.sampler != "fifo" or config.max_uses > 1 or ledger.ready.total() < size:
            return False
        return must_wait(ledger.leased, ledger.ready, oldest(ledger.ready, size), version, self._limits)

    # Start and heartbeats.

    def _learner_hello(self, identity: bytes, hello: messages.LearnerHello, number: int) -> messages.Message:
        """Roll back to the learner's version. A resend, which may arrive after batches were served, changes nothing."""
        file, call = self._ledger.file, f"{holder_name(identity)} {number}"
        calls = file.meta("hello", "").split("\n")
        if calls[-1] == call:
            return self._welcome()
        if call in calls:
            return messages.Refused("another learner has started since this hello was answered; the newest one goes on")
        if hello.after_epoch not in (-1, self._progress.epoch):
            return messages.LearnerWelcome(0, 0, 0)
        version, next_version = hello.policy_version, self._progress.next_version
        if version > next_version:
            return messages.Refused(
                f"the learner starts at policy {version}, but the ledger has handed out batches only up to policy"
                f" {next_version}: it lost its latest transactions, as in a power failure, or belongs to another run;"
                f" resume from a checkpoint of policy {next_version} or older, or start a new run_dir"
            )
        # Durable, so that no later hello gets the same number after a power cut.
        file.make_durable()
        poison = self._ledger.poison.failed(hello.failed_version, hello.failed_groups, hello.failure_id)
        rolled_back = self._ledger.roll_back(version)
        if poison and (number_aside := self._ledger.set_aside(poison)):
            note = f"{number_aside} groups were set aside, the learner failed twice on their batch: {hello.failure}"
            log.error("%s; policy %d, groups %s", note, hello.failed_version, ", ".join(hello.failed_groups))
            file.set_meta("poison_note", note)
        for key in list(self._batches):
            file.guard(self._batches, key)
        self._batches.clear()
        self._progress.set(next_version=version, policy_version=version, closing=False)
        self._progress.begin_epoch()
        file.set_meta("hello", "\n".join([*calls[-HELLOS_KEPT:], call]))
        file.set_meta("hello_rolled_back", rolled_back)
        file.set_meta("hello_outstanding", self._ledger.counts["leased"] + self._ledger.counts["ready"])
        log.info("the learner starts at policy %d: %d uses of groups are undone", version, rolled_back)
        return self._welcome()

    def _welcome(self) -> messages.LearnerWelcome:
        meta = self._ledger.file.meta
        return messages.LearnerWelcome(meta("hello_rolled_back", 0), meta("hello_outstanding", 0), self._progress.epoch)

    def _heartbeat(self, identity: bytes, heartbeat: messages.Heartbeat, number: int, now: float) -> messages.Message:
        if heartbeat.policy_version > self._newest_possible:
            heartbeat = replace(heartbeat, policy_version=self._newest_possible)
        self._peers.heard(heartbeat, now)
        probes: tuple[messages.Probe, ...] = ()
        ended = self._ledger.not_leased(holder_name(identity), heartbeat.held) if heartbeat.held else ()
        if heartbeat.role == "learner":
            self._learner_heard = now
            if heartbeat.epoch == self._progress.epoch:
                self._set_policy_version(heartbeat.policy_version)
        else:
            self._leases.learn_version(identity, number, heartbeat.policy_version, now)
            self._leases.learn_inventory(identity, number, heartbeat.held, heartbeat.evaluating)
            probes = self._probes.due(heartbeat.name, now)
        silent = -1.0 if self._learner_heard is None else now - self._learner_heard
        state = self._progress.policy_version, self._progress.closing
        next_seconds = min(self._peers.heartbeat_seconds, self._config.lease_seconds / 4)
        return messages.HeartbeatReply(*state, ended, probes, silent, next_seconds)

    def _set_policy_version(self, version: int) -> None:
        """Note the learner's version. The learner cannot be further than the batches that it was given."""
        if self._progress.policy_version < version <= self._progress.next_version:
            self._progress.set(policy_version=version)


def _largest(counts: Mapping[str, int]) -> dict[str, int]:
    """Return the counts by state. Only the most frequent reasons for dropping have names, since actors choose them."""
    reasons = [name for name in counts if name.startswith("dropped:")]
    named = set(sorted(reasons, key=lambda name: -counts[name])[:REASONS_SHOWN])
    shown = {name[:TEXT_KEPT]: number for name, number in counts.items() if name in named or name not in reasons}
    rest = sum(counts[name] for name in reasons if name not in named)
    return shown | ({"dropped:other": rest} if rest else {})
