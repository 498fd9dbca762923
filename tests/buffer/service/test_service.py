"""The buffer's answers, without sockets: every message, resent messages, and parked requests."""

import dataclasses
from typing import Any

import pytest

from buffer.config import BufferConfig
from buffer.ledger.audit import audit
from buffer.ledger.ledger import Ledger
from buffer.service import peers
from buffer.service.leases import PRESUMED_DEAD_SECONDS, Outgoing
from buffer.service.service import Service
from buffer.transport import messages
from buffer.transport.packed_group import BYTES_PER_TOKEN

ACTOR, OTHER, LEARNER = b"actor-0-aa", b"actor-1-bb", b"learner-cc"


ALL = ("all",)
"""In place of the group ids that a lease request holds: all that its connection was ever granted."""


class Buffer:
    """A service with a simulated clock. `tell` returns all answers as {(identity, number): message}."""

    def __init__(self, config: BufferConfig, make_group: Any) -> None:
        self.config, self.make_group, self.now, self.number = config, make_group, 0.0, 100
        self.granted: dict[bytes, tuple[list[str], list[int]]] = {}
        """Group ids and evaluations by connection."""
        self.open()

    def open(self) -> None:
        self.ledger = Ledger(self.config, self.now)
        self.service = Service(self.config, self.ledger)

    def reopen(self) -> None:
        self.ledger.close()
        self.open()

    def tell(self, identity: bytes, message: messages.Message, number: int) -> dict[tuple[bytes, int], Any]:
        """Send a message; one that names no epoch is of the newest learner."""
        message = messages.with_epoch(message, self.ledger.file.meta("epoch", 0))
        if isinstance(message, messages.LeaseRequest) and message.held == ALL:
            held, evaluating = self.granted.get(identity, ([], []))
            message = dataclasses.replace(message, held=tuple(held), evaluating=tuple(evaluating))
        with self.ledger.transaction():
            outgoing = self.service.receive(identity, message, number, self.now) + self.service.wake(self.now)
        return self.absorb(outgoing)

    def absorb(self, outgoing: list[Outgoing]) -> dict[tuple[bytes, int], Any]:
        for answer in outgoing:
            if isinstance(answer.message, messages.LeaseReply):
                held, evaluating = self.granted.setdefault(answer.identity, ([], []))
                held += ids(answer.message)
                evaluating += [answer.message.evaluate_version] if answer.message.evaluate_version >= 0 else []
        return {(o.identity, o.request_number): o.message for o in outgoing}

    def ask(self, identity: bytes, message: messages.Message) -> Any:
        """Send a request that is answered at once. Returns the answer."""
        self.number += 1
        return self.tell(identity, message, self.number)[identity, self.number]

    def wait(self, seconds: float) -> dict[tuple[bytes, int], Any]:
        self.now += seconds
        with self.ledger.transaction():
            outgoing = self.service.wake(self.now)
        return self.absorb(outgoing)

    def deliver(self, leases: tuple[messages.Lease, ...], version: int = 0, actor: bytes = ACTOR) -> list[str]:
        groups = (self.make_group(lease.group_id, lease.prompt_id, version) for lease in leases)
        return [self.ask(actor, messages.GroupDelivery("actor-0", group)).outcome for group in groups]


def credit(
    version: int = 0, num_groups: int = 4, actor_id: str = "actor-0", held: tuple[str, ...] = ALL
) -> messages.LeaseRequest:
    return messages.LeaseRequest(actor_id, version, num_groups, "abc", held)


def run_to(buffer: Buffer, policy_version: int) -> None:
    """Train all batches up to a version."""
    for version in range(policy_version):
        buffer.deliver(buffer.ask(ACTOR, credit(version, 2)).leases, version)
        assert isinstance(buffer.ask(LEARNER, messages.BatchRequest(version, 0, 1)), messages.Shard)


def report(version: int, requested: int) -> messages.EvaluationReport:
    return messages.EvaluationReport("actor-0", requested, version, 10, 0.5, 0.25, 12.0, 1.0)


def ids(reply: messages.LeaseReply) -> list[str]:
    return [lease.group_id for lease in reply.leases]


@pytest.fixture
def start(make_config: Any, make_group: Any):
    started = []

    def begin(**changes: Any) -> Buffer:
        buffer = Buffer(make_config(**changes), make_group)
        started.append(buffer)
        buffer.ask(LEARNER, messages.LearnerHello(0))
        return buffer

    yield begin
    for buffer in started:
        buffer.ledger.close()
        assert audit(buffer.config.run_dir).problems == ()


