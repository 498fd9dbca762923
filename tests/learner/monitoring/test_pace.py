"""How long a piece of work may take follows what was measured."""

import pytest

from learner.monitoring.pace import LEAST_SECONDS, TIMES_LONGEST, UNMEASURED_SECONDS, Pace


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pace(clock: Clock) -> Pace:
    return Pace(clock)


def work(pace: Pace, clock: Clock, name: str, *pieces: float) -> None:
    """Do work of some pieces; the last one goes on."""
    pace.begin(name)
    for number, seconds in enumerate(pieces):
        if number:
            pace.end_piece()
        clock.now += seconds


def test_a_first_work_of_its_kind_may_take_very_long(pace: Pace, clock: Clock):
    work(pace, clock, "trains on the batch for policy 0", 1.0, 2.0)
    assert pace.limit_seconds == UNMEASURED_SECONDS
    work(pace, clock, "publishes policy 1", 1.0)
    assert pace.limit_seconds == UNMEASURED_SECONDS
    pace.begin("trains on the batch for policy 1")
    assert pace.limit_seconds == LEAST_SECONDS


def test_the_limit_grows_with_the_longest_piece_and_not_with_the_whole_work(pace: Pace, clock: Clock):
    work(pace, clock, "trains on the batch for policy 0", *[100.0] * 50)
    work(pace, clock, "trains on the batch for policy 1", 5.0)
    assert pace.limit_seconds == TIMES_LONGEST * 100
    work(pace, clock, "trains on the batch for policy 2", 300.0, 1.0)
    assert pace.limit_seconds == TIMES_LONGEST * 300
    work(pace, clock, "trains on the batch for policy 3", 1.0)
    assert pace.limit_seconds == TIMES_LONGEST * 300


def test_a_wait_has_no_limit_and_is_not_measured(pace: Pace, clock: Clock):
    work(pace, clock, "writes the checkpoint of policy 1", 70.0)
    pace.wait(True)
    assert pace.limit_seconds == 0
    clock.now += 5000
    before = pace.num_pieces
    pace.wait(True)
    assert pace.num_pieces == before
    pace.wait(False)
    assert pace.num_pieces == before + 1, "or the time of the wait would count"
    clock.now += 80
    pace.begin("")
    assert pace.limit_seconds == 0
    clock.now += 5000
    pace.begin("writes the checkpoint of policy 2")
    assert pace.limit_seconds == TIMES_LONGEST * 80


def test_every_piece_is_counted(pace: Pace, clock: Clock):
    seen = [pace.num_pieces]
    for step in (lambda: pace.begin("loads the model"), pace.end_piece, lambda: pace.begin("")):
        step()
        seen.append(pace.num_pieces)
    assert seen == sorted(set(seen))
