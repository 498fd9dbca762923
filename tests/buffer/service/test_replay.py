"""Groups that are used several times, have zero advantage or are too stale, without sockets."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from buffer.ledger.audit import audit
from buffer.trajectory import TrajectoryGroup, VersionSpan
from buffer.transport import messages
from buffer.transport.packed_group import PackedGroup, pack_group, unpack_group
from tests.buffer.service.test_service import ACTOR, LEARNER, OTHER, Buffer, credit, ids, start

__all__ = ["start"]


def train(buffer: Buffer, version: int) -> list[str]:
    """The groups of the batch for `version`."""
    return [group.header.group_id for group in buffer.ask(LEARNER, messages.BatchRequest(version, 0, 1)).groups]


def hand_in(buffer: Buffer, group: PackedGroup, actor: bytes = ACTOR) -> str:
    outcome: str = buffer.ask(actor, messages.GroupDelivery("actor-0", group)).outcome
    return outcome


@pytest.mark.parametrize(("sampler", "most"), [("fifo", 24), ("uniform", 30), ("freshest", 34), ("prioritized", 30)])
def test_with_two_uses_a_run_needs_about_half_the_groups(start: Any, sampler: str, most: int):
    buffer = start(max_uses=2, sampler=sampler, num_batches=20, max_staleness=3, num_prompts=40)
    batches: list[list[str]] = []
    for number in range(1, 200):
        version = len(batches)
        # A request that had to wait may be answered when the next batch is cut.
        answers = buffer.tell(ACTOR, credit(version, 9), 2 * number)
        answers |= buffer.tell(LEARNER, messages.BatchRequest(version, 0, 1), 2 * number + 1)
        for answer in answers.values():
            if isinstance(answer, messages.LeaseReply):
                buffer.deliver(answer.leases, version)
        rows = buffer.ledger.batches.batch(version)
        if rows:
            batches.append([row.occurrence for row in rows])
        if len(batches) == 20:
            break
        if rows and version % 5 == 4:
            buffer.ask(LEARNER, messages.CheckpointCommitted(version + 1))
            buffer.reopen()
    buffer.ask(LEARNER, messages.CheckpointCommitted(20))
    uses = Counter(occurrence for batch in batches for occurrence in batch)
    assert all(len(set(batch)) == 2 for batch in batches) and max(uses.values()) == 2
    found = audit(buffer.config.run_dir)
    assert (found.uses, found.counts["done"], found.counts["used"]) == (40, len(uses), 0)
    assert 0 < found.staleness_max <= 3
    assert 20 <= found.issued <= most
    assert "all 20 batches" in buffer.ask(LEARNER, messages.BatchRequest(20, 0, 1)).reason


def test_a_use_that_expires_is_counted_and_ends_the_group(start: Any):
    buffer = start(max_uses=2, sampler="freshest")
    batches = []
    for version in (0, 1):
        buffer.deliver(buffer.ask(ACTOR, credit(version, 9)).leases, version)
        batches.append(train(buffer, version))
    assert batches == [["0.0", "1.0"], ["0.0", "2.0"]]
    assert buffer.ask(LEARNER, messages.CheckpointCommitted(2)) == messages.Done()
    counts = buffer.service.status(0).counts
    assert (counts["done"], counts["used"], counts["uses_expired"]) == (2, 1, 1), "1.0 is too stale for policy 2"
    assert "the next batch is for policy 2" in buffer.ask(LEARNER, messages.BatchRequest(1, 0, 1)).reason, "0.0 is gone"


def test_an_early_rollback_undoes_the_second_use_only(start: Any):
    buffer = start(max_uses=2)
    buffer.deliver(buffer.ask(ACTOR, credit(0, 2)).leases)
    assert train(buffer, 0) == train(buffer, 1) == ["0.0", "1.0"]
    welcome = buffer.ask(b"learner-dd", messages.LearnerHello(1))
    assert (welcome.num_rolled_back, buffer.ledger.counts["used"]) == (2, 2)
    assert train(buffer, 1) == ["0.0", "1.0"]
    buffer.ask(LEARNER, messages.CheckpointCommitted(2))
    assert buffer.ledger.counts["done"] == 2
    assert buffer.ask(b"learner-ee", messages.LearnerHello(1)).num_rolled_back == 0
    assert buffer.ledger.counts["done"] == 2, "its contents are gone, but it was trained on once"


# Zero advantage.


def test_a_group_without_signal_is_dropped_and_replaced_by_another_prompt(start: Any):
    buffer = start(drop_no_signal=True, max_staleness=0)
    first = buffer.ask(ACTOR, credit()).leases
    silent = buffer.make_group(first[0].group_id, first[0].prompt_id, size=3, verdicts=["correct"] * 3)
    equal = unpack_group(silent)
    same = tuple(replace(trajectory, reward=1.0) for trajectory in equal.trajectories)
    silent = pack_group(TrajectoryGroup(equal.group_id, equal.prompt_id, same))
    assert [hand_in(buffer, silent), hand_in(buffer, silent)] == ["dropped", "duplicate"]
    alone = buffer.make_group(first[1].group_id, first[1].prompt_id, size=1)
    assert hand_in(buffer, alone) == "dropped", "whose other completions were skipped"
    second = buffer.ask(ACTOR, credit()).leases
    assert len({lease.prompt_id for lease in (*first, *second)}) == 4, "no prompt comes twice in an epoch"
    buffer.deliver(second)
    assert train(buffer, 0) == ["2.0", "3.0"]
    assert buffer.service.status(0).counts["dropped:no_signal"] == 2
    assert buffer.service.status(0).stage.num_groups == 4, "what is solved counts for the curriculum"


def test_too_many_of_them_in_a_row_end_the_run_until_the_learner_starts_anew(start: Any):
    buffer = start(drop_no_signal=True, max_no_signal=3)

    def drop(number: int) -> None:
        for lease in buffer.ask(ACTOR, credit(0, number)).leases:
            hand_in(buffer, buffer.make_group(lease.group_id, lease.prompt_id, size=1, verdicts=["correct"]))

    drop(2)
    buffer.deliver(buffer.ask(ACTOR, credit(0, 1)).leases)
    assert buffer.tell(LEARNER, messages.BatchRequest(0, 0, 2), 1) == {}
    drop(2)
    buffer.reopen()
    kept = buffer.ask(ACTOR, credit(0, 1)).leases
    drop(1)
    for rank in (0, 1):
        answer = buffer.ask(LEARNER, messages.BatchRequest(0, rank, 2))
        assert isinstance(answer, messages.NoMoreBatches)
        assert answer.reason.startswith("3 groups in a row were dropped as no_signal (buffer.max_no_signal)")
        assert "in 3 of them every completion was correct; change the level" in answer.reason
        buffer.deliver(kept)
    buffer.ask(LEARNER, messages.LearnerHello(0))
    assert train(buffer, 0) == ["2.0", kept[0].group_id]


# Too stale.


def test_drop_waits_for_nobody_samples_again_and_drops_at_last(start: Any):
    buffer = start(on_stale="drop", max_reissues=1)
    slow = buffer.ask(OTHER, credit(0, 1, "actor-1")).leases[0]
    for attempt, outcome in ((0, "dropped"), (1, "dropped")):
        begun = buffer.service._progress.next_version
        for version in range(begun, begun + 2):
            leases = buffer.ask(ACTOR, credit(version, 2)).leases
            buffer.deliver(leases, version)
            assert len(train(buffer, version)) == 2
        assert slow.group_id == f"0.{attempt}"
        late = buffer.make_group(slow.group_id, slow.prompt_id, begun)
        assert hand_in(buffer, late, OTHER) == outcome
        assert hand_in(buffer, late, OTHER) == "late"
        counts = buffer.service.status(0).counts
        assert (counts["stale"], counts.get("dropped:stale", 0)) == (attempt + 1, attempt)
        slow = buffer.ask(OTHER, credit(begun + 2, 1, "actor-1")).leases[0]
    assert slow.group_id.endswith(".0"), "another prompt"


def test_leases_that_nobody_waits_for_take_no_room(start: Any):
    buffer = start(on_stale="drop")
    assert len(buffer.ask(OTHER, credit(0, 2, "actor-1")).leases) == 2
    for version in (0, 1):
        buffer.deliver(buffer.ask(ACTOR, credit(version, 9)).leases, version)
        assert len(train(buffer, version)) == 2
    assert len(buffer.ask(ACTOR, credit(2, 9)).leases) == 4


def test_drop_keeps_the_bound_for_groups_that_wait(start: Any):
    """Three groups are due for a batch of two; the third is dropped."""
    buffer = start(on_stale="drop", max_staleness=2)
    held = buffer.ask(OTHER, credit(0, 3, "actor-1")).leases
    for version in (0, 1):
        buffer.deliver(buffer.ask(ACTOR, credit(version, 2)).leases, version)
        train(buffer, version)
    assert buffer.deliver(held, actor=OTHER) == ["stored"] * 3
    assert train(buffer, 2) == ids(messages.LeaseReply(held[:2], -1, False))
    counts = buffer.service.status(0).counts
    assert (counts["pending"], counts["ready"], counts["stale"]) == (1, 0, 1)
    assert buffer.ask(OTHER, credit(3, 1, "actor-1")).leases[0].group_id == held[2].group_id[:-1] + "1"


def test_mask_trains_on_the_tokens_that_are_new_enough(start: Any):
    buffer = start(on_stale="mask", max_reissues=0)
    slow = buffer.ask(OTHER, credit(0, 2, "actor-1")).leases
    for version in (0, 1, 2):
        buffer.deliver(buffer.ask(ACTOR, credit(version, 2)).leases, version)
        assert len(train(buffer, version)) == 2
    group = unpack_group(buffer.make_group(slow[0].group_id, slow[0].prompt_id, 0))
    spans = (VersionSpan(0, 0), VersionSpan(2, 1), VersionSpan(3, 2))
    old, long = group.trajectories
    trajectories = (old, replace(long, policy_versions=spans))
    mixed = pack_group(TrajectoryGroup(group.group_id, group.prompt_id, trajectories))
    assert hand_in(buffer, mixed, OTHER) == "stored"
    assert hand_in(buffer, buffer.make_group(slow[1].group_id, slow[1].prompt_id, 0), OTHER) == "dropped"
    buffer.deliver(buffer.ask(ACTOR, credit(3, 1)).leases, 3)
    shard = buffer.ask(LEARNER, messages.BatchRequest(3, 0, 1))
    assert shard.staleness == (3, 0)
    (kept,) = unpack_group(shard.groups[0]).trajectories
    assert kept.trajectory_id == long.trajectory_id, "of the other one nothing is left"
    assert kept.loss_mask.tolist() == [False, False, False, True, True]
    assert kept.behavior_logprobs.tolist() == [0, 0, 0, -0.5, -0.5]
    assert buffer.ask(LEARNER, messages.BatchRequest(3, 0, 1)) == shard
    counts = buffer.service.status(0).counts
    assert (counts["masked"], counts["dropped:stale"]) == (1, 1)