def test_a_lease_becomes_a_batch_and_is_done(start: Any):
    buffer = start()
    granted = buffer.ask(ACTOR, credit())
    assert len(granted.leases) == 4, "(max_staleness + 1) * groups_per_batch"
    assert buffer.tell(LEARNER, messages.BatchRequest(0, 0, 1), 1) == {}
    assert buffer.deliver(granted.leases[:1]) == ["stored"]
    lease = granted.leases[1]
    answers = buffer.tell(
        ACTOR, messages.GroupDelivery("actor-0", buffer.make_group(lease.group_id, lease.prompt_id)), 50
    )
    shard = answers[LEARNER, 1]
    assert [group.header.group_id for group in shard.groups] == ["0.0", "1.0"]
    assert (shard.policy_version, shard.num_groups_in_batch, shard.staleness) == (0, 2, (0, 0))
    assert buffer.ask(LEARNER, messages.CheckpointCommitted(1)) == messages.Done()
    counts = buffer.ask(LEARNER, messages.StatusRequest()).counts
    assert (counts["done"], counts["leased"], counts["issued"]) == (2, 2, 4)


def test_in_sync_mode_nothing_is_leased_while_a_batch_trains(start: Any):
    buffer = start(max_staleness=0)
    granted = buffer.ask(ACTOR, credit())
    assert len(granted.leases) == 2
    buffer.deliver(granted.leases)
    assert len(buffer.ask(LEARNER, messages.BatchRequest(0, 0, 1)).groups) == 2
    assert buffer.tell(ACTOR, credit(), 500) == {}
    # The actor's heartbeat after loading the new weights unblocks its parked request.
    heartbeat = messages.Heartbeat("actor", "actor-0", 1, "lease", {})
    answers = buffer.tell(ACTOR, heartbeat, 501)
    assert len(answers[ACTOR, 500].leases) == 2


def test_a_repeated_lease_request_is_answered_as_the_first_time(start: Any):
    buffer = start()
    first = buffer.tell(ACTOR, credit(num_groups=2), 1)[ACTOR, 1]
    assert buffer.tell(ACTOR, credit(num_groups=2), 1)[ACTOR, 1] == first
    buffer.reopen()
    again = buffer.tell(ACTOR, credit(num_groups=2), 1)[ACTOR, 1]
    assert again == first, "the ledger knows what was granted before a restart"
    assert buffer.ledger.counts["leased"] == 2
    assert ids(buffer.tell(ACTOR, credit(num_groups=1), 2)[ACTOR, 2]) == ["2.0"]


def test_a_newer_request_answers_the_older_with_no_leases(start: Any):
    buffer = start()
    buffer.ask(ACTOR, credit())
    assert buffer.tell(OTHER, credit(actor_id="actor-1"), 1) == {}
    assert buffer.tell(OTHER, credit(actor_id="actor-1"), 1) == {}, "a repeat keeps waiting"
    assert ids(buffer.tell(OTHER, credit(1, actor_id="actor-1"), 2)[OTHER, 1]) == []
    assert ids(buffer.tell(OTHER, credit(actor_id="actor-1"), 1)[OTHER, 1]) == []


def test_other_prompts_are_refused(start: Any):
    refused = start().ask(ACTOR, dataclasses.replace(credit(), data_fingerprint="xyz"))
    assert "'xyz'" in refused.reason
    assert "'abc'" in refused.reason


def test_a_silent_actor_loses_its_leases_and_its_late_copy_is_told_apart(start: Any):
    buffer = start()
    granted = buffer.ask(ACTOR, credit())
    assert buffer.tell(OTHER, credit(actor_id="actor-1"), 1) == {}
    buffer.wait(buffer.config.lease_seconds - 1)
    assert buffer.tell(OTHER, credit(actor_id="actor-1"), 1) == {}
    reissued = buffer.wait(1)[OTHER, 1]
    assert ids(reissued) == ["0.1", "1.1", "2.1", "3.1"]
    assert buffer.deliver(granted.leases[:1]) == ["late"]
    assert buffer.deliver(reissued.leases[:1], actor=OTHER) == ["stored"]
    counts = buffer.service.status(buffer.now).counts
    assert (counts["late"], counts["reissued"], counts["expired"]) == (1, 4, 4)


