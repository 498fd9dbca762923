"""Random events at the buffer, with restarts and aborted transactions between them, compared with a simple model."""

import contextlib
import tempfile
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from buffer.config import BufferConfig
from buffer.curriculum_config import Skip, Stage, write_levels
from buffer.ledger.audit import StageRow, audit
from buffer.ledger.ledger import Ledger
from buffer.service.leases import Outgoing
from buffer.service.service import Service
from buffer.trajectory import FinishReason, Trajectory, TrajectoryGroup, VersionSpan
from buffer.transport import messages as wire
from buffer.transport.packed_group import PackedGroup, pack_group, unpack_group
from tests.buffer.ledger.slow_batch import Group, expected_batch
from tests.buffer.reference_curriculum import ReferenceCurriculum

NUM_PROMPTS, GROUPS_PER_BATCH, MAX_STALENESS, LEASE_SECONDS = 5, 2, 2, 14.0
ACTORS = ("actor-0", "actor-1")
LEVELS = [1, 2, 1, 2, 1]
STAGES = [
    Stage(max_level=1, until_success=0.6, over_groups=3, at_least_steps=1, at_most_steps=5, samples_per_group=3),
    Stage(min_level=2, until_step=6, samples_per_group=2, max_new_tokens=7),
    Stage(),
]


WAYS: list[dict[str, Any]] = [
    {},
    {"max_uses": 2},
    {"max_uses": 3, "sampler": "uniform"},
    {"max_uses": 2, "sampler": "freshest", "drop_no_signal": True},
    {"max_uses": 2, "sampler": "prioritized"},
    {"sampler": "prioritized", "drop_no_signal": True},
    {"on_stale": "drop", "max_reissues": 1},
    {"on_stale": "drop", "max_reissues": 0, "max_uses": 2, "sampler": "uniform"},
    {"on_stale": "mask", "max_uses": 2},
]


def success(occurrence: int, attempt: int) -> float:
    """In two of three groups all completions are correct."""
    return float((occurrence + attempt) % 3 != 0)


def rewards(occurrence: int, attempt: int) -> tuple[float, float]:
    """Every fifth group has zero advantage; the spread of the others differs."""
    return 1.0, 1.0 - (3 * occurrence + attempt) % 5 / 4


def newest(occurrence: int, version: int) -> int:
    """The version of the second completion's last token."""
    return version + occurrence % 2


def group(group_id: str, prompt_id: int, version: int) -> PackedGroup:
    """A group whose tokens hold its ids. The second completion may end under a newer version."""
    occurrence, attempt = map(int, group_id.split("."))
    ending = newest(occurrence, version)
    spans = (VersionSpan(0, version),), (VersionSpan(0, version), VersionSpan(2, ending))
    trajectories = tuple(
        Trajectory(
            trajectory_id=f"{group_id}.{number}",
            group_id=group_id,
            prompt_id=prompt_id,
            token_ids=np.array([occurrence, attempt, number], np.int32),
            loss_mask=np.array([False, True, True]),
            behavior_logprobs=np.array([0, -1, -2], np.float32),
            policy_versions=spans[number],
            reward=reward,
            reward_breakdown={},
            verdict="correct" if success(occurrence, attempt) else "wrong",
            finish_reason=FinishReason.STOP,
        )
        for number, reward in enumerate(rewards(occurrence, attempt))
    )
    return pack_group(TrajectoryGroup(group_id, prompt_id, trajectories))


@dataclass
class Occurrence:
    """The model's state of an occurrence."""

    state: str
    attempt: int
    holder: bytes
    version: int
    """The version of the actor's weights at the lease; after delivery the group's oldest version."""
    number: int
    """Number of the request that it was last leased to."""
    num_stale: int = 0
    used: list[int] = field(default_factory=list)
    """Versions of the batches that used the group."""
    is_judged: bool = False
    """Whether the group was delivered and counts for the curriculum."""


