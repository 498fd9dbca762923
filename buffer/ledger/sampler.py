"""Which groups form the next batch, and how a batch is cut into one shard per rank.

Pure and deterministic: the same ledger gives the same batch and the same shards, for every rank and after a restart.
What the sampler wishes is taken if every other group's first use can still be in time; otherwise as many groups as that
needs are taken first, those due first, and it chooses the others.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from buffer.ledger.admission import Limits, leaves_the_rest_in_time, must_wait


@dataclass(frozen=True, slots=True)
class Candidate:
    """A group that may be in the next batch: ready, or used before and fresh enough."""

    occurrence: int
    """When its prompt was dealt: 0, 1, 2, ..."""
    oldest_version: int
    num_uses: int = 0
    """Batches it was in."""
    reward_spread: float = 0.0
    """Mean |reward - mean reward| over the group's completions."""


Sampler = Callable[[Sequence[Candidate], np.random.Generator], list[Candidate]]
"""Orders all candidates, given by (oldest_version, occurrence): the first ones are taken."""


def fifo(candidates: Sequence[Candidate], rng: np.random.Generator) -> list[Candidate]:
    """Those due first, among equals those dealt first."""
    return list(candidates)


def uniform(candidates: Sequence[Candidate], rng: np.random.Generator) -> list[Candidate]:
    """Each with the same probability, without replacement."""
    return [candidates[index] for index in rng.permutation(len(candidates))]


def freshest(candidates: Sequence[Candidate], rng: np.random.Generator) -> list[Candidate]:
    """Those of the newest policy, among equals those dealt first."""
    return sorted(candidates, key=lambda group: -group.oldest_version)


def prioritized(candidates: Sequence[Candidate], rng: np.random.Generator) -> list[Candidate]:
    """With probability proportional to the spread of rewards, without replacement (Efraimidis and Spirakis 2006).

    That spread is the mean |advantage| under the baseline of the group's mean; groups without any come last.
    """
    spreads = np.array([group.reward_spread for group in candidates])
    # log(x ** (1 / weight)); the draw is never 0, a weight may be.
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
    """The occurrences of the next batch in issue order, or nothing when the learner has to wait.

    Waits for: groups_per_batch groups, and leased groups that would otherwise become too old if it `waits` for them.
    Unblocked by: deliveries and ends of leases.

    Args:
        sampler: one of `SAMPLERS`.
        candidates: all of them; for fifo at least the groups_per_batch that come first by (oldest_version, occurrence).
        leased: counts of leased groups by the version they were leased at.
        ready: counts of all ready groups, which were never used, by oldest version.
        next_version: the version the batch is for.
        limits: the run's constants.
        seed: of what the sampler draws, together with `next_version`.
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


def _first_uses(groups: Sequence[Candidate]) -> list[int]:
    """Oldest versions of those that were never used."""
    return [group.oldest_version for group in groups if not group.num_uses]


def balance(costs: Sequence[float], world_size: int, num_parts: int = 1) -> list[list[int]]:
    """Indices of the groups of each rank's shard: equally many groups, similar costs, each in issue order.

    Each of `num_parts` runs of the batch is dealt by itself, because the ranks wait for each other at every optimizer
    step. In rounds, dearest groups first: each rank gets one, the one with the least so far the dearest. So within a
    part no rank has more than another by more than the groups of one round differ.

    Args:
        costs: of each group of the batch, in issue order.
        world_size: number of ranks.
        num_parts: optimizer steps made with the batch.

    Raises:
        ValueError: when the groups cannot be shared out equally.
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
            least_first = sorted(parts, key=lambda groups: sum(costs[index] for index in groups))
            for groups, index in zip(least_first, most_expensive_first[first : first + world_size], strict=True):
                groups.append(index)
        for shard, groups in zip(shards, parts, strict=True):
            shard.extend(sorted(groups))
    return shards