def test_heartbeats_keep_leases(start: Any):
    buffer = start()
    buffer.ask(ACTOR, credit())
    for _ in range(5):
        buffer.wait(buffer.config.lease_seconds * 0.9)
        buffer.ask(ACTOR, messages.Heartbeat("actor", "actor-0", 0, "", {}))
    assert buffer.ledger.counts["leased"] == 4


def test_a_restarted_actor_gets_its_predecessors_prompts_at_once(start: Any):
    buffer = start()
    buffer.ask(LEARNER, messages.EvaluationRequest(0))
    assert buffer.ask(ACTOR, credit()).evaluate_version == 0
    granted = buffer.ask(b"actor-0-zz", credit())
    assert ids(granted) == ["0.1", "1.1", "2.1", "3.1"]
    assert granted.evaluate_version == 0


def test_nothing_is_granted_to_a_request_whose_process_is_presumed_dead(start: Any):
    buffer = start()
    granted = buffer.ask(ACTOR, credit())
    buffer.tell(OTHER, credit(actor_id="actor-1"), 1)
    buffer.now += PRESUMED_DEAD_SECONDS + 1
    buffer.ask(ACTOR, messages.LeaseReturn("actor-0", tuple(ids(granted)), ""))
    assert buffer.ledger.counts["pending"] == 4
    assert len(buffer.tell(OTHER, credit(actor_id="actor-1"), 1)[OTHER, 1].leases) == 4, "it lives after all"


def test_returned_leases_are_pending_or_dropped(start: Any):
    buffer = start()
    granted = buffer.ask(ACTOR, credit())
    buffer.ask(ACTOR, messages.LeaseReturn("actor-0", tuple(ids(granted))[:1], ""))
    buffer.ask(ACTOR, messages.LeaseReturn("actor-0", tuple(ids(granted))[1:2], "too_long"))
    counts = buffer.service.status(0).counts
    assert (counts["pending"], counts["dropped:too_long"], counts["leased"]) == (1, 1, 2)


def test_ranks_get_one_cut_and_repeats_get_the_same_also_after_a_restart(start: Any):
    buffer = start(groups_per_batch=4)
    buffer.deliver(buffer.ask(ACTOR, credit(num_groups=8)).leases)
    shards = [buffer.ask(LEARNER, messages.BatchRequest(0, rank, 2)) for rank in (0, 1)]
    names = [[group.header.group_id for group in shard.groups] for shard in shards]
    assert sorted(names[0] + names[1]) == ["0.0", "1.0", "2.0", "3.0"]
    buffer.reopen()
    repeated = [buffer.ask(LEARNER, messages.BatchRequest(0, rank, 2)) for rank in (1, 0)]
    assert [[group.header.group_id for group in shard.groups] for shard in repeated] == names[::-1]
    assert buffer.ledger.counts["used"] == 4


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (messages.BatchRequest(0, 0, 3), "multiple of the number of learner ranks"),
        (messages.BatchRequest(0, 2, 2), "rank 2 of 2"),
        (messages.BatchRequest(0, 0, 0), "rank 0 of 0"),
        (messages.BatchRequest(5, 0, 1), "the next batch is for policy 0, not 5"),
    ],
)
def test_impossible_batches_are_refused(start: Any, request_: messages.BatchRequest, reason: str):
    assert reason in start().ask(LEARNER, request_).reason


def test_a_batch_without_a_whole_group_per_rank_and_step_is_refused(start: Any):
    buffer = start(groups_per_batch=8, updates_per_batch=2, max_staleness=2)
    buffer.deliver(buffer.ask(ACTOR, credit(num_groups=8)).leases)
    reason = buffer.ask(LEARNER, messages.BatchRequest(0, 0, 8)).reason
    assert "rank 0 of 8 cannot have an equal share of 8 groups in each of 2 optimizer steps" in reason


def test_a_learner_ahead_of_the_ledger_is_refused(start: Any):
    buffer = start(on_stale="mask")
    buffer.deliver(buffer.ask(ACTOR, credit()).leases)
    buffer.ask(LEARNER, messages.BatchRequest(0, 0, 1))
    reason = buffer.ask(b"learner-dd", messages.LearnerHello(2)).reason
    assert "starts at policy 2, but the ledger has handed out batches only up to policy 1" in reason
    assert "resume from a checkpoint of policy 1 or older, or start a new run_dir" in reason
    assert isinstance(buffer.ask(b"learner-dd", messages.LearnerHello(1)), messages.LearnerWelcome)


