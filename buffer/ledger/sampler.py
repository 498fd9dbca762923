"""The choice of the next batch's groups, and the division of a batch into one shard per rank.

Pure and deterministic: the same ledger gives the same batch and the same shards, for every rank and after a restart.

The batch is the sampler's choice if all other groups can still be used in time (`buffer/ledger/admission.py`).
Otherwise the batch first takes the groups that are due first, as many as needed, and the sampler chooses the others.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from buffer.ledger.admission import Limits, leaves_the_rest_in_time, must_wait


@dataclass(frozen=True, slots=True)
class Candidate:
    """A group that may be in the next batch: ready, or used before and not too stale."""

    occurrence: int
    """Index of the prompt's draw: 0, 1, 2, ..."""
    oldest_version: int
    num_uses: int = 0
    """Number of batches that the group was in."""
    reward_spread: float = 0.0
    """Mean |reward - mean reward| over the group's completions."""


Sampler = Callable[[Sequence[Candidate], np.random.Generator], list[Candidate]]
"""A function that orders the candidates, given by (oldest_version, occurrence). The batch takes the first ones."""


def fifo(candidates: Sequence[Candidate], rng: np.random.Generator) -> list[Candidate]:
    """Put the oldest versions first; keep the order in which prompts were drawn among equals."""
    return list(candidates)


def uniform(candidates: Sequence[Candidate], rng: np.random.Generator) -> list[Candidate]:
    """Draw all candidates with the same probability, without replacement."""
    return [candidates[index] for index in rng.permutation(len(candidates))]


def freshest(candidates: Sequence[Candidate], rng: np.random.Generator) -> list[Candidate]:
    """Put the newest versions first; keep the order in which prompts were drawn among equals."""
    return sorted(candidates, key=lambda group: -group.oldest_version)


def prioritized(candidates: Sequence[Candidate], rng: np.random.Generator) -> list[Candidate]:
    """Draw candidates with probability proportional to `reward_spread` (Efraimidis and Spirakis 2006).

    The draw is without replacement. `reward_spread` is the mean |advantage| with the group's mean reward as the
    baseline. Groups with a spread of 0 come last.
    """
    spreads = np.array([group.reward_spread for group in candidates])
    # log(x ** (1 / weight)) with x in (0, 1]; a weight may be 0.
    with np.errstate(divide="ignore", invalid="ignore"):
        keys = np.log1p(-rng.random(len(spreads))) / spreads
    keys[spreads == 0] = -np.inf
    return [candidates[index] for index in np.argsort(-keys, kind="stable")]


SAMPLERS: dict[str, Sampler] = {f.__name__: f for f in (fifo, uniform, freshest, prioritized)}


def next_batch(
    sampler: Sampler,
    candidates: Sequence[Candidate],
    leased: Mapping[int, int],
    ready: Mapping[int, int],
    next_version: int,
    limits: Limits,
    *,
    seed: int = 0,
    waits: bool = True,
) -> list[int]:
    """Choose the occurrences of the next batch, in ascending order; empty when the learner has to wait.

    The learner waits for: groups_per_batch candidates and, with `waits`, leased groups that would otherwise become too
    stale. Unblocked by: deliveries and ends of leases.

    Args:
        sampler: one of `SAMPLERS`.
        candidates: all candidates; for fifo at least the first groups_per_batch by (oldest_version, occurrence).
        leased: number of leased groups by the version of the actor's weights.
        ready: number of all ready groups by oldest version.
        next_version: version that the batch is for.
        limits: the run's constants.
        seed: seed of the sampler, together with `next_version`.
        waits: whether the learner waits for leased groups that are due.
    """
    size = limits.groups_per_batch
    if len(candidates) < size:
        return []
    in_order = sorted(candidates, key=lambda group: (group.oldest_version, group.occurrence))
    wished = sampler(in_order, np.random.default_rng((seed, next_version)))
    picked = wished[:size]
    if not leaves_the_rest_in_time(leased, ready, _first_uses(picked), next_version, limits):
        new = [group for group in in_order if not group.num_uses][:size]

        def are_enough(number: int) -> bool:
            return leaves_the_rest_in_time(leased, ready, _first_uses(new[:number]), next_version, limits)

        picked = new[: bisect_left(range(len(new)), True, key=are_enough)]
        due = {group.occurrence for group in picked}
        picked += [group for group in wished if group.occurrence not in due][: size - len(picked)]
        if waits and must_wait(leased, ready, _first_uses(picked), next_version, limits):
            return []
    return sorted(group.occurrence for group in picked)


def _first_uses(groups: Sequence[Candidate]) -> Counter[int]:
    """Count the groups that were never used, by oldest version."""
    return Counter(group.oldest_version for group in groups if not group.num_uses)


def balance(costs: Sequence[float], world_size: int, num_parts: int = 1) -> list[list[int]]:
    """Divide a batch into shards with the same number of groups and similar costs.

    The batch consists of `num_parts` parts, one per optimizer step. Each part is divided separately, because the ranks
    wait for each other at every optimizer step. Groups are assigned in rounds, most expensive first. In each round
    every rank gets one group, and the rank with the lowest cost so far gets the most expensive one. Within a part the
    costs of two ranks therefore differ by at most the difference between the groups of one round.

    Args:
        costs: cost of each group of the batch, by occurrence.
        world_size: number of ranks.
        num_parts: number of optimizer steps made with the batch.

    Returns:
        For each rank the indices into `costs` of its groups, ascending within each part.

    Raises:
        ValueError: when the number of groups is not a multiple of `world_size` * `num_parts`.
    """
    if world_size < 1 or len(costs) % (world_size * num_parts):
        raise ValueError(
            f"a batch of {len(costs)} groups cannot be cut into {world_size} equal shards of {num_parts} parts;"
            " make groups_per_batch a multiple of the number of learner ranks times updates_per_batch"
        )
    shards: list[list[int]] = [[] for _ in range(world_size)]
    size = len(costs) // num_parts
    for start in range(0, len(costs), size) if size else ():
        parts: list[list[int]] = [[] for _ in range(world_size)]
        most_expensive_first = sorted(range(start, start + size), key=lambda index: (-costs[index], index))
        for first in range(0, size, world_size):
            cheapest_first = sorted(parts, key=lambda groups: sum(costs[index] for index in groups))
            for groups, index in zip(cheapest_first, most_expensive_first[first : first + world_size], strict=True):
                groups.append(index)
        for shard, groups in zip(shards, parts, strict=True):
            shard.extend(sorted(groups))
    return shards
