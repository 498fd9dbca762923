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
    "1": (Case((EQUAL,), 16, 60, 20), 9.9),
    "2": (Case((EQUAL,) * 2, 16, 60, 20), 19.8),
    "4": (Case((EQUAL,) * 4, 16, 60, 20), 39.8),
    "8": (Case((EQUAL,) * 8, 16, 60, 20), 77.8),
    "32": (Case((EQUAL,) * 32, 128, 32, 16), 317.1),
    "64": (Case((EQUAL,) * 64, 512, 14, 11), 622.9),
    "2 mixed": (Case(mixed(2), 16, 60, 20), 40.1),
    "8 mixed": (Case(mixed(8), 16, 90, 30), 116.0),
    "32 mixed": (Case(mixed(32), 128, 34, 22), 589.9),
    "4 batching": (Case((EQUAL,) * 4, 16, 60, 20, batching=True), 79.4),
    "8 batching": (Case((EQUAL,) * 8, 16, 60, 20, batching=True), 80.7),
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
    assert places.keep(33, 11.0)
    assert places.keep(33, 20.9)
    assert not places.keep(33, 21.1), "nobody took them for as long as the last batch took"
    assert places.keep(48, 21.2), "all are taken"
    assert places.keep(47, 21.3), "from here on it counts anew"
    places.remove(b"b")
    assert places.share(b"a") == 48


@pytest.mark.parametrize("name", CASES)
def test_shares_are_as_good_as_the_best_fixed_number(name: str):
    case, best = CASES[name]
    outcome = play(case)
    assert outcome.per_second >= 0.9 * best
    # In proportion to its speed no actor does much less than the mean. Among engines that batch, who has few groups
    # finishes few; the equal part bounds that.
    least = 0.25 if case.batching else 0.5
    mean = sum(outcome.finished.values()) / sum(case.speeds)
    for actor, speed in enumerate(case.speeds):
        assert outcome.finished[actor] >= least * mean * speed


def test_an_actor_that_joins_gets_its_share_and_one_that_asks_for_nothing_leaves_no_gap():
    late = play(Case((EQUAL,) * 2, 16, 60, 20, late=1))
    assert late.finished[1] >= 0.8 * late.finished[0]
    deaf = play(Case((EQUAL,) * 2, 16, 60, 20, deaf=1))
    assert deaf.finished[1] == 0
    assert deaf.per_second >= 0.9 * EQUAL
