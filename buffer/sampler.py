"""Which ready groups form the next batch, and how a batch is cut into one shard per rank.

Pure and deterministic: the same ledger gives the same batch and the same shards, for every rank and after a restart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from buffer.admission import Limits, must_wait


@dataclass(frozen=True, slots=True)
class ReadyGroup:
    """A candidate for the next batch."""

    occurrence: int
    """When its prompt was dealt: 0, 1, 2, ..."""
    oldest_version: int


def fifo(
    candidates: Sequence[ReadyGroup],
    leased: Mapping[int, int],
    ready: Mapping[int, int],
    next_version: int,
    limits: Limits,
) -> list[int]:
    """The occurrences of the next batch in issue order, or nothing when the learner has to wait.

    Takes the groups due first, among equals those dealt first. Waits for: groups_per_batch ready groups, and leased
    groups that would otherwise become too old. Unblocked by: deliveries and ends of leases.

    Args:
        candidates: at least the groups_per_batch ready groups that come first by (oldest_version, occurrence).
        leased: counts of leased groups by the version they were leased at.
        ready: counts of all ready groups by oldest version.
        next_version: the version the batch is for.
        limits: the run's constants.
    """
    picked = sorted(candidates, key=lambda g: (g.oldest_version, g.occurrence))[: limits.groups_per_batch]
    if len(picked) < limits.groups_per_batch:
        return []
    if must_wait(leased, ready, [group.oldest_version for group in picked], next_version, limits):
        return []
    return sorted(group.occurrence for group in picked)


def balance(num_tokens: Sequence[int], world_size: int) -> list[list[int]]:
    """Indices of the groups of each rank's shard: equally many groups, similar token counts, each in issue order.

    Greedy: the longest group goes to the rank with the fewest tokens that still has a free place.

    Args:
        num_tokens: tokens of each group of the batch, in issue order.
        world_size: number of ranks.

    Raises:
        ValueError: when the groups cannot be shared out equally.
    """
    if world_size < 1 or len(num_tokens) % world_size:
        raise ValueError(
            f"a batch of {len(num_tokens)} groups cannot be cut into {world_size} equal shards;"
            " make groups_per_batch a multiple of the number of learner ranks"
        )
    places = len(num_tokens) // world_size
    shards: list[list[int]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for index in sorted(range(len(num_tokens)), key=lambda i: (-num_tokens[i], i)):
        rank = min((r for r in range(world_size) if len(shards[r]) < places), key=lambda r: (loads[r], r))
        shards[rank].append(index)
        loads[rank] += num_tokens[index]
    return [sorted(shard) for shard in shards]
