"""Which role may send which message."""

import typing
from typing import Any

import pytest

from buffer.transport import messages
from buffer.transport.roles import ROLES, SENDERS, refusal

ANSWERS = {
    *(messages.LeaseReply, messages.GroupReceipt, messages.HeartbeatReply, messages.Done, messages.Refused),
    *(messages.LearnerWelcome, messages.Shard, messages.NoMoreBatches, messages.EvaluationReports, messages.Status),
    *(messages.Manifest, messages.NoNewVersion, messages.RelayPlace, messages.DeltaReply, messages.Chunk),
    *(messages.ShardGroup, messages.ProbeReports),
}
OF_THE_LEARNER: list[Any] = [
    messages.LearnerHello(0),
    messages.BatchRequest(0, 0, 1),
    messages.CheckpointCommitted(1),
    messages.Close(),
    messages.EvaluationRequest(0),
]


def test_every_request_has_its_senders_and_no_answer_has():
    """A new message belongs in one of the two."""
    assert SENDERS.keys() | ANSWERS == set(typing.get_args(messages.Message))
    assert not SENDERS.keys() & ANSWERS
    assert {role for roles in SENDERS.values() for role in roles} == set(ROLES)


@pytest.mark.parametrize("message", OF_THE_LEARNER, ids=lambda message: type(message).__name__)
def test_only_the_learner_sends_its_messages(message: Any):
    assert not refusal("learner", message)
    assert not refusal("", message), "without encryption the role is not known"
    assert f"actor.json does not allow {type(message).__name__}" in refusal("actor", message)
    assert refusal("observer", message) and refusal("client", message)


def test_a_heartbeat_says_the_senders_own_role():
    for role, other in (("actor", "learner"), ("learner", "actor")):
        assert not refusal(role, messages.Heartbeat(role, "x", 0, "", {}))
        assert "heartbeat of another role" in refusal(role, messages.Heartbeat(other, "x", 0, "", {}))


@pytest.mark.parametrize("role", ROLES)
def test_nobody_sends_answers(role: str):
    assert refusal(role, messages.Done())
