"""Metrics over all actors of a run, made from the metrics that each actor reports with its heartbeats."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set

AVERAGED = ("_fraction", "_seconds")
"""Ends of the names of metrics that are averaged over the actors; all others are summed."""


def over_actors(reported: Iterable[Mapping[str, float]], names: Set[str]) -> dict[str, float]:
    """Combine each metric in `names` over the actors that report it. `reported` has the metrics of each actor."""
    sums, numbers = dict.fromkeys(sorted(names), 0.0), dict.fromkeys(names, 0)
    for metrics in reported:
        for name, value in metrics.items():
            if name in sums:
                sums[name] += value
                numbers[name] += 1
    return {name: total / (numbers[name] if name.endswith(AVERAGED) else 1) for name, total in sums.items()}
