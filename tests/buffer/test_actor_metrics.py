"""Metrics over all actors: sums of counts, means of shares and seconds."""

from buffer.actor_metrics import over_actors
from buffer.transport.messages import Peer


def peer(role: str, **metrics: float) -> Peer:
    return Peer(role, f"{role}-0", 0, "", 0.0, metrics)


def test_counts_are_summed_and_shares_and_seconds_averaged_over_the_actors_that_report_them():
    peers = [
        peer("actor", tokens=10.0, idle_fraction=0.0, weight_pause_seconds=1.0),
        peer("actor", tokens=30.0, idle_fraction=0.5),
        peer("actor"),
        peer("learner", tokens=1000.0, idle_fraction=1.0),
    ]
    assert over_actors(peers) == {"tokens": 40.0, "idle_fraction": 0.25, "weight_pause_seconds": 1.0}
    assert over_actors([peer("learner", tokens=1.0)]) == {}
