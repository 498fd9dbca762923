"""Metrics over all actors of a run, made from the metrics that each actor reports with its heartbeats."""

from __future__ import annotations

from collections.abc import Iterable

from buffer.transport.messages import Peer

AVERAGED = ("_fraction", "_seconds")
"""Ends of the names of metrics that are averaged over the actors; all others are summed."""


def over_actors(peers: Iterable[Peer]) -> dict[str, float]:
    """Combine each metric over the actors among `peers` that report the metric. Other roles are left out."""
    actors = [peer for peer in peers if peer.role == "actor"]
    metrics = {}
    for name in {name for actor in actors for name in actor.metrics}:
        values = [actor.metrics[name] for actor in actors if name in actor.metrics]
        metrics[name] = sum(values) / (len(values) if name.endswith(AVERAGED) else 1)
    return metrics
