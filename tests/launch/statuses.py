"""Statuses of the buffer, for the tests of display and summary."""

from buffer.actor_metrics import over_actors
from buffer.transport.messages import ActorTotals, EvaluationReport, Peer, StageStatus, Status, Wait


def report(version: int, pass_at_1: float, requested: int | None = None) -> EvaluationReport:
    return EvaluationReport("actor-0", version if requested is None else requested, version, 200, pass_at_1, 0.1, 21, 3)


def peer(
    role: str, name: str, waiting_for: str = "", silent_seconds: float = 0.5, since: float = 0.0, **metrics: float
) -> Peer:
    return Peer(role, name, 12, waiting_for, silent_seconds, metrics, waiting_seconds=since)


LEARNER = peer(
    "learner",
    "learner-0",
    "a batch",
    reward=0.625,
    staleness=1.25,
    samples_per_second=210.0,
    tokens_per_second=4321.0,
    idle_fraction=0.25,
)
COUNTS = {"pending": 0, "leased": 3, "ready": 5, "used": 16, "done": 192, "dropped:prompt_too_long": 2, "issued": 218}


def status(
    *peers: Peer,
    reports: tuple[EvaluationReport, ...] = (),
    policy_version: int = 12,
    waits: tuple[Wait, ...] = (),
    stage: StageStatus | None = None,
) -> Status:
    reported = [peer.metrics for peer in peers if peer.role == "actor"]
    metrics = over_actors(reported, 64)
    actors = ActorTotals(sum(peer.role == "actor" and peer.silent_seconds < 60 for peer in peers), metrics=metrics)
    return Status(COUNTS, policy_version, False, peers, reports, waits, stage or StageStatus(), actors=actors)
