"""Fair places: how many groups each actor may have in flight, from what the actors finish.

Owned by `buffer/service/leases.py`. Admission says how many groups may be outstanding. Without a share, whoever first
reports new weights would take all places of a batch, and the other actors would wait for the next one. Three numbers
divide the places:

- *in flight*, a target for all actors together. Too many make the learner wait for the oldest lease although a batch is
  ready, or become too stale; too few leave engines without work. The target follows from both (`adjusted`);
- the actor's *share* of the target (`part`, `share`): four fifths by what the actors finish, one fifth equally. The
  equal part lets a slow actor show when it has become faster: without it, few groups would mean few finished groups,
  and those fewer groups again;
- the actor's *quota*: its part of the groups that are leased per batch. It holds while the learner does not wait. Fast
  engines then have few groups in flight, so the share alone would leave all places to the actor whose weights arrive
  first. What is left of a quota adds up, so each of many actors has its turn although a batch has fewer places.

An actor that is alone gets all places. Shares and quotas hold while the others are about to take theirs: places that
nobody took for `patience` seconds after a batch go to whoever asks. Patience is one and a half times as long as the
actors' weights arrive apart, and at most as long as the last batch took.

`now` is seconds of a monotonic clock. Everything here is lost when the buffer restarts, and measured again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from buffer.ledger.admission import Limits

EQUAL_PART = 0.2
"""The part of the places that is shared equally."""
ALMOST = 0.25
"""What a share may lack of a whole place and still get it: measured speeds of equal actors are not quite equal."""
GROWTH = 1 / 32
"""Batches by which the target grows with every batch that the learner got in time."""
MEMORY = 0.9
"""Weight of what was measured before, per finished group of an actor."""
UNFINISHED = 100
"""Most entries for groups of one actor that may never be finished."""
CROWDING_MEMORY = 0.995
"""Weight of what was measured before, per finished group of any actor."""
QUOTA_MEMORY = SPREAD_MEMORY = 0.8
"""Weight of what was measured before, per batch: of the groups leased, and of how far apart weights arrive."""
PATIENCE = 1.5
"""Patience, as a multiple of the time by which weights arrive apart: they are not equally late every time."""


def part(finished: float, all_finished: float, num_actors: int) -> float:
    """Return the part of all places that an actor may take.

    Args:
        finished: groups that the actor finishes per second while it has any.
        all_finished: the sum over all live actors.
        num_actors: number of live actors.
    """
    return (1 - EQUAL_PART) * finished / all_finished + EQUAL_PART / num_actors


def share(part: float, in_flight: float) -> int:
    """Return how many groups an actor may have in flight. At least 1, so that no actor starves.

    Args:
        part: the actor's part of all places.
        in_flight: target for all actors together.
    """
    return max(1, int(in_flight * part + ALMOST))


def adjusted(
    in_flight: float, late: float, crowding: float, limits: Limits, num_actors: int, *, was_short: bool
) -> float:
    """Return the target for the groups in flight after a batch.

    Args:
        in_flight: the target before.
        late: part of the batch that was lost by too many groups in flight (`Places.take_batch`). The target shrinks by
            it.
        crowding: how much longer groups take with more groups in flight (`Crowding`). At 0 an engine does more work
            with more groups, which is worth more than what is lost; so the target does not shrink. Squared, because
            the measured number is never quite 0.
        limits: the run's constants.
        num_actors: number of live actors; each may have one group.
        was_short: whether an actor had to wait for its share. Otherwise the target was not reached, and does not grow.
    """
    batch = limits.groups_per_batch
    grown = in_flight + GROWTH * batch * (1 - late) if was_short else in_flight
    return min(max(grown - late * crowding**2 * in_flight, num_actors, batch / 8), limits.num_slots * batch)


@dataclass(slots=True)
class Speed:
    """What one actor finishes, measured while it has groups."""

    groups: float = 0.0
    seconds: float = 0.0
    since: float | None = None
    """When the actor was last seen to begin or to finish a group; None: it had none."""
    begun: dict[str, tuple[float, int]] = field(default_factory=dict)
    """When each group was leased, and how many groups the actor had then."""
    log_number: float = 0.0
    log_seconds: float = 0.0
    """Means over the actor's groups: of the number of groups when it was leased, and of its time."""

    def begin(self, group_ids: Sequence[str], held: int, now: float) -> None:
        """Note that the actor gets groups and has `held` with them."""
        if self.since is None or held == len(group_ids):
            self.since = now
            self.begun.clear()
        self.begun.update((group_id, (now, held)) for group_id in group_ids)
        # Groups whose leases end without a delivery are never finished.
        while len(self.begun) > 2 * held + UNFINISHED:
            del self.begun[next(iter(self.begun))]

    def finish(self, now: float, *, has_more: bool) -> None:
        """Note a finished group."""
        if self.since is not None:
            self.groups = MEMORY * self.groups + 1
            self.seconds = MEMORY * self.seconds + now - self.since
            self.since = now
        if not has_more:
            self.since = None
            self.begun.clear()

    @property
    def per_second(self) -> float:
        """Groups per second; 0: not known yet."""
        return self.groups / self.seconds if self.seconds > 0 else 0.0


