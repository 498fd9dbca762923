"""Who may start a group, and when a batch may be cut, so that no group is ever trained on too late.

Pure functions over counts per version, called by `buffer/service.py` on every change; their cost grows with
max_staleness and never with the number of groups. Batch k (k = 0, 1, ...) from now is handed out at version
`next_version + k * u`, with u = updates_per_batch. A group whose oldest token stems from version o must be in a batch
handed out at a version <= o + S, with S = max_staleness: its *slot* is the last such k. The outstanding groups (leased
and ready) are schedulable when, for every k, at most (k + 1) * B of them have a slot <= k, B = groups_per_batch.

Admission keeps the outstanding groups schedulable and the choice of a batch leaves the rest schedulable for the next
version, so staleness never exceeds S while leases are kept. It implies leased + ready <= (S // u + 1) * B, and with
S = 0 nothing is leased at a version whose batch is being trained: generation and training take strict turns.

A group may be past its slot all the same, after a rollback of the learner. Slots are therefore clamped to
[0, S // u]: an overdue group counts as due now and never blocks the loop, and weights from ahead of the learner give
no extra room.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """The constants of one run."""

    max_staleness: int
    groups_per_batch: int
    updates_per_batch: int = 1

    @property
    def num_slots(self) -> int:
        """Batches that may be under way at once, the one due next included."""
        return self.max_staleness // self.updates_per_batch + 1


def slot(oldest_version: int, next_version: int, limits: Limits) -> int:
    """The last batch from now that this group may be in: 0 is the next; negative when even that is too late."""
    return (oldest_version + limits.max_staleness - next_version) // limits.updates_per_batch


def _slack(outstanding: Mapping[int, int], next_version: int, limits: Limits) -> list[int]:
    """Per slot k, how many more groups due by batch k fit: (k + 1) * B minus those there are."""
    counts = [0] * limits.num_slots
    for version, count in outstanding.items():
        counts[min(max(slot(version, next_version, limits), 0), limits.num_slots - 1)] += count
    slack, total = [], 0
    for k, count in enumerate(counts):
        total += count
        slack.append((k + 1) * limits.groups_per_batch - total)
    return slack


def is_schedulable(outstanding: Mapping[int, int], next_version: int, limits: Limits) -> bool:
    """Whether all outstanding groups, given as counts by oldest version, can be trained on in time."""
    return min(_slack(outstanding, next_version, limits)) >= 0


def room(outstanding: Mapping[int, int], policy_version: int, next_version: int, limits: Limits) -> int:
    """How many groups an actor at `policy_version` may start now; 0 when its weights are too old or all slots are full.

    Args:
        outstanding: counts of leased and ready groups by oldest version (by the actor's version while leased).
        policy_version: the optimizer steps behind the actor's weights.
        next_version: the version at which the next batch will be handed out.
        limits: the run's constants.
    """
    first = slot(min(policy_version, next_version), next_version, limits)
    if first < 0:
        return 0
    return max(0, min(_slack(outstanding, next_version, limits)[first:]))


def must_wait(
    leased: Mapping[int, int], ready: Mapping[int, int], picked: Sequence[int], next_version: int, limits: Limits
) -> bool:
    """Whether handing out `picked` now would make another group too old although waiting can prevent it.

    True when the rest would not fit the batches from `next_version` + u on, and a leased group is due before one of
    `picked`. Waits for: that group. Unblocked by: its delivery, or the end of its lease. When no leased group is due
    earlier, `picked` is the best choice there is and waiting would gain nothing, so this never blocks for ever.

    Args:
        leased: counts of leased groups by the version they were leased at.
        ready: counts of ready groups by oldest version.
        picked: oldest versions of the ready groups that would form the batch.
        next_version: the version at which they would be handed out.
        limits: the run's constants.
    """
    if not any(version < max(picked) for version, count in leased.items() if count):
        return False
    rest = Counter(leased)
    rest.update(ready)
    rest.subtract(picked)
    following = next_version + limits.updates_per_batch
    overdue = any(count > 0 and slot(version, following, limits) < 0 for version, count in rest.items())
    return overdue or not is_schedulable(rest, following, limits)