def test_a_returning_learner_gets_its_groups_again_once(start: Any):
    buffer = start(max_staleness=2)
    for version in range(3):
        buffer.deliver(buffer.ask(ACTOR, credit(version, num_groups=2)).leases, version)
        buffer.ask(LEARNER, messages.BatchRequest(version, 0, 1))
    buffer.ask(LEARNER, messages.CheckpointCommitted(1))
    welcome = buffer.tell(b"learner-dd", messages.LearnerHello(1), 1)[b"learner-dd", 1]
    assert welcome == messages.LearnerWelcome(4, 4, 2)
    first = buffer.ask(b"learner-dd", messages.BatchRequest(1, 0, 1))
    assert [group.header.group_id for group in first.groups] == ["2.0", "3.0"]
    assert buffer.tell(b"learner-dd", messages.LearnerHello(1), 1)[b"learner-dd", 1] == welcome
    buffer.reopen()
    assert buffer.tell(b"learner-dd", messages.LearnerHello(1), 1)[b"learner-dd", 1] == welcome
    assert (buffer.ledger.counts["used"], buffer.ledger.counts["ready"]) == (2, 2)
    assert buffer.service.status(0).policy_version == 1


def test_the_run_leases_no_more_than_its_batches_need(start: Any):
    buffer = start(num_batches=2, max_staleness=3)
    granted = buffer.ask(ACTOR, credit(num_groups=99))
    assert len(granted.leases) == 4
    buffer.ask(ACTOR, messages.LeaseReturn("actor-0", ("3.0",), "broken"))
    replaced = buffer.ask(ACTOR, credit(num_groups=99))
    assert ids(replaced) == ["4.0"], "a dropped group is replaced"
    buffer.deliver((*granted.leases[:3], *replaced.leases))
    for version in (0, 1):
        assert len(buffer.ask(LEARNER, messages.BatchRequest(version, 0, 1)).groups) == 2
    assert "all 2 batches" in buffer.ask(LEARNER, messages.BatchRequest(2, 0, 1)).reason


def test_evaluations_go_to_the_first_actor_with_weights_new_enough(start: Any):
    buffer = start()
    run_to(buffer, 3)
    buffer.ask(ACTOR, credit(3))
    buffer.ask(LEARNER, messages.EvaluationRequest(2))
    buffer.ask(LEARNER, messages.EvaluationRequest(3))
    assert buffer.tell(ACTOR, credit(1), 200) == {}
    handed = buffer.tell(ACTOR, credit(3), 201)[ACTOR, 201]
    assert (handed.evaluate_version, handed.leases) == (2, ())
    assert buffer.tell(ACTOR, credit(3), 201)[ACTOR, 201] == handed
    buffer.reopen()
    assert buffer.tell(ACTOR, credit(3), 201)[ACTOR, 201] == handed
    assert buffer.tell(ACTOR, credit(3), 202)[ACTOR, 202].evaluate_version == 3
    assert buffer.tell(OTHER, credit(3, actor_id="actor-1"), 1) == {}
    assert buffer.ask(LEARNER, messages.EvaluationQuery(0)) == messages.EvaluationReports((), is_running=True)
    buffer.ask(ACTOR, report(3, 2))
    buffer.ask(ACTOR, report(3, 2))
    assert buffer.ask(LEARNER, messages.EvaluationQuery(0)).reports == (report(3, 2),)
    assert buffer.ask(LEARNER, messages.EvaluationQuery(3)).reports == ()
    buffer.now += buffer.config.lease_seconds
    answers = buffer.tell(OTHER, credit(3, actor_id="actor-1"), 1)
    assert answers[OTHER, 1].evaluate_version == 3, "its actor fell silent"