class Crowding:
    """How much longer a group takes when its actor has more groups: the slope of log time over log number of groups.

    0: as long as alone, so the engine does more work with more groups. 1: twice as long with twice as many, so the
    engine does no more work. All actors are measured together, each against its own means, because few groups of one
    actor say little and actors differ in speed.
    """

    def __init__(self) -> None:
        self.slope = 0.0
        self._covariance = self._variance = 0.0

    def finish(self, speed: Speed, group_id: str, now: float) -> None:
        """Note a finished group."""
        began, held = speed.begun.pop(group_id, (now, 0))
        if now <= began:
            return
        x, y = math.log(held), math.log(now - began)
        if speed.groups:
            dx, dy = x - speed.log_number, y - speed.log_seconds
            self._covariance = CROWDING_MEMORY * self._covariance + dx * dy
            self._variance = CROWDING_MEMORY * self._variance + dx * dx
            if self._variance > 1:
                self.slope = min(max(self._covariance / self._variance, 0.0), 1.0)
        weight = MEMORY if speed.groups else 0.0
        speed.log_number = weight * speed.log_number + (1 - weight) * x
        speed.log_seconds = weight * speed.log_seconds + (1 - weight) * y

    def capacity(self, speed: Speed) -> float:
        """Return what an actor finishes per second, as if all had the same number of groups; 0: not known yet."""
        return speed.per_second / math.exp((1 - self.slope) * speed.log_number)


