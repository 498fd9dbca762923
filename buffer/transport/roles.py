"""The roles of a run's processes, and the messages that each role may send.

Every role has its own key pair (`buffer/transport/credentials.py`). The server learns a peer's role from the peer's key
(`buffer/transport/authenticator.py`). Without encryption the role is unknown, and every message is accepted.
"""

from __future__ import annotations

from typing import Any

from buffer.transport import messages

ACTOR, LEARNER, OBSERVER = "actor", "learner", "observer"
ROLES = (ACTOR, LEARNER, OBSERVER)
"""actor: actors and relays; learner: all ranks; observer: the launcher, which only asks for the status."""

SENDERS: dict[type[Any], tuple[str, ...]] = {
    messages.LeaseRequest: (ACTOR,),
    messages.GroupDelivery: (ACTOR,),
    messages.LeaseReturn: (ACTOR,),
    messages.ActorGoodbye: (ACTOR,),
    messages.EvaluationReport: (ACTOR,),
    messages.Heartbeat: (ACTOR, LEARNER),
    messages.LearnerHello: (LEARNER,),
    messages.BatchRequest: (LEARNER,),
    messages.GroupRequest: (LEARNER,),
    messages.CheckpointBegun: (LEARNER,),
    messages.CheckpointCommitted: (LEARNER,),
    messages.EvaluationRequest: (LEARNER,),
    messages.EvaluationQuery: (LEARNER,),
    messages.Close: (LEARNER,),
    messages.ProbeRequest: (LEARNER,),
    messages.ProbeReport: (ACTOR,),
    messages.StatusRequest: ROLES,
    messages.ManifestRequest: (ACTOR,),
    messages.RelayHello: (ACTOR,),
    messages.DeltaRequest: (ACTOR,),
    messages.ChunkRequest: (ACTOR,),
}
"""The roles that may send each request, to the buffer or to a weight server. Answers have no entry: only servers send
them."""


def refusal(role: str, message: messages.Message) -> str:
    """Return why a peer with this role may not send the message, in one sentence; empty: it may."""
    kind = type(message)
    allowed = SENDERS.get(kind, ())
    if not role or (role in allowed and (kind is not messages.Heartbeat or message.role == role)):  # type: ignore[union-attr]
        return ""
    if kind is messages.Heartbeat:
        return f"a peer with the key {role}.json sent the heartbeat of another role; give every process its own key"
    return f"the key {role}.json does not allow {kind.__name__}; that takes one of {list(allowed)}"