def test_closing_ends_leases_but_not_evaluation(start: Any):
    buffer = start()
    run_to(buffer, 1)
    buffer.ask(ACTOR, credit(1))
    assert buffer.tell(OTHER, credit(actor_id="actor-1"), 1) == {}
    buffer.ask(LEARNER, messages.EvaluationRequest(1))
    assert buffer.tell(LEARNER, messages.Close(), 60) == {(LEARNER, 60): messages.Done()}, "an evaluation is unfinished"
    assert buffer.ask(LEARNER, messages.Heartbeat("learner", "rank-0", 1, "", {})).closing
    handed = buffer.tell(ACTOR, credit(1), 300)[ACTOR, 300]
    assert (handed.evaluate_version, handed.closing, handed.leases) == (1, True, ())
    answers = buffer.tell(ACTOR, report(1, 1), 301)
    assert answers[OTHER, 1] == messages.LeaseReply((), -1, True)
    buffer.reopen()
    assert buffer.ask(ACTOR, credit(1)).closing, "a restart does not open it again"
    buffer.ask(LEARNER, messages.LearnerHello(0))
    assert not buffer.service.status(0).closing


def test_status_shows_the_peers(start: Any):
    buffer = start()
    run_to(buffer, 2)
    buffer.ask(ACTOR, messages.Heartbeat("actor", "actor-0", 1, "lease", {"tokens_per_second": 5.0}))
    buffer.now += 4
    assert buffer.ask(LEARNER, messages.Heartbeat("learner", "rank-0", 2, "", {})).policy_version == 2
    status = buffer.ask(LEARNER, messages.StatusRequest())
    assert status.peers[0] == messages.Peer("actor", "actor-0", 1, "lease", 4.0, {"tokens_per_second": 5.0}, 4.0)
    assert status.policy_version == 2


def test_no_peer_claims_a_version_that_cannot_exist(start: Any):
    buffer = start()
    run_to(buffer, 2)
    assert buffer.ask(LEARNER, messages.Heartbeat("learner", "rank-0", 10**12, "", {})).policy_version == 1
    buffer.ask(ACTOR, messages.Heartbeat("actor", "actor-0", 10**12, "", {}))
    status = buffer.ask(LEARNER, messages.StatusRequest())
    assert status.policy_version == 1, "the version of the last batch that was asked for"
    assert [peer.policy_version for peer in status.peers] == [3, 3]
    buffer.ask(OTHER, credit(10**12, 1, "actor-1"))
    assert max(buffer.ledger.leased) == 3


def test_processes_that_left_are_forgotten(start: Any, monkeypatch: pytest.MonkeyPatch):
    buffer = start()
    monkeypatch.setattr(peers, "MAX_PEERS", 3)

    def names(*beating: str) -> list[str]:
        for name in beating:
            buffer.ask(ACTOR, messages.Heartbeat("actor", name, 0, "", {}))
            buffer.now += 1
        return [peer.name for peer in buffer.service.status(buffer.now).peers]

    assert names("a", "b", "c", "a") == ["a", "b", "c"]
    assert names("d") == ["a", "c", "d"], "b was silent the longest"
    buffer.now += peers.FORGOTTEN_SECONDS - 1
    assert names("d") == ["d"]


def test_thousands_of_actors_are_asked_for_fewer_heartbeats(start: Any):
    buffer = start()

    def seconds(number: int) -> float:
        buffer.now += 0.001
        reply = buffer.ask(ACTOR, messages.Heartbeat("actor", f"actor-{number}", 0, "", {}))
        assert isinstance(reply, messages.HeartbeatReply)
        return reply.least_seconds

    asked = [seconds(number) for number in range(5_000)]
    assert asked[0] == 0.002 and asked[499] == 1.0 and asked[2_499] == 5.0
    assert asked[-1] == peers.LONGEST_HEARTBEAT_SECONDS < PRESUMED_DEAD_SECONDS
    # Silence is judged by what they are asked for.
    buffer.now += 1.5 * peers.LONGEST_HEARTBEAT_SECONDS
    assert buffer.service.status(buffer.now).actors.num_silent == 0
    buffer.now += peers.LONGEST_HEARTBEAT_SECONDS
    assert buffer.service.status(buffer.now).actors.num_silent == 5_000