class Places:
    """The live actors' shares and quotas. Every call costs the same, however many actors there are.

    Args:
        limits: the run's constants.
        waits: whether the learner waits for groups that would become too stale.
    """

    def __init__(self, limits: Limits, *, waits: bool = True) -> None:
        self._limits, self._waits = limits, waits
        self.learner_waits = False
        """Whether the learner has asked for a batch that cannot be formed yet."""
        self.num_batches = 0
        """Batches handed out so far."""
        self._quotas: dict[bytes, tuple[float, int]] = {}
        """What was left of an actor's quota, and the number of batches at that time."""
        self._per_batch = float(limits.groups_per_batch)
        """Mean number of groups that are leased per batch."""
        self._num_taken = 0
        self._loaded: dict[int, float] = {}
        """When the first actor had each of the latest versions."""
        self._spread = 0.0
        """Seconds from the first actor that has a version to the last one."""
        self._seconds = 0.0
        """Duration of the last batch."""
        self._most = limits.num_slots * limits.groups_per_batch
        self.in_flight = float(self._most)
        self.crowding = Crowding()
        self._speeds: dict[bytes, float] = {}
        """Of the live actors; 0: not known yet."""
        self._sum, self._num_known = 0.0, 0
        self._taken_at = 0.0
        self.patience = 0.0
        """Seconds for which something is kept for actors that still load the newest weights."""
        self._was_short = False
        self._left_since: float | None = None
        """Since when places have been kept for actors that did not take them."""
        self._late_since: float | None = None
        """Since when the learner has waited because too many groups are in flight."""

    def set_speed(self, actor: bytes, per_second: float) -> None:
        """Count the actor as live."""
        self.remove(actor)
        self._speeds[actor] = per_second
        self._sum += per_second
        self._num_known += per_second > 0

    def remove(self, actor: bytes) -> None:
        """Forget an actor that is no longer live."""
        before = self._speeds.pop(actor, 0.0)
        self._num_known -= before > 0
        self._sum = self._sum - before if self._num_known else 0.0

    def forget(self, actor: bytes) -> None:
        """Forget an actor for good."""
        self.remove(actor)
        self._quotas.pop(actor, None)

    def part(self, actor: bytes) -> float:
        """Return the actor's part of all places. An actor whose speed is not known counts as an average one."""
        num_actors = len(self._speeds) or 1
        mean = self._sum / self._num_known if self._num_known else 1.0
        return part(self._speeds.get(actor, 0.0) or mean, mean * num_actors, num_actors)

    def share(self, actor: bytes) -> int:
        """Return how many groups the actor may have in flight."""
        if len(self._speeds) <= 1 and self._waits:
            return self._most
        return share(self.part(actor), self.in_flight)

    def keep(self, num_leased: int, now: float) -> bool:
        """Return whether an actor that has its share must leave the places that are left to the others."""
        self._was_short = True
        if num_leased + 1 > self.in_flight:
            self._left_since = None
            return True
        return self._is_patient(now)

    def _is_patient(self, now: float) -> bool:
        if self._left_since is None:
            self._left_since = now
        return now - self._left_since < self.patience

    # Quotas.

    def _quota(self, actor: bytes) -> float:
        """Return how many groups the actor may still take, at most those of one batch and one more."""
        per_batch = self.part(actor) * self._per_batch
        left, since = self._quotas.get(actor, (per_batch + 1, self.num_batches))
        return min(left + (self.num_batches - since) * per_batch, per_batch + 1)

    def is_out_of_turn(self, actor: bytes, now: float) -> bool:
        """Return whether an actor must leave the places that are left, because it had its part of this batch's."""
        return self.had_its_part(actor) and self._is_patient(now)

    def had_its_part(self, actor: bytes) -> bool:
        """Return whether the actor had its part of the places, and leaving the rest to others costs nothing."""
        return not self.learner_waits and len(self._speeds) > 1 and self._quota(actor) < 1

    def next_turn(self, actor: bytes) -> int:
        """Return the number of batches with which the actor may take a place again."""
        lacks = 1 - self._quota(actor)
        return self.num_batches + max(1, math.ceil(lacks / (self.part(actor) * self._per_batch)))

    def take(self, actor: bytes) -> None:
        """Note that the actor gets a place. What it takes beyond its quota is not held against it."""
        left = self._quota(actor)
        self._quotas[actor] = left - 1 if left >= 1 else left, self.num_batches
        self._num_taken += 1

    def load(self, version: int, now: float) -> None:
        """Note that an actor has loaded a version."""
        first = self._loaded.setdefault(version, now)
        if len(self._loaded) > self._limits.max_staleness + 3:
            del self._loaded[next(iter(self._loaded))]
        self._spread = max(self._spread, min(now - first, self._seconds))

    @property
    def is_late(self) -> bool:
        """Whether the learner waits, and too many groups in flight are known to be the reason."""
        return self._late_since is not None

    def note_late(self, now: float) -> None:
        """Note that the learner waits because too many groups are in flight."""
        if self._late_since is None:
            self._late_since = now

    def take_batch(self, now: float, num_useless: int = 0) -> None:
        """Note that a batch was handed out, and adjust the target.

        Lost by too many groups in flight: the time in which the learner waits for old leases although enough groups are
        ready; the time in which it waits for groups that some actors have, while another has none and no place is left;
        and groups that became too stale.

        Args:
            now: the time.
            num_useless: groups that became too stale since the last batch, or lost tokens because they were.
        """
        self.num_batches += 1
        self._per_batch += (1 - QUOTA_MEMORY) * (self._num_taken - self._per_batch)
        self._per_batch = max(1.0, self._per_batch)
        self._num_taken = 0
        seconds = now - self._taken_at
        late = (now - self._late_since) / seconds if self._late_since is not None and seconds > 0 else 0.0
        late = max(late, num_useless / (num_useless + self._limits.groups_per_batch))
        self.in_flight = adjusted(
            *(self.in_flight, late, self.crowding.slope, self._limits, len(self._speeds)), was_short=self._was_short
        )
        self.patience, self._taken_at = min(PATIENCE * self._spread, seconds), now
        self._spread *= SPREAD_MEMORY
        self._seconds = seconds
        self._left_since = None
        self._was_short, self._late_since = False, None
