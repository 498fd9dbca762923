"""Metrics over all actors of a run, made from the metrics that each actor reports with its heartbeats."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

AVERAGED = ("_fraction", "_seconds")
"""Ends of the names of metrics that are averaged over the actors; all others are summed."""


def over_actors(reported: Iterable[Mapping[str, float]], most: int) -> dict[str, float]:
    """Combine each metric over the actors that report it. `reported` has the metrics of each actor.

    Of more than `most` names, which only broken actors report together, those that come first count.
    """
    sums: dict[str, float] = {}
    numbers: dict[str, int] = {}
    for metrics in reported:
        for name, value in metrics.items():
            if name in sums:
                sums[name] += value
                numbers[name] += 1
            elif len(sums) < most:
                sums[name], numbers[name] = value, 1
    return {name: total / (numbers[name] if name.endswith(AVERAGED) else 1) for name, total in sums.items()}