def test_what_a_learner_sent_before_its_successor_started_is_refused(start: Any):
    buffer = start()
    run_to(buffer, 2)
    first = buffer.tell(LEARNER, messages.LearnerHello(2), 900)[LEARNER, 900]
    second = buffer.tell(b"learner-dd", messages.LearnerHello(1), 1)[b"learner-dd", 1]
    assert (first.epoch, second.epoch) == (2, 3)
    counts = dict(buffer.ledger.counts)
    late: list[Any] = [
        messages.CheckpointCommitted(1, first.epoch),
        messages.BatchRequest(1, 0, 1, epoch=first.epoch),
        messages.EvaluationRequest(1, first.epoch),
        messages.Close(first.epoch),
        messages.Heartbeat("learner", "learner-0", 2, "", {}, epoch=first.epoch),
        messages.LearnerHello(2),
    ]
    for message in late:
        number = 900 if isinstance(message, messages.LearnerHello) else 901
        answer = buffer.tell(LEARNER, message, number)[LEARNER, number]
        assert isinstance(answer, messages.Refused), message
        assert "learner has started since" in answer.reason or "learner 3 has started since" in answer.reason
    assert dict(buffer.ledger.counts) == counts and not buffer.service.status(0).closing
    assert buffer.ledger.file.counters()["earlier_learner"] == 5
    assert buffer.tell(b"learner-dd", messages.LearnerHello(1), 1)[b"learner-dd", 1] == second
    shard = buffer.tell(b"learner-dd", messages.BatchRequest(1, 0, 1, epoch=second.epoch), 2)[b"learner-dd", 2]
    assert isinstance(shard, messages.Shard)


def test_a_checkpoint_or_an_evaluation_of_a_version_to_come_is_refused(start: Any):
    buffer = start()
    run_to(buffer, 1)
    for message in (messages.CheckpointCommitted(2), messages.EvaluationRequest(2)):
        assert "is for policy 2, but batches were handed out only up to policy 1" in buffer.ask(LEARNER, message).reason
    assert buffer.ask(LEARNER, messages.CheckpointCommitted(1)) == messages.Done()


def test_status_shows_what_a_rank_does_and_for_how_long(start: Any):
    buffer = start()
    busy = messages.Heartbeat("learner", "learner-0", 7, "", {}, activity="trains on the batch", activity_seconds=60.0)
    buffer.ask(LEARNER, busy)
    buffer.now += 4
    [peer] = buffer.ask(LEARNER, messages.StatusRequest()).peers
    assert (peer.activity, peer.activity_seconds, peer.silent_seconds) == ("trains on the batch", 64.0, 4.0)


def test_a_learner_that_has_not_said_hello_may_say_what_it_does_and_changes_nothing(start: Any):
    buffer = start()
    buffer.ask(LEARNER, messages.LearnerHello(0))
    run_to(buffer, 1)

    def beat(version: int, epoch: int) -> messages.Message:
        loading = messages.Heartbeat(
            *("learner", "learner-0", version, "", {}),
            epoch=epoch,
            activity="loads the model",
            num_pieces=2,
            limit_seconds=600.0,
        )
        with buffer.ledger.transaction():
            [answer] = buffer.service.receive(b"learner-new", loading, version + 9, buffer.now, "learner")
        return answer.message

    buffer.now += 5
    reply = beat(-1, 0)
    assert isinstance(reply, messages.HeartbeatReply) and reply.learner_silent_seconds == 0.0
    [peer] = [peer for peer in buffer.service.status(buffer.now).peers if peer.name == "learner-0"]
    assert (peer.activity, peer.num_pieces, peer.limit_seconds) == ("loads the model", 2, 600.0)
    beat(1, 0)
    assert buffer.service.status(buffer.now).policy_version == 0
    epoch = buffer.service.status(buffer.now).epoch
    assert isinstance(beat(1, epoch + 1), messages.Refused)
    beat(1, epoch)
    assert buffer.service.status(buffer.now).policy_version == 1


def test_a_wait_lasts_until_its_reason_changes(start: Any):
    buffer = start()
    for waiting_for, seconds in (("lease", 2.0), ("lease", 5.0), ("weights", 0.0), ("", 0.0)):
        buffer.ask(ACTOR, messages.Heartbeat("actor", "actor-0", 0, waiting_for, {}))
        assert [(w.who, w.for_what) for w in buffer.service.waits(buffer.now)] == (
            [("actor-0", waiting_for)] if waiting_for else []
        )
        buffer.now += 2 if waiting_for == "lease" else 0
        assert buffer.service.status(buffer.now).peers[0].waiting_seconds == (4.0 if seconds == 5.0 else seconds)


