"""The admission rule: how many groups may be leased and when a batch may be handed out, so that no group is too stale.

Pure functions of group counts per version, called on every change of the ledger. Their cost grows with max_staleness
and not with the number of groups.

Let u = updates_per_batch, S = max_staleness, B = groups_per_batch. Batch k (k = 0, 1, ...; 0 is the next one) is handed
out at version `next_version + k * u`. A group whose oldest token was sampled by version o must be in a batch handed out
at a version <= o + S. The group's *slot* is the last such k. *Outstanding* groups are leased or ready, so they have not
been used yet. They are *schedulable* when, for every k, at most (k + 1) * B of them have a slot <= k.

`room` grants a lease only if the outstanding groups stay schedulable. `must_wait` delays a batch that would leave the
others unschedulable. So staleness at first use never exceeds S while leases are kept. It follows that
leased + ready <= (S // u + 1) * B. With S = 0 no group is leased while a batch is being trained: generation and
training strictly alternate.

After a rollback of the learner a group may be past its slot, or its version may be ahead of the learner's. Slots are
therefore clamped to [0, S // u]. An overdue group counts as due now and never blocks the run; a version ahead of the
learner's gives no extra room.

With max_uses > 1 a used group may be in later batches while it is fresh enough. Such uses have no deadline, so no slot
is reserved for them. They only lower the number of new groups `wanted`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """A run's constants for the admission rule."""

    max_staleness: int
    groups_per_batch: int
    updates_per_batch: int = 1
    max_uses: int = 1

    @property
    def num_slots(self) -> int:
        """Batches that outstanding groups may be assigned to, the next batch included: S // u + 1."""
        return self.max_staleness // self.updates_per_batch + 1

    @property
    def for_first_uses(self) -> Limits:
        """Limits under which every group can have `max_uses` uses: fewer new groups per batch, with earlier slots."""
        later = self.max_uses - 1
        size = -(-self.groups_per_batch // self.max_uses)
        return Limits(self.max_staleness - later * self.updates_per_batch, size, self.updates_per_batch)


def slot(oldest_version: int, next_version: int, limits: Limits) -> int:
    """Return the last batch that a group may be in: 0 is the next batch; negative when even that is too late."""
    return (oldest_version + limits.max_staleness - next_version) // limits.updates_per_batch


def _slack(outstanding: Mapping[int, int], next_version: int, limits: Limits) -> list[int]:
    """Return, for every slot k, how many more groups with a slot <= k fit: (k + 1) * B minus the present ones."""
    counts = [0] * limits.num_slots
    for version, count in outstanding.items():
        counts[min(max(slot(version, next_version, limits), 0), limits.num_slots - 1)] += count
    slack, total = [], 0
    for k, count in enumerate(counts):
        total += count
        slack.append((k + 1) * limits.groups_per_batch - total)
    return slack


def is_schedulable(outstanding: Mapping[int, int], next_version: int, limits: Limits) -> bool:
    """Return whether every outstanding group can be in a batch in time.

    `outstanding` counts groups by oldest version.
    """
    return min(_slack(outstanding, next_version, limits)) >= 0


def room(outstanding: Mapping[int, int], policy_version: int, next_version: int, limits: Limits) -> int:
    """Return the number of groups that an actor may start now; 0 when its weights are too old or all slots are full.

    Args:
        outstanding: number of leased and ready groups by oldest version; a leased group counts by its actor's version.
        policy_version: version of the actor's weights.
        next_version: version at which the next batch will be handed out.
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
    """Return the number of new groups that the next `ahead` batches need, if every group is used as often as possible.

    Three bounds apply: as many as `Limits.for_first_uses` has room for; at least as many as the next batch lacks; and
    no more than fill the next `ahead` batches, given all uses still possible. No group can have more than `ahead` uses,
    so the last bound is never below what the next batch lacks, and the learner cannot wait forever.

    Args:
        outstanding: number of leased and ready groups by oldest version.
        reusable: number of used groups that may be used again, by (useful version, uses so far).
        policy_version: version of the weights that would sample the new groups.
        next_version: version at which the next batch will be handed out.
        limits: the run's constants.
        ahead: number of batches to sample for, the next one included; at most `Limits.num_slots`.
    """
    if not ahead:
        return 0

    def batches(version: int) -> int:
        """Return the number of batches that a group of this version can still be in."""
        return min(max(slot(version, next_version, limits), 0) + 1, ahead)

    uses = sum(count * min(limits.max_uses, batches(version)) for version, count in outstanding.items())
    here = sum(outstanding.values())
    for (version, used), count in reusable.items():
        if slot(version, next_version, limits) >= 0:
            uses += count * min(limits.max_uses - used, batches(version))
            here += count
    missing = ahead * limits.groups_per_batch - uses
    by_uses = -(-missing // min(limits.max_uses, batches(policy_version)))
    keeping_up = room(outstanding, policy_version, next_version, limits.for_first_uses)
    return max(0, min(by_uses, max(keeping_up, limits.groups_per_batch - here)))


def in_time(outstanding: Mapping[int, int], next_version: int, limits: Limits) -> Counter[int]:
    """Return the part of `outstanding` that is not too stale for the batch for `next_version`, by oldest version."""
    return Counter({version: n for version, n in outstanding.items() if slot(version, next_version, limits) >= 0})


def oldest(ready: Mapping[int, int], number: int) -> Counter[int]:
    """Return the first `number` ready groups, by oldest version."""
    picked: Counter[int] = Counter()
    for version in sorted(ready):
        if number <= 0:
            break
        picked[version] = min(ready[version], number)
        number -= picked[version]
    return picked


def leaves_the_rest_in_time(
    leased: Mapping[int, int], ready: Mapping[int, int], picked: Counter[int], next_version: int, limits: Limits
) -> bool:
    """Return whether all other outstanding groups can be in later batches in time if `picked` are in the next one.

    Args:
        leased: number of leased groups by the version of the actor's weights.
        ready: number of ready groups by oldest version.
        picked: number of ready groups that would be in the next batch, by oldest version.
        next_version: version at which the next batch would be handed out.
        limits: the run's constants.
    """
    rest = Counter(leased)
    rest.update(ready)
    rest.subtract(picked)
    following = next_version + limits.updates_per_batch
    overdue = any(count > 0 and slot(version, following, limits) < 0 for version, count in rest.items())
    return not overdue and is_schedulable(rest, following, limits)


def must_wait(
    leased: Mapping[int, int], ready: Mapping[int, int], picked: Counter[int], next_version: int, limits: Limits
) -> bool:
    """Return whether the batch must wait, because handing out `picked` now would make another group too stale.

    True when `leaves_the_rest_in_time` is false and a leased group could improve the choice: the leased group is due
    before one of `picked`, or would take the place of a group used before. Waits for: that leased group. Unblocked by:
    its delivery, or the end of its lease. Without such a leased group waiting would gain nothing, so the batch is
    handed out and the learner never waits forever. Arguments as in `leaves_the_rest_in_time`.
    """
    all_new = picked.total() == limits.groups_per_batch
    if not any(not all_new or version < max(picked) for version, count in leased.items() if count):
        return False
    return not leaves_the_rest_in_time(leased, ready, picked, next_version, limits)