class BufferMachine(RuleBasedStateMachine):
    def __init__(self, way: dict[str, Any]) -> None:
        super().__init__()
        self.way = way

    @initialize()
    def open(self) -> None:
        self.directory = tempfile.TemporaryDirectory(prefix="run-")
        self.config = BufferConfig(
            *(self.directory.name, "ipc://x", NUM_PROMPTS, "abc", GROUPS_PER_BATCH, MAX_STALENESS),
            lease_seconds=LEASE_SECONDS,
            durability="memory",
            stages=STAGES,
            skip_solved=Skip(success=1.0, seen=1),
            skip_unsolved=Skip(success=0.0, seen=2),
            revisit_epochs=3,
            **self.way,
        )
        write_levels(Path(self.directory.name), LEVELS)
        self.now, self.number, self.processes = 0.0, 0, 0
        self.ledger = Ledger(self.config, self.now)
        self.service = Service(self.config, self.ledger)
        self.reference = ReferenceCurriculum(self.config, LEVELS)
        self.successes: dict[int, float] = {}
        """Success share of every delivered group, by occurrence."""
        self.model: dict[int, Occurrence] = {}
        self.deadlines: dict[bytes, float] = {}
        self.identity = {actor: self.new_process(actor) for actor in ACTORS}
        self.told: dict[bytes, int] = {}
        """Policy version in each process's newest lease request."""
        self.said: dict[bytes, tuple[str, ...]] = {}
        """Groups that it said it holds there."""
        self.granted: dict[tuple[bytes, int], wire.LeaseReply] = {}
        """Answers that the buffer remembers for resent requests."""
        self.lineage: dict[int, list[str]] = {}
        self.shards: dict[int, wire.Shard] = {}
        self.next_version, self.committed, self.has_rolled_back, self.num_expired = 0, 0, False, 0
        self.batch_is_asked_for = False
        self.start_learner(0)

    # The model.

    def new_process(self, name: str) -> bytes:
        self.processes += 1
        return f"{name}-{self.processes}".encode()

    def having(self, *states: str) -> list[int]:
        return sorted(k for k, occurrence in self.model.items() if occurrence.state in states)

    def is_useful(self, k: int, version: int) -> bool:
        """Whether the occurrence's delivered group may be in the batch for `version`."""
        masks = self.config.on_stale == "mask"
        decisive = newest(k, self.model[k].version) if masks else self.model[k].version
        return decisive + MAX_STALENESS >= version

    def reusable(self) -> list[int]:
        return [
            k
            for k in self.having("used")
            if len(self.model[k].used) < self.config.max_uses and self.is_useful(k, self.next_version)
        ]

    def become_stale(self, k: int) -> None:
        """Make the occurrence pending again, or drop it when max_reissues is exceeded."""
        self.model[k].num_stale += 1
        again = self.model[k].num_stale <= self.config.max_reissues
        self.model[k].state, self.model[k].is_judged = ("pending" if again else "dropped"), False
        self.successes.pop(k, None)

    def tell(self, identity: bytes, message: wire.Message, number: int = -1) -> list[Outgoing]:
        """Send one message and compare all answers with the model."""
        if number < 0:
            self.number += 1
            number = self.number
        message = wire.with_epoch(message, self.ledger.file.meta("epoch", 0))
        with self.ledger.transaction():
            outgoing = self.service.receive(identity, message, number, self.now)
            if identity in self.deadlines:
                self.deadlines[identity] = self.now + LEASE_SECONDS
            if isinstance(message, wire.LeaseRequest):
                self.replace_predecessors(identity, message.actor_id)
                self.take_inventory(identity, message.held, number)
            if isinstance(message, wire.LeaseReturn):
                self.end_leases(message.group_ids, message.reason)
            outgoing += self.service.wake(self.now)
        self.expire()
        for answer in outgoing:
            self.absorb(answer)
        return [answer for answer in outgoing if (answer.identity, answer.request_number) == (identity, number)]

    def replace_predecessors(self, identity: bytes, actor_id: str) -> None:
        """End the leases of the actor's other processes."""
        for k in self.having("leased"):
            holder = self.model[k].holder
            if holder != identity and holder.startswith(f"{actor_id}-".encode()):
                self.model[k].state = "pending"
                self.deadlines.pop(holder, None)

    def take_inventory(self, identity: bytes, held: tuple[str, ...], number: int) -> None:
        """End the leases that were granted to earlier requests and that the holder does not say it has."""
        for k in self.having("leased"):
            known = self.model[k]
            if known.holder == identity and known.number < number and f"{k}.{known.attempt}" not in held:
                known.state = "pending"

    def end_leases(self, group_ids: tuple[str, ...], reason: str) -> None:
        for k, attempt in (map(int, group_id.split(".")) for group_id in group_ids):
            if self.model[k].state == "leased" and self.model[k].attempt == attempt:
                self.model[k].state = "dropped" if reason else "pending"

    def expire(self) -> None:
        silent = {identity for identity, deadline in self.deadlines.items() if deadline <= self.now}
        for k in self.having("leased"):
            if self.model[k].holder in silent:
                self.model[k].state = "pending"
        for identity in silent:
            del self.deadlines[identity]

    def absorb(self, answer: Outgoing) -> None:
        match answer.message:
            case wire.Shard():
                self.absorb_shard(answer.message)
            case wire.LeaseReply() if (answer.identity, answer.request_number) not in self.granted:
                self.granted[answer.identity, answer.request_number] = answer.message
                for lease in answer.message.leases:
                    self.absorb_lease(answer, lease)

    def absorb_lease(self, answer: Outgoing, lease: wire.Lease) -> None:
        """Check a lease: the oldest pending occurrence, or else the next drawn prompt."""
        pending = self.having("pending")
        k = pending[0] if pending else len(self.model)
        attempt = self.model[k].attempt + 1 if pending else 0
        prompt = self.reference.prompts[k] if pending else self.reference.draw(self.successes)
        assert (lease.group_id, lease.prompt_id) == (f"{k}.{attempt}", prompt)
        stage = self.reference.stage_of(k)
        assert (lease.samples_per_group, lease.max_new_tokens) == (stage.samples_per_group, stage.max_new_tokens)
        num_stale = self.model[k].num_stale if pending else 0
        identity = answer.identity
        self.model[k] = Occurrence(
            *("leased", attempt, identity, self.told[identity], answer.request_number, num_stale)
        )
        self.deadlines[identity] = self.now + LEASE_SECONDS

    def absorb_shard(self, shard: wire.Shard) -> None:
        """Check a batch: the groups of the reference implementation, by occurrence, with their delivered contents."""
        version = shard.policy_version
        if version in self.shards:
            assert shard == self.shards[version], "a repeat"
            return
        assert (version, self.batch_is_asked_for) == (self.next_version, True)
        candidates = [
            Group(k, self.model[k].version, bool(self.model[k].used), np.ptp(rewards(k, self.model[k].attempt)) / 2)
            for k in self.having("ready") + self.reusable()
        ]
        leased = [self.model[k].version for k in self.having("leased")]
        chosen = expected_batch(self.config, candidates, leased, version)
        assert [packed.header.group_id for packed in shard.groups] == [f"{k}.{self.model[k].attempt}" for k in chosen]
        assert shard.staleness == tuple(version - self.model[k].version for k in chosen)
        if self.config.on_stale == "drop" or not (self.has_rolled_back or self.config.on_stale == "mask"):
            assert max(shard.staleness) <= MAX_STALENESS
        for k, packed in zip(chosen, shard.groups, strict=True):
            self.check_contents(k, unpack_group(packed), version)
            self.model[k].state = "used"
            self.model[k].used.append(version)
        self.lineage[version] = [packed.header.group_id for packed in shard.groups]
        self.shards[version] = shard
        self.next_version, self.batch_is_asked_for = version + 1, False
        for k in self.having("ready") if self.config.on_stale != "wait" else ():
            if not self.is_useful(k, self.next_version):
                self.become_stale(k)
        self.reference.advance(self.next_version, self.trained_in_stage())

    def trained_in_stage(self) -> list[float]:
        """Success shares of the current stage's groups that were used or dropped, oldest first."""
        had = [k for k in self.having("used", "done", "dropped") if self.model[k].is_judged]
        return [self.successes[k] for k in had if k >= self.reference.firsts[-1]]

    def check_contents(self, k: int, received: TrajectoryGroup, version: int) -> None:
        """Check that the group is as delivered; with on_stale=mask, without too stale tokens."""
        oldest = version - MAX_STALENESS if self.config.on_stale == "mask" else 0
        sampled = unpack_group(group(received.group_id, received.prompt_id, self.model[k].version)).trajectories
        kept = []
        for trajectory in sampled:
            ending = newest(k, self.model[k].version) if trajectory.token_ids[2] else self.model[k].version
            mask = (False, self.model[k].version >= oldest, ending >= oldest)
            if any(mask):
                kept.append((tuple(trajectory.token_ids), mask, trajectory.reward))
        assert [(tuple(t.token_ids), tuple(t.loss_mask), t.reward) for t in received.trajectories] == kept

    # Actors.

    def held(self, identity: bytes) -> tuple[str, ...]:
        """What the process works on."""
        mine = (k for k in self.having("leased") if self.model[k].holder == identity)
        return tuple(f"{k}.{self.model[k].attempt}" for k in mine)

    @rule(
        actor=st.sampled_from(ACTORS), credit=st.integers(1, 4), behind=st.integers(0, 3), lost=st.sampled_from([0, 2])
    )
    def ask_for_leases(self, actor: str, credit: int, behind: int, lost: int = 0) -> None:
        """Ask, without up to `lost` of the groups that the buffer has leased to the process."""
        identity, version = self.identity[actor], max(0, self.next_version - behind)
        self.told[identity], self.said[identity] = version, self.held(identity)[lost:]
        self.tell(identity, wire.LeaseRequest(actor, version, credit, "abc", self.said[identity]))

    @rule(actor=st.sampled_from(ACTORS))
    def send_heartbeat(self, actor: str) -> None:
        """The answer names what the process works on in vain."""
        identity = self.identity[actor]
        held = self.held(identity)
        attempts = [(k, self.model[k].attempt + ahead) for k in sorted(self.model) for ahead in (-1, 0, 1)]
        claimed = tuple(f"{k}.{attempt}" for k, attempt in attempts if attempt >= 0)
        # The process of an actor is its newest one, which takes over.
        self.replace_predecessors(identity, actor)
        heartbeat = wire.Heartbeat("actor", actor, self.told.get(identity, 0), "", {}, claimed)
        (answer,) = self.tell(identity, heartbeat)
        assert set(answer.message.ended) == set(claimed) - set(held)

    @precondition(lambda self: self.granted)
    @rule(data=st.data())
    def repeat_a_lease_request(self, data: st.DataObject) -> None:
        (identity, number), first = data.draw(st.sampled_from(sorted(self.granted.items(), key=lambda item: item[0])))
        actor = identity.decode().rsplit("-", 1)[0]
        if identity == self.identity[actor] and number == max(n for i, n in self.granted if i == identity):
            request = wire.LeaseRequest(actor, self.told[identity], 4, "abc", self.said[identity])
            held = self.held(identity)
            again = replace(first, leases=tuple(lease for lease in first.leases if lease.group_id in held))
            assert [answer.message for answer in self.tell(identity, request, number)] == [again]

    @precondition(lambda self: self.model)
    @rule(data=st.data(), back=st.integers(0, 1), ahead=st.integers(0, 1))
    def deliver(self, data: st.DataObject, back: int, ahead: int) -> None:
        """Deliver a leased group, a duplicate, or a group of an earlier attempt."""
        k = data.draw(st.sampled_from(sorted(self.model)))
        known = self.model[k]
        attempt = max(0, known.attempt - back)
        version = self.bounded(k, known.version + ahead)
        is_late = attempt < known.attempt or known.state == "pending"
        is_late |= known.state == "dropped" and not known.is_judged
        expected = "late" if is_late else self.take_in(k, version) if known.state == "leased" else "duplicate"
        packed = group(f"{k}.{attempt}", self.reference.prompts[k], version)
        actor = known.holder.decode().rsplit("-", 1)[0]
        answers = self.tell(self.identity[actor], wire.GroupDelivery(actor, packed))
        assert [answer.message.outcome for answer in answers] == [expected]

    def take_in(self, k: int, version: int) -> str:
        """Update the model for the delivery of a leased group. Returns the expected outcome."""
        known = self.model[k]
        known.version = version
        if self.config.on_stale != "wait" and not self.is_useful(k, self.next_version):
            self.become_stale(k)
            return "dropped"
        has_none = len(set(rewards(k, known.attempt))) == 1
        known.state = "dropped" if self.config.drop_no_signal and has_none else "ready"
        known.is_judged, self.successes[k] = True, success(k, known.attempt)
        return "stored" if known.state == "ready" else "dropped"

    def bounded(self, k: int, version: int) -> int:
        """Return the version, at most the newest that the tokens of the group can have; later ones are refused."""
        return min(version, self.ledger.file.meta("newest_version", 0) + 1 - k % 2)

    def finish(self, k: int, ahead: int) -> None:
        """Deliver the group of a lease by its holder."""
        known = self.model[k]
        identity, attempt = known.holder, known.attempt
        version = self.bounded(k, known.version + ahead)
        expected = self.take_in(k, version)
        packed = group(f"{k}.{attempt}", self.reference.prompts[k], version)
        answers = self.tell(identity, wire.GroupDelivery("x", packed))
        assert [answer.message.outcome for answer in answers] == [expected]

    @rule(actor=st.sampled_from(ACTORS), ahead=st.lists(st.integers(0, 2), min_size=6, max_size=6))
    def work_ahead(self, actor: str, ahead: list[int]) -> None:
        """Sample as many groups as admission allows, with versions that need not increase with the occurrences."""
        self.ask_for_leases(actor, 6, 0)
        for k, newer in zip(self.having("leased"), ahead, strict=False):
            self.finish(k, newer)

    @rule(actor=st.sampled_from(ACTORS), credit=st.integers(1, 4), times=st.integers(1, 5))
    def work_and_train(self, actor: str, credit: int, times: int) -> None:
        """One actor works while the other one's leases become stale."""
        for _ in range(times):
            self.ask_for_leases(actor, credit, 0)
            for k in self.having("leased"):
                if self.model[k].holder == self.identity[actor] and self.model[k].state == "leased":
                    self.finish(k, 0)
            self.train()

    @rule(actor=st.sampled_from(ACTORS), credit=st.integers(1, 4), times=st.integers(2, 4))
    def come_late(self, actor: str, credit: int, times: int) -> None:
        """One actor delivers late, after the other one has worked."""
        self.ask_for_leases(actor, credit, 0)
        other = ACTORS[actor == ACTORS[0]]
        self.work_and_train(other, 2, times)
        for k in self.having("leased"):
            if self.model[k].holder == self.identity[actor] and self.model[k].state == "leased":
                self.finish(k, 0)

    @rule()
    def deliver_what_was_never_issued(self) -> None:
        packed = group(f"{len(self.model)}.0", 0, 0)
        (answer,) = self.tell(self.identity["actor-0"], wire.GroupDelivery("actor-0", packed))
        assert answer.message.outcome == "unknown"

    @precondition(lambda self: self.having("leased"))
    @rule(data=st.data(), reason=st.sampled_from(["", "", "broken"]))
    def give_back(self, data: st.DataObject, reason: str) -> None:
        k = data.draw(st.sampled_from(self.having("leased")))
        self.tell(self.model[k].holder, wire.LeaseReturn("x", (f"{k}.{self.model[k].attempt}",), reason))

    @rule(actor=st.sampled_from(ACTORS))
    def restart_actor(self, actor: str) -> None:
        self.identity[actor] = self.new_process(actor)

    @rule(actor=st.sampled_from(ACTORS))
    def sign_of_life(self, actor: str) -> None:
        self.tell(self.identity[actor], wire.StatusRequest())

    @rule(seconds=st.floats(0.5, 9.0))
    def wait(self, seconds: float) -> None:
        """Let time pass. Two or three calls end the leases of a silent holder."""
        self.now += seconds
        self.granted = {}  # How long the buffer remembers the connection of a silent actor is not modeled.
        self.tell(b"nobody-0", wire.StatusRequest())

    # The learner.

    def start_learner(self, version: int) -> None:
        self.learner = self.new_process("learner")
        for k in self.having("used", "done"):
            occurrence = self.model[k]
            occurrence.used = [v for v in occurrence.used if v < version]
            if not occurrence.used:
                if occurrence.state == "done":
                    del self.successes[k]
                    occurrence.is_judged = False
                occurrence.state = "ready" if occurrence.state == "used" else "pending"
        self.lineage = {v: groups for v, groups in self.lineage.items() if v < version}
        self.shards = {v: shard for v, shard in self.shards.items() if v < version}
        self.next_version, self.batch_is_asked_for = version, False
        first = self.tell(self.learner, wire.LearnerHello(version))
        before = +self.ledger.counts
        assert self.tell(self.learner, wire.LearnerHello(version), first[0].request_number) == first
        assert +self.ledger.counts == before, "the repeat has no effect"

    @rule()
    def train(self) -> None:
        self.batch_is_asked_for = True
        self.tell(self.learner, wire.BatchRequest(self.next_version, 0, 1))

    @precondition(lambda self: not self.batch_is_asked_for and any(v >= self.committed for v in self.shards))
    @rule()
    def ask_for_the_same_batch_again(self) -> None:
        version = max(self.shards)
        (answer,) = self.tell(self.learner, wire.BatchRequest(version, 0, 1))
        assert answer.message == self.shards[version]

    @rule(back=st.integers(0, 2))
    def commit(self, back: int) -> None:
        version = max(self.committed, self.next_version - back)
        self.tell(self.learner, wire.CheckpointCommitted(version))
        self.committed = version
        for k in self.having("used"):
            if max(self.model[k].used) < version and k not in self.reusable():
                self.model[k].state = "done"
                self.num_expired += len(self.model[k].used) < self.config.max_uses
        assert self.ledger.file.counters().get("uses_expired", 0) == self.num_expired

    @precondition(lambda self: self.has_rolled_back or len(self.lineage) > 3)
    @rule(behind_commit=st.integers(0, 1))
    def go_back(self, behind_commit: int) -> None:
        """Roll back to the last checkpoint, or to an earlier version as if that checkpoint were broken."""
        self.committed = max(0, self.committed - behind_commit)
        self.has_rolled_back = True
        self.start_learner(self.committed)

    # The buffer.

    @rule()
    def restart(self) -> None:
        self.ledger.close()
        self.ledger = Ledger(self.config, self.now)
        self.begin_anew()
        self.deadlines = {self.model[k].holder: self.now + LEASE_SECONDS for k in self.having("leased")}

    def begin_anew(self) -> None:
        self.service = Service(self.config, self.ledger)
        self.granted, self.batch_is_asked_for = {}, False

    @precondition(lambda self: self.having("leased", "ready"))
    @rule(data=st.data(), actor=st.sampled_from(ACTORS))
    def abort(self, data: st.DataObject, actor: str) -> None:
        """Abort a transaction that has changed as much as possible."""
        k = data.draw(st.sampled_from(self.having("leased", "ready")))
        delivery = wire.GroupDelivery(actor, group(f"{k}.{self.model[k].attempt}", self.reference.prompts[k], 0))
        with contextlib.suppress(KeyError), self.ledger.transaction():
            stranger = self.new_process(actor)
            messages: list[Any] = [
                (self.learner, wire.BatchRequest(self.next_version, 0, 1)),
                (stranger, delivery),
                (stranger, wire.LeaseRequest(actor, self.next_version, 4, "abc")),
                (self.learner, wire.CheckpointCommitted(self.next_version)),
                (self.learner, wire.LearnerHello(0)),
            ]
            for number, (identity, message) in enumerate(messages):
                self.service.receive(identity, message, 10**6 + number, self.now)
            self.service.wake(self.now)
            raise KeyError
        self.begin_anew()

    # What holds after every step.

    @invariant()
    def the_states_agree_and_the_invariant_holds(self) -> None:
        if not hasattr(self, "ledger"):
            return
        counts = Counter(occurrence.state for occurrence in self.model.values())
        found = audit(self.config.run_dir)
        assert found.problems == ()
        assert found.issued == len(self.model)
        self.check_curriculum(found.stages)
        assert Counter(found.counts) + Counter(dropped=sum(found.dropped.values())) == counts
        assert +self.ledger.leased == Counter(self.model[k].version for k in self.having("leased"))
        assert +self.ledger.ready == Counter(self.model[k].version for k in self.having("ready"))
        for identity in {self.model[k].holder for k in self.having("leased")}:
            assert self.deadlines[identity] > self.now, "what is leased is watched"

    def check_curriculum(self, found: tuple[StageRow, ...]) -> None:
        status, trained = self.ledger.curriculum.status(), self.trained_in_stage()[-self.reference.stage.over_groups :]
        assert (status.stage, status.num_groups) == (len(self.reference.firsts), len(trained))
        assert status.success == (sum(trained) / len(trained) if trained else 0.0)
        assert [row.first_occurrence for row in found] == self.reference.firsts
        assert [row.policy_version for row in found] == self.reference.began

    @invariant()
    def each_is_trained_on_as_often_as_it_may_be_in_a_lineage(self) -> None:
        if hasattr(self, "ledger"):
            trained = [(v, group_id) for v, groups in self.lineage.items() for group_id in groups]
            had = self.having("used", "done")
            in_model = {(v, f"{k}.{self.model[k].attempt}") for k in had for v in self.model[k].used}
            assert len(trained) == len(set(trained))
            assert set(trained) == in_model
            assert max(Counter(group_id for _, group_id in trained).values(), default=0) <= self.config.max_uses

    @invariant()
    def outstanding_groups_are_bounded_and_the_learner_is_served(self) -> None:
        if not hasattr(self, "ledger"):
            return
        waits = self.config.on_stale == "wait"
        if waits and not self.has_rolled_back:
            assert len(self.having("leased", "ready")) <= (MAX_STALENESS + 1) * GROUPS_PER_BATCH
        if self.batch_is_asked_for and not (waits and self.having("leased")):
            assert len(self.having("ready") + self.reusable()) < GROUPS_PER_BATCH

    def teardown(self) -> None:
        if not hasattr(self, "ledger"):
            return
        try:
            self.go_on()
        finally:
            self.ledger.close()
            self.directory.cleanup()

    def go_on(self) -> None:
        """Check that the learner gets batches as long as one actor works, whatever happened before."""
        self.now += 2 * LEASE_SECONDS
        self.tell(b"nobody-0", wire.StatusRequest())
        goal, turns = self.next_version + 3, 0
        while self.next_version < goal:
            turns += 1
            assert turns < 20, "the run is stuck"
            self.train()
            self.ask_for_leases("actor-0", 6, 0)
            for k in self.having("leased"):
                if self.model[k].state == "leased":
                    self.finish(k, 0)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_any_order_of_events(way: dict[str, Any]) -> None:
    bounds = settings(max_examples=7, stateful_step_count=40, deadline=None)
    run_state_machine_as_test(lambda: BufferMachine(way), settings=bounds)