def test_the_buffer_says_who_waits_for_what_and_since_when(start: Any):
    buffer = start()
    granted = buffer.ask(ACTOR, credit(num_groups=3))
    buffer.deliver(granted.leases[:1])
    buffer.tell(LEARNER, messages.BatchRequest(0, 0, 1), 1)
    buffer.wait(7)
    buffer.tell(LEARNER, messages.BatchRequest(0, 0, 1), 1)
    others = buffer.ask(OTHER, credit(num_groups=1, actor_id="actor-1"))
    buffer.tell(OTHER, credit(actor_id="actor-1"), 900)
    buffer.ask(OTHER, messages.Heartbeat("actor", "actor-1", 0, "prompts", {}))
    buffer.now += 1
    assert buffer.service.waits(buffer.now) == (
        messages.Wait("learner-0", "1 more groups for policy 0 (leased: 2 at actor-0, 1 at actor-1)", 8.0),
        messages.Wait(
            "actor-1", "room: the batches within max_staleness are full, with 3 leased and 1 ready groups", 1.0
        ),
    )
    buffer.deliver(granted.leases[1:])
    buffer.tell(LEARNER, messages.BatchRequest(1, 0, 1), 2)
    assert buffer.service.waits(buffer.now)[-1].for_what == "1 more groups for policy 1 (leased: 1 at actor-1)"
    buffer.deliver(others.leases, actor=OTHER)
    buffer.tell(OTHER, credit(actor_id="actor-1"), 901)
    assert [wait.for_what for wait in buffer.service.waits(buffer.now)] == [
        "newer weights: it has policy 0, the next batch is for policy 2"
    ]


def test_what_is_not_for_the_buffer_is_refused(start: Any):
    assert "does not answer ManifestRequest" in start().ask(ACTOR, messages.ManifestRequest(0, 1.0)).reason


def test_large_groups_are_named_in_the_shard_and_read_one_by_one(start: Any, monkeypatch: pytest.MonkeyPatch):
    buffer = start(groups_per_batch=8, max_staleness=0)
    monkeypatch.setattr("buffer.service.service.SHARD_BYTES", 2 * 2 * 5 * BYTES_PER_TOKEN)
    buffer.deliver(buffer.ask(ACTOR, credit(num_groups=8)).leases)
    shards = [buffer.ask(LEARNER, messages.BatchRequest(0, rank, 2)) for rank in (0, 1)]
    monkeypatch.undo()
    for rank, shard in enumerate(shards):
        assert [group.header.group_id for group in shard.groups] == [f"{rank}.0"], "half of two groups' bytes"
        assert shard.rest == tuple((rank + place, 10) for place in (2, 4, 6))
        assert shard.staleness == (0,) * 4
    rest = [messages.GroupRequest(0, occurrence) for shard in shards for occurrence, _ in shard.rest]
    fetched = [buffer.ask(LEARNER, request) for request in rest]
    buffer.reopen()
    assert [buffer.ask(LEARNER, request) for request in rest] == fetched, "the same after a restart, and again"
    whole = [buffer.ask(LEARNER, messages.BatchRequest(0, rank, 2)) for rank in (0, 1)]
    for shard, complete in zip(shards, whole, strict=True):
        groups = shard.groups + tuple(f.group for f in fetched if f.group in complete.groups)
        assert (complete.groups, complete.rest) == (groups, ())


def test_a_heartbeat_ends_what_its_actor_has_finished_while_its_request_is_parked(start: Any):
    """As after a power cut, in which the ledger lost the deliveries."""
    buffer = start(max_staleness=0)
    first = buffer.tell(ACTOR, credit(), 1)[ACTOR, 1]
    held = tuple(lease.group_id for lease in first.leases)
    assert held == ("0.0", "1.0")
    assert (ACTOR, 2) not in buffer.tell(ACTOR, dataclasses.replace(credit(), held=held), 2), "no room: it is parked"

    def beat(number: int, *held: str) -> dict[Any, Any]:
        return buffer.tell(ACTOR, messages.Heartbeat("actor", "actor-0", 0, "", {}, held), number)

    assert (ACTOR, 2) not in beat(0), "sent before the parked request, and late"
    assert (ACTOR, 2) not in beat(3, *held)
    assert [lease.group_id for lease in beat(4, "1.0")[ACTOR, 2].leases] == ["0.1"]
    assert not beat(5, "1.0")[ACTOR, 5].ended, "the answer to request 2 is on its way"
    assert buffer.ledger.counts["leased"] == 2


