"""The admission rule, compared with a slow implementation of its definition and with simulated runs."""

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from buffer.ledger.admission import Limits, is_schedulable, must_wait, room, slot, wanted
from buffer.ledger.sampler import Candidate, fifo, next_batch


def schedulable_by_definition(versions: list[int], next_version: int, limits: Limits) -> bool:
    """Whether each group, sorted by deadline, falls into a batch that is not after its deadline."""
    last = next_version + (limits.num_slots - 1) * limits.updates_per_batch
    deadlines = sorted(min(max(v + limits.max_staleness, next_version), last) for v in versions)
    return all(
        deadline >= next_version + (i // limits.groups_per_batch) * limits.updates_per_batch
        for i, deadline in enumerate(deadlines)
    )


LIMITS = st.builds(
    lambda u, extra, size: Limits(0 if extra < 0 else u + extra, size, u),
    st.integers(1, 3),
    st.integers(-1, 4),
    st.integers(1, 4),
)


@settings(max_examples=300, deadline=None)
@given(LIMITS, st.lists(st.integers(0, 12), max_size=30), st.integers(0, 14), st.integers(0, 15))
def test_room_is_exactly_what_keeps_the_groups_schedulable(
    limits: Limits, versions: list[int], next_version: int, actor_version: int
):
    assert is_schedulable(Counter(versions), next_version, limits) == schedulable_by_definition(
        versions, next_version, limits
    )
    granted = room(Counter(versions), actor_version, next_version, limits)
    too_old = slot(min(actor_version, next_version), next_version, limits) < 0
    if too_old:
        assert granted == 0
    elif not schedulable_by_definition(versions, next_version, limits):
        # After a rollback new groups may take free places, but their number stays bounded.
        assert granted == 0 or len(versions) + granted <= limits.num_slots * limits.groups_per_batch
    else:
        assert schedulable_by_definition([*versions, *[actor_version] * granted], next_version, limits)
        assert not schedulable_by_definition([*versions, *[actor_version] * (granted + 1)], next_version, limits)


@pytest.mark.parametrize(
    ("outstanding", "actor_version", "next_version", "expected"),
    [
        ({}, 5, 5, 12),  # the design's bound (S + 1) * B from nothing
        ({5: 11}, 5, 5, 1),
        ({5: 12}, 5, 5, 0),
        ({}, 3, 5, 4),  # due with the next batch
        ({}, 2, 5, 0),  # weights too old
        ({3: 4}, 3, 5, 0),
        ({3: 4}, 4, 5, 4),
        ({1: 3}, 5, 5, 9),  # overdue groups are due now and block nobody else
        ({}, 99, 5, 12),  # weights from before a rollback give no extra room
    ],
)
def test_room_of_one_run(outstanding: dict[int, int], actor_version: int, next_version: int, expected: int):
    assert room(outstanding, actor_version, next_version, Limits(2, 4)) == expected


@settings(max_examples=200, deadline=None)
@given(LIMITS, st.data(), st.integers(0, 14), st.integers(0, 14))
def test_no_more_groups_are_wanted_than_are_used_and_never_fewer_than_the_next_batch_lacks(
    limits: Limits, data: st.DataObject, next_version: int, actor_version: int
):
    versions = Counter(data.draw(st.lists(st.integers(0, 14), max_size=12)))
    once = wanted(versions, {}, actor_version, next_version, limits, limits.num_slots)
    free = room(versions, actor_version, next_version, limits)
    assert min(free, once) == free, "with one use each, all that fit in time"
    often = replace(limits, max_uses=data.draw(st.integers(1, limits.num_slots)))
    ahead = data.draw(st.integers(1, limits.num_slots))
    used = Counter(data.draw(st.lists(st.tuples(st.integers(0, 14), st.integers(1, often.max_uses)), max_size=9)))
    reusable = {(version, uses): n for (version, uses), n in used.items() if uses < often.max_uses}
    here = versions.total() + sum(n for (v, _), n in reusable.items() if slot(v, next_version, limits) >= 0)
    number = wanted(versions, reusable, actor_version, next_version, often, ahead)
    assert number >= limits.groups_per_batch - here
    assert versions.total() + number <= ahead * limits.groups_per_batch or not number
    assert wanted(versions, reusable, actor_version, next_version, often, 0) == 0


def test_in_sync_mode_nothing_is_leased_while_a_batch_trains():
    limits = Limits(0, 4)
    assert room({}, 7, 7, limits) == 4
    assert room({7: 4}, 7, 7, limits) == 0
    assert room({}, 7, 8, limits) == 0
    assert room({}, 8, 8, limits) == 4


def test_the_learner_waits_for_a_group_that_is_due_and_only_then():
    limits = Limits(1, 2)
    assert must_wait({4: 1}, {5: 2}, Counter([5, 5]), 5, limits)
    assert not must_wait({5: 1}, {5: 2}, Counter([5, 5]), 5, limits)
    assert not must_wait({4: 2}, {4: 2}, Counter([4, 4]), 5, limits), "waiting can no longer help"
    assert not must_wait({}, {1: 9}, Counter([1, 1]), 5, limits), "after a rollback nothing is waited for"


class Run:
    """A simulated run: actors, the ledger's counts, a learner. A group is (leased version, oldest version)."""

    def __init__(self, limits: Limits, num_actors: int, seed: int) -> None:
        self.limits, self.chance = limits, random.Random(seed)
        self.next_version = 0
        self.published = 0
        self.training = False
        self.actors = [0] * num_actors
        self.leased: dict[int, tuple[int, int]] = {}
        self.ready: dict[int, int] = {}
        self.issued = 0
        self.staleness: list[int] = []

    def versions(self) -> tuple[Counter[int], Counter[int]]:
        return Counter(version for version, _ in self.leased.values()), Counter(self.ready.values())

    def lease(self, actor: int) -> None:
        leased, ready = self.versions()
        number = room(leased + ready, self.actors[actor], self.next_version, self.limits)
        for _ in range(min(number, self.chance.randint(1, 3))):
            self.leased[self.issued] = (self.actors[actor], actor)
            self.issued += 1

    def deliver(self, occurrence: int) -> None:
        version, actor = self.leased.pop(occurrence)
        self.ready[occurrence] = self.chance.randint(version, self.actors[actor])

    def hand_out(self) -> bool:
        leased, ready = self.versions()
        candidates = [Candidate(occurrence, version) for occurrence, version in self.ready.items()]
        chosen = next_batch(fifo, candidates, leased, ready, self.next_version, self.limits)
        for occurrence in chosen:
            self.staleness.append(self.next_version - self.ready.pop(occurrence))
        if chosen:
            self.next_version += self.limits.updates_per_batch
            self.training = True
        return bool(chosen)

    def step(self) -> None:
        match self.chance.randrange(6):
            case 0 | 1:
                self.lease(self.chance.randrange(len(self.actors)))
            case 2 if self.leased:
                self.deliver(self.chance.choice(list(self.leased)))
            case 3 if self.training:
                self.published, self.training = self.next_version, False
            case 4 if not self.training:
                self.hand_out()
            case 5:
                actor = self.chance.randrange(len(self.actors))
                self.actors[actor] = self.chance.randint(self.actors[actor], self.published)

    def settle(self) -> None:
        """If all leases end or are delivered and no new one starts, the learner gets a batch."""
        self.published, self.training = self.next_version, False
        for actor in range(len(self.actors)):
            self.actors[actor] = self.published
        for _ in range(self.limits.groups_per_batch):
            self.lease(0)
        for occurrence in list(self.leased):
            self.deliver(occurrence)
        assert self.hand_out(), "the run is stuck"


@settings(max_examples=150, deadline=None)
@given(LIMITS, st.integers(1, 4), st.integers(0, 2**32))
def test_staleness_never_exceeds_its_bound_and_the_run_never_stops(limits: Limits, num_actors: int, seed: int):
    run = Run(limits, num_actors, seed)
    for _ in range(200):
        run.step()
        assert len(run.leased) + len(run.ready) <= limits.num_slots * limits.groups_per_batch
    run.settle()
    assert max(run.staleness) <= limits.max_staleness


@settings(max_examples=100, deadline=None)
@given(LIMITS, st.integers(0, 2**32), st.integers(0, 6))
def test_after_a_rollback_the_run_goes_on_and_is_strict_again(limits: Limits, seed: int, back: int):
    """After a rollback some groups are newer than the learner and all leases are lost; the run has no deadlock."""
    run = Run(limits, 2, seed)
    for _ in range(150):
        run.step()
    used = len(run.staleness)
    run.next_version = run.published = max(0, run.next_version - back)
    run.training = False
    run.ready |= {run.issued + i: run.next_version + run.chance.randint(0, back) for i in range(min(used, 9))}
    run.issued += 9
    run.actors = [run.published] * 2
    for occurrence in list(run.leased):
        del run.leased[occurrence]
    for _ in range(15):
        run.settle()
    run.staleness.clear()
    for _ in range(100):
        run.step()
    run.settle()
    assert max(run.staleness) <= limits.max_staleness
