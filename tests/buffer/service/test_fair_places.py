"""Fair places: the shares and the target, and what they are worth in the model beside this file."""

import pytest

from buffer.ledger.admission import Limits
from buffer.service.fair_places import Crowding, Places, Speed, adjusted, part, share
from tests.buffer.service.fair_places_model import Case, play

EQUAL = 10.0


def mixed(number: int) -> tuple[float, ...]:
    """Half of the actors are three times as fast."""
    return (30.0, 10.0) * (number // 2)


CASES = {
    "1": (Case((EQUAL,), 16, 30, 10), 9.8),
    "2": (Case((EQUAL,) * 2, 16, 40, 15), 20.7),
    "4": (Case((EQUAL,) * 4, 16, 40, 15), 40.9),
    "8": (Case((EQUAL,) * 8, 16, 50, 20), 80.4),
    "32": (Case((EQUAL,) * 32, 64, 30, 18), 285.4),
    "64": (Case((EQUAL,) * 64, 128, 18, 11), 460.0),
    "2 mixed": (Case(mixed(2), 16, 40, 15), 41.1),
    "8 mixed": (Case(mixed(8), 16, 45, 20), 116.0),
    "32 mixed": (Case(mixed(32), 128, 24, 15), 599.5),
    "4 batching": (Case((EQUAL,) * 4, 16, 40, 15, batching=True), 79.4),
    "8 batching": (Case((EQUAL,) * 8, 16, 40, 15, batching=True), 80.7),
    "1 in turn": (Case((EQUAL,), 16, 20, 5, 0), 9.5),
    "2 in turn": (Case((EQUAL,) * 2, 16, 30, 10, 0), 16.0),
    "4 in turn": (Case((EQUAL,) * 4, 16, 40, 15, 0), 26.5),
    "8 in turn": (Case((EQUAL,) * 8, 16, 40, 15, 0), 33.7),
    "32 in turn": (Case((EQUAL,) * 32, 64, 16, 8, 0), 106.2),
    "64 in turn": (Case((EQUAL,) * 64, 128, 12, 7, 0), 185.3),
    "8 in turn, batching": (Case((EQUAL,) * 8, 16, 30, 10, 0, batching=True), 27.0),
    "8 dropping": (Case((EQUAL,) * 8, 16, 50, 20, on_stale="drop"), 76.4),
    "4 dropping, batching": (Case((EQUAL,) * 4, 16, 40, 15, on_stale="drop", batching=True), 77.3),
}
"""The cases, and the groups a second of the best fixed number of groups per actor, which the model's file finds."""


def test_an_actor_gets_its_part_of_the_places_and_at_least_one():
    assert part(30.0, 40.0, 2) == pytest.approx(0.7)
    assert part(0.0, 40.0, 4) == pytest.approx(0.05), "who finishes nothing can show that it has become faster"
    assert sum(part(speed, 60.0, 3) for speed in (10.0, 20.0, 30.0)) == pytest.approx(1.0)
    assert (share(0.7, 48.0), share(0.05, 8.0)) == (33, 1)


def test_the_target_shrinks_only_where_groups_wait_in_vain():
    limits = Limits(max_staleness=2, groups_per_batch=16)
    assert adjusted(40.0, 0.5, 1.0, limits, 4, was_short=False) == 20.0
    assert adjusted(40.0, 0.5, 0.0, limits, 4, was_short=False) == 40.0, "more groups are more work done"
    assert adjusted(40.0, 0.0, 1.0, limits, 4, was_short=True) == 40.5
    assert adjusted(40.0, 0.0, 1.0, limits, 4, was_short=False) == 40.0, "the target was not reached"
    assert adjusted(47.9, 0.0, 1.0, limits, 4, was_short=True) == 48.0, "no more than all places"
    assert adjusted(10.0, 1.0, 1.0, limits, 8, was_short=True) == 8.0, "one for each actor"


def crowding_of(seconds_with: dict[int, float]) -> float:
    """The slope for two actors whose groups take so long, by the number of groups; one is three times as fast."""
    crowding, now = Crowding(), 0.0
    for speed, factor in ((Speed(), 1.0), (Speed(), 3.0)):
        for number in range(60):
            held = (2, 4, 8)[number % 3]
            speed.begin([str(number)], held, now)
            now += seconds_with[held] / factor
            crowding.finish(speed, str(number), now)
            speed.finish(now, has_more=True)
    return crowding.slope


def test_crowding_tells_an_engine_that_batches_from_one_that_does_not():
    assert crowding_of({2: 0.2, 4: 0.4, 8: 0.8}) == pytest.approx(1.0)
    assert crowding_of({2: 0.4, 4: 0.4, 8: 0.4}) == pytest.approx(0.0, abs=0.01)
    assert 0.3 < crowding_of({2: 0.4, 4: 0.57, 8: 0.8}) < 0.7


def test_an_engine_that_batches_is_not_faster_because_it_has_more_groups():
    crowding, capacity = Crowding(), []
    for held in (2, 8):
        speed, now = Speed(), 0.0
        for number in range(20):
            speed.begin([str(number)], held, now)
            now += 0.4 / held
            crowding.finish(speed, str(number), now + 0.4)
            speed.finish(now, has_more=True)
        capacity.append(crowding.capacity(speed))
    assert capacity[0] == pytest.approx(capacity[1])


def test_speed_counts_only_the_time_in_which_the_actor_has_groups():
    speed = Speed()
    for begun in (0.0, 100.0):
        speed.begin(["a", "b"], 2, begun)
        speed.finish(begun + 1.0, has_more=True)
        speed.finish(begun + 2.0, has_more=False)
    assert speed.per_second == pytest.approx(1.0)
    speed.begin(["c"], 1, 200.0)
    speed.begin(["d"], 1, 300.0)
    speed.finish(301.0, has_more=False)
    assert speed.per_second == pytest.approx(1.0), "the first lease ended without a group"
    for number in range(1000):
        speed.begin([str(number)], 5, 400.0)
    assert len(speed.begun) < 200, "what is never finished is forgotten"


def test_places_are_kept_for_others_only_for_a_while():
    places = Places(Limits(max_staleness=2, groups_per_batch=16))
    places.set_speed(b"a", 0.0)
    assert places.share(b"a") == 48, "alone"
    places.set_speed(b"b", 0.0)
    assert places.share(b"a") == places.share(b"b") == 24
    places.set_speed(b"a", 30.0)
    places.set_speed(b"b", 10.0)
    assert (places.share(b"a"), places.share(b"b")) == (33, 14)
    places.take_batch(10.0)
    assert not places.keep(33, 10.0), "nothing says that the other is about to take them"
    places.load(1, 11.0)
    places.load(1, 13.0)
    places.take_batch(20.0)
    assert places.keep(33, 20.0)
    assert places.keep(33, 22.9), "weights arrive 2 s apart"
    assert not places.keep(33, 23.1), "nobody took them for half as long again"
    assert places.keep(48, 23.2), "all are taken"
    assert places.keep(47, 23.3), "from here on it counts anew"
    places.load(2, 24.0)
    places.load(2, 90.0)
    places.take_batch(30.0)
    assert places.patience == 10.0, "no more than the last batch took"
    places.remove(b"b")
    assert places.share(b"a") == 48


def test_who_had_its_part_leaves_the_rest_while_the_learner_does_not_wait():
    places = Places(Limits(max_staleness=2, groups_per_batch=4))
    for actor in (b"a", b"b", b"c", b"d", b"e", b"f", b"g", b"h"):
        places.set_speed(actor, 0.0)
    places.take(b"a")
    assert places.had_its_part(b"a"), "a batch has half a place for each"
    assert places.next_turn(b"a") == 1
    assert not places.had_its_part(b"b")
    places.learner_waits = True
    assert not places.had_its_part(b"a"), "to leave a place would cost time"
    places.take(b"a")
    places.learner_waits = False
    for _ in range(4):
        places.take(b"b")
    places.take_batch(1.0)
    assert not places.had_its_part(b"a"), "what it took while the learner waited does not count"
    places.take(b"a")
    assert places.next_turn(b"a") == 3
    for actor in (b"b", b"c", b"d", b"e", b"f", b"g", b"h"):
        places.forget(actor)
    assert not places.had_its_part(b"a"), "alone"


def test_groups_that_become_too_stale_shrink_the_target_also_of_an_actor_that_is_alone():
    places = Places(Limits(max_staleness=2, groups_per_batch=16), waits=False)
    places.set_speed(b"a", 10.0)
    places.crowding.slope = 1.0
    places.take_batch(1.0, num_useless=16)
    assert places.in_flight == 24.0
    assert places.share(b"a") == 24
    places.take_batch(2.0)
    assert places.in_flight == 24.0, "nothing was lost"


@pytest.mark.parametrize("name", CASES)
def test_shares_are_as_good_as_the_best_fixed_number(name: str):
    case, best = CASES[name]
    outcome = play(case)
    assert outcome.per_second >= 0.9 * best
    # In proportion to its speed no actor does much less than the mean. Of 64 actors, some have few groups by chance.
    mean = sum(outcome.finished.values()) / sum(case.speeds)
    for actor, speed in enumerate(case.speeds):
        assert outcome.finished[actor] >= 0.3 * mean * speed


def test_an_actor_that_joins_gets_its_share_and_one_that_asks_for_nothing_leaves_no_gap():
    late = play(Case((EQUAL,) * 2, 16, 40, 15, late=1))
    assert late.finished[1] >= 0.8 * late.finished[0]
    deaf = play(Case((EQUAL,) * 2, 16, 40, 15, deaf=1))
    assert deaf.finished[1] == 0
    assert deaf.per_second >= 0.9 * EQUAL


def test_no_actor_starves_whose_weights_arrive_later_when_the_learner_is_the_limit():
    learner = Case((50.0,) * 4, 16, 25, 8, train_seconds=1.0, load_seconds=(0.01, 0.3, 0.5, 0.6))
    outcome = play(learner)
    assert min(outcome.finished[actor] for actor in range(4)) >= 0.5 * outcome.finished.total() / 4
    assert outcome.per_second >= 0.95 * 16, "and the learner does not wait"


def test_each_of_more_actors_than_places_has_its_turn():
    arrivals = tuple(0.02 * number for number in range(1, 25))
    outcome = play(Case((50.0,) * 24, 8, 40, 10, train_seconds=1.0, load_seconds=arrivals))
    assert min(outcome.finished[actor] for actor in range(24)) >= 0.3 * outcome.finished.total() / 24
    assert outcome.per_second >= 0.95 * 8


@pytest.mark.parametrize("on_stale", ["drop", "mask"])
def test_an_actor_that_slows_down_is_not_left_with_groups_that_only_become_too_stale(on_stale: str):
    outcome = play(Case((EQUAL,) * 4, 16, 40, 15, slows=0, on_stale=on_stale))
    assert outcome.target < 24, "of 48 places"
    assert outcome.useless < 0.1 * outcome.finished.total()
    assert outcome.per_second >= 0.8 * 3 * EQUAL


@pytest.mark.parametrize(("train_seconds", "speed"), [(0.05, EQUAL), (1.0, 50.0)])
def test_evaluations_go_round_and_cost_their_actors_no_places_afterwards(train_seconds: float, speed: float):
    """The first actor's weights always arrive first, and while it evaluates it loads none."""
    often = {"evaluate_every": 4, "evaluate_seconds": 1.5, "load_seconds": (0.01, 0.05, 0.05, 0.05)}
    outcome = play(Case((speed,) * 4, 16, 50, 10, train_seconds=train_seconds, **often))
    assert outcome.evaluated.total() >= 10
    assert max(outcome.evaluated[actor] for actor in range(4)) <= outcome.evaluated.total() / 4 + 1
    once = often | {"evaluate_every": 16}
    outcome = play(Case((speed,) * 4, 16, 40, 25, train_seconds=train_seconds, **once))
    assert outcome.evaluated.total() == 2
    assert min(outcome.finished[actor] for actor in range(4)) >= 0.6 * outcome.finished.total() / 4