def test_after_a_power_cut_groups_of_versions_that_the_ledger_lost_are_welcome(
    start: Any, monkeypatch: pytest.MonkeyPatch
):
    buffer = start()
    lease, other = buffer.ask(ACTOR, credit()).leases[:2]
    monkeypatch.setattr("buffer.ledger.ledger.host_id", lambda: "the next boot")
    buffer.reopen()
    for lost, expected in ((lease, "stored"), (other, "invalid")):
        version = 7 if expected == "stored" else 10**9
        group = buffer.make_group(lost.group_id, lost.prompt_id, version=version)
        assert buffer.ask(ACTOR, messages.GroupDelivery("actor-0", group)).outcome == expected


def test_the_hello_of_a_dead_learner_that_arrives_late_undoes_nothing(start: Any):
    buffer = start()
    epoch = buffer.ask(LEARNER, messages.StatusRequest()).epoch
    late = messages.LearnerHello(0, after_epoch=epoch)
    welcome = buffer.ask(b"learner-dd", messages.LearnerHello(0, after_epoch=epoch))
    buffer.deliver(buffer.ask(ACTOR, credit()).leases)
    batch = messages.BatchRequest(0, 0, 1, epoch=welcome.epoch)
    shard = buffer.ask(b"learner-dd", batch)
    assert buffer.ask(LEARNER, late) == messages.LearnerWelcome(0, 0, 0)
    assert buffer.ask(b"learner-dd", batch) == shard
    now = buffer.ask(LEARNER, messages.StatusRequest()).epoch
    assert now == welcome.epoch
    assert buffer.ask(LEARNER, messages.LearnerHello(0, after_epoch=now)).epoch == now + 1


@pytest.mark.parametrize("request_", [messages.GroupRequest(0, 2), messages.GroupRequest(1, 0)])
def test_a_group_that_is_in_no_such_batch_is_refused(start: Any, request_: messages.GroupRequest):
    buffer = start()
    buffer.deliver(buffer.ask(ACTOR, credit()).leases)
    assert len(buffer.ask(LEARNER, messages.BatchRequest(0, 0, 1)).groups) == 2
    assert "not, or no longer, in the batch" in buffer.ask(LEARNER, request_).reason


def test_a_group_is_masked_also_when_it_is_fetched_alone(start: Any, monkeypatch: pytest.MonkeyPatch):
    buffer = start(groups_per_batch=1, max_staleness=1, on_stale="mask")
    whole = buffer.service._contents
    seen: list[int] = []
    monkeypatch.setattr(
        buffer.service, "_contents", lambda row, version: seen.append(row.staleness) or whole(row, version)
    )
    monkeypatch.setattr("buffer.service.service.SHARD_BYTES", 0)
    buffer.deliver(buffer.ask(ACTOR, credit()).leases)
    shard = buffer.ask(LEARNER, messages.BatchRequest(0, 0, 1))
    assert not shard.groups and not seen
    buffer.ask(LEARNER, messages.GroupRequest(0, shard.rest[0][0]))
    assert seen == list(shard.staleness)


def test_a_status_has_a_bounded_size_and_names_the_worst_and_those_asked_for(start: Any):
    """5,000 actors with long names, texts and metrics; one is silent, one waits longest, and one is asked for."""
    buffer = start()
    metrics = {f"{'m' * 50}{number}": 1.0 for number in range(64)}
    buffer.ask(LEARNER, messages.Heartbeat("learner", "learner-0", 0, "", {"reward": 0.5}))
    names = [f"{'a' * 100}-{number}" for number in range(5_000)]
    for number, name in enumerate(names):
        with buffer.ledger.transaction():
            beat = messages.Heartbeat("actor", name, 0, "x" * 4_096 if number == 17 else "prompts", metrics)
            buffer.service.receive(name[-100:].encode(), beat, 1, buffer.now)
        if number == 17:
            buffer.now += 30
    buffer.now += 1
    status = buffer.service.status(buffer.now, (names[4_000], "unknown"))
    shown = [peer.name for peer in status.peers]
    assert {"learner-0", names[17], names[0], names[4_000]} <= set(shown) and len(shown) == peers.WORST + 2
    assert (status.actors.num_actors, status.actors.num_silent, status.actors.num_waiting) == (5_000, 18, 5_000)
    assert status.actors.metrics[f"{'m' * 50}7"] == 5_000
    assert len(status.waits) == peers.WORST and status.waits[0].seconds == 31.0
    frames = messages.encode(status, 1, "run")
    assert len(frames[0]) < 1 << 20
    assert messages.decode(frames, "run")[0] == status
