"""Who may start a group, and when a batch may be cut, so that no group is first trained on too late.

Pure functions over counts per version, called by `buffer/service/service.py` on every change; their cost grows with
max_staleness and never with the number of groups. Batch k (k = 0, 1, ...) from now is handed out at version
`next_version + k * u`, with u = updates_per_batch. A group whose oldest token stems from version o must be in a batch
handed out at a version <= o + S, with S = max_staleness: its *slot* is the last such k. The outstanding groups (leased
and ready, that is never used) are schedulable when, for every k, at most (k + 1) * B of them have a slot <= k, with
B = groups_per_batch.

Admission keeps the outstanding groups schedulable and the choice of a batch leaves the rest schedulable for the next
version, so staleness never exceeds S while leases are kept. It implies leased + ready <= (S // u + 1) * B, and with
S = 0 nothing is leased at a version whose batch is being trained: generation and training take strict turns.

A group may be past its slot all the same, after a rollback of the learner. Slots are therefore clamped to
[0, S // u]: an overdue group counts as due now and never blocks the loop, and weights from ahead of the learner give
no extra room.

With max_uses > 1 a group may be in later batches again, as long as it is fresh enough. Such uses have no deadline and
need no place kept; they only lower how many groups are `wanted`.
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
    max_uses: int = 1

    @property
    def num_slots(self) -> int:
        """Batches that may be under way at once, the one due next included."""
        return self.max_staleness // self.updates_per_batch + 1

    @property
    def of_first_uses(self) -> Limits:
        """So many new groups in each batch, and so early, that every group can be used as often as it may."""
        later = self.max_uses - 1
        size = -(-self.groups_per_batch // self.max_uses)
        return Limits(self.max_staleness - later * self.updates_per_batch, size, self.updates_per_batch)


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


def wanted(
    outstanding: Mapping[int, int],
    reusable: Mapping[tuple[int, int], int],
    policy_version: int,
    next_version: int,
    limits: Limits,
    ahead: int,
) -> int:
    """How many groups more the batches under way need, if every group is used as often as it may and can be.

    As many as keep up with `Limits.of_first_uses`, at least what the next batch lacks, and no more than fill the
    batches under way. No group has more uses than these are, so the last bound is never below what the next batch
    lacks: the learner cannot wait for ever.

    Args:
        outstanding: counts of leased and ready groups by oldest version.
        reusable: counts of groups that were used and may be again, by (last version they are of use, uses so far).
        policy_version: the optimizer steps behind the weights that would sample the new groups.
        next_version: the version at which the next batch will be handed out.
        limits: the run's constants.
        ahead: batches that may be under way at once, the next one included, as far as the run needs so many.
    """
    if not ahead:
        return 0

    def batches(version: int) -> int:
        """That a group may yet be in."""
        return min(max(slot(version, next_version, limits), 0) + 1, ahead)

    uses = sum(count * min(limits.max_uses, batches(version)) for version, count in outstanding.items())
    here = sum(outstanding.values())
    for (version, used), count in reusable.items():
        if slot(version, next_version, limits) >= 0:
            uses += count * min(limits.max_uses - used, batches(version))
            here += count
    missing = ahead * limits.groups_per_batch - uses
    by_uses = -(-missing // min(limits.max_uses, batches(policy_version)))
    keeping_up = room(outstanding, policy_version, next_version, limits.of_first_uses)
    return max(0, min(by_uses, max(keeping_up, limits.groups_per_batch - here)))


def in_time(outstanding: Mapping[int, int], next_version: int, limits: Limits) -> Counter[int]:
    """Those of the counts by oldest version that may yet be in the batch for `next_version`."""
    return Counter({version: n for version, n in outstanding.items() if slot(version, next_version, limits) >= 0})


def leaves_the_rest_in_time(
    leased: Mapping[int, int], ready: Mapping[int, int], picked: Sequence[int], next_version: int, limits: Limits
) -> bool:
    """Whether, with `picked` handed out at `next_version`, all other outstanding groups fit the batches after it.

    Args:
        leased: counts of leased groups by the version they were leased at.
        ready: counts of ready groups by oldest version.
        picked: oldest versions of the ready groups that would be in the batch.
        next_version: the version at which they would be handed out.
        limits: the run's constants.
    """
    rest = Counter(leased)
    rest.update(ready)
    rest.subtract(picked)
    following = next_version + limits.updates_per_batch
    overdue = any(count > 0 and slot(version, following, limits) < 0 for version, count in rest.items())
    return not overdue and is_schedulable(rest, following, limits)


def must_wait(
    leased: Mapping[int, int], ready: Mapping[int, int], picked: Sequence[int], next_version: int, limits: Limits
) -> bool:
    """Whether handing out `picked` now would make another group too old although waiting can prevent it.

    True when the rest would not be in time, and a leased group is due before one of `picked`, or would take the place
    of a group used before. Waits for: that group. Unblocked by: its delivery, or the end of its lease. When there is
    none, `picked` is the best choice there is and waiting would gain nothing, so this never blocks for ever. Arguments
    as for `leaves_the_rest_in_time`.
    """
    all_new = len(picked) == limits.groups_per_batch
    if not any(not all_new or version < max(picked) for version, count in leased.items() if count):
        return False
    return not leaves_the_rest_in_time(leased, ready, picked, next_version, limits)
