"""A delivered group outside the run's bounds is refused, and its lease ends."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from buffer.ledger.ledger import MAX_INVALID_ATTEMPTS
from buffer.trajectory import TrajectoryGroup, VersionSpan
from buffer.transport import messages
from buffer.transport.packed_group import PackedGroup, check_bounds, pack_group, unpack_group
from buffer.transport.schema import WireError
from tests.buffer.service.test_service import ACTOR, LEARNER, credit, run_to, start  # noqa: F401

BOUNDS = {"vocab_size": 6, "max_tokens": 5, "samples_per_group": 2}


def with_versions(packed: PackedGroup, *spans: VersionSpan) -> PackedGroup:
    group = unpack_group(packed)
    trajectories = tuple(replace(trajectory, policy_versions=spans) for trajectory in group.trajectories)
    return pack_group(TrajectoryGroup(group.group_id, group.prompt_id, trajectories))


@pytest.mark.parametrize(
    ("shape", "complaint"),
    [
        ({}, ""),
        ({"size": 3}, "has 3 trajectories; the run has at most 2 per group"),
        ({"num_tokens": 6}, "has a trajectory of 6 tokens; the run has at most 5"),
        ({"version": 5}, "names policy 5; the newest that can exist is 4"),
    ],
)
def test_each_bound_is_checked(make_group: Any, shape: dict[str, Any], complaint: str):
    group = make_group("7.0", 3, **shape)
    if not complaint:
        check_bounds(group, **BOUNDS, newest_version=4)
        with pytest.raises(WireError, match=r"group 7\.0 of prompt 3 has token id 5; the model has 5 token ids"):
            check_bounds(group, **BOUNDS | {"vocab_size": 5}, newest_version=4)
        return
    with pytest.raises(WireError, match=f"group 7.0 of prompt 3 {complaint}"):
        check_bounds(group, **BOUNDS, newest_version=4)
    check_bounds(group, vocab_size=0, max_tokens=0, samples_per_group=0, newest_version=9)


def test_a_version_to_come_is_found_in_any_span(make_group: Any):
    group = with_versions(make_group("7.0", 3), VersionSpan(0, 0), VersionSpan(2, 10**9))
    with pytest.raises(WireError, match="names policy 1000000000"):
        check_bounds(group, vocab_size=0, max_tokens=0, samples_per_group=0, newest_version=4)


def test_a_group_out_of_bounds_ends_its_lease_and_the_run_goes_on(start: Any):  # noqa: F811
    buffer = start(**BOUNDS)
    noted: list[bytes] = []
    buffer.service._note = lambda identity, error, now: noted.append(identity)
    outcomes = []
    for _ in range(MAX_INVALID_ATTEMPTS):
        (lease,) = buffer.ask(ACTOR, credit(num_groups=1)).leases
        group = buffer.make_group(lease.group_id, lease.prompt_id, size=3)
        outcomes.append(buffer.ask(ACTOR, messages.GroupDelivery("actor-0", group)))
    assert [receipt.outcome for receipt in outcomes] == ["invalid"] * MAX_INVALID_ATTEMPTS
    assert [receipt.group_id for receipt in outcomes] == ["0.0", "0.1", "0.2"], "the prompt is sampled again"
    assert noted == [ACTOR] * MAX_INVALID_ATTEMPTS
    counts = buffer.ask(LEARNER, messages.StatusRequest()).counts
    assert (counts["leased"], counts["pending"]) == (0, 0)
    assert (counts["invalid"], counts["dropped:invalid"]) == (MAX_INVALID_ATTEMPTS, 1)
    run_to(buffer, 2)


def test_a_group_out_of_bounds_without_a_lease_changes_nothing(start: Any):  # noqa: F811
    buffer = start(**BOUNDS)
    buffer.ask(ACTOR, credit(num_groups=1))
    before = dict(buffer.ledger.counts)
    for group_id in ("9.0", "0.7", "x"):
        group = buffer.make_group(group_id, 0, size=3)
        assert buffer.ask(ACTOR, messages.GroupDelivery("actor-0", group)).outcome == "invalid"
    assert dict(buffer.ledger.counts) == before


def test_a_token_id_beyond_any_vocabulary_does_not_reach_the_learner(start: Any):  # noqa: F811
    buffer = start(vocab_size=1000)
    (lease,) = buffer.ask(ACTOR, credit(num_groups=1)).leases
    group = unpack_group(buffer.make_group(lease.group_id, lease.prompt_id))
    high = tuple(replace(t, token_ids=np.full(t.num_tokens, 2**31 - 1, np.int32)) for t in group.trajectories)
    packed = pack_group(TrajectoryGroup(group.group_id, group.prompt_id, high))
    assert buffer.ask(ACTOR, messages.GroupDelivery("actor-0", packed)).outcome == "invalid"
    assert buffer.ledger.counts["ready"] == 0
