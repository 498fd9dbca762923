"""Hung processes are found by a clock, the buffer's answers and the list of halted processes."""

from collections.abc import Iterator
from dataclasses import replace

from buffer.transport.messages import Peer, Status
from launch.processes.watch import Watch
from tests.launch.statuses import LEARNER, peer, status

RUNNING = {"buffer": 1000.0, "learner": 1000.0, "actor-0": 1000.0}


def turns(
    watch: Watch, seconds: int, answer: Status | None, *, stopped: frozenset[str] = frozenset(), start: float = 100.0
) -> Iterator[dict[str, str]]:
    """Make one turn per half second, with the same answer each time."""
    for turn in range(seconds * 2 + 1):
        yield watch.turn(start + turn / 2, answer, stopped, RUNNING)


def first(found: Iterator[dict[str, str]]) -> tuple[int, dict[str, str]] | None:
    return next(((number, hung) for number, hung in enumerate(found) if hung), None)


def silent_actor(seconds: float) -> Status:
    return status(LEARNER, peer("actor", "actor-0", silent_seconds=seconds))


def test_nobody_hangs_while_everybody_speaks():
    assert first(turns(Watch(30.0), 100, silent_actor(1.0))) is None


def test_whoever_is_halted_long_enough_hangs():
    watch = Watch(10.0)
    assert first(turns(watch, 100, silent_actor(1.0), stopped=frozenset({"learner"}))) == (
        21,
        {"learner": "was halted for 10 s"},
    )


def test_whoever_goes_on_in_time_is_left_alone():
    watch, halted = Watch(10.0), frozenset({"actor-0"})
    for start in (100.0, 120.0, 140.0):
        assert first(turns(watch, 9, silent_actor(1.0), stopped=halted, start=start)) is None
        assert first(turns(watch, 9, silent_actor(1.0), start=start + 10)) is None


def test_an_actor_that_is_silent_hangs_once_that_is_confirmed():
    number, hung = first(turns(Watch(10.0), 100, silent_actor(11.0))) or (0, {})
    assert hung == {"actor-0": "was silent for 10 s"}
    assert number == 11


def test_silence_of_a_moment_after_the_buffer_itself_was_frozen_means_nothing():
    watch = Watch(10.0)
    assert first(turns(watch, 4, silent_actor(100.0))) is None
    assert first(turns(watch, 100, silent_actor(0.5), start=105.0)) is None


def test_the_silence_of_a_predecessor_means_nothing():
    watch, young = Watch(10.0), RUNNING | {"actor-0": 25.0}
    assert not any(watch.turn(100 + turn / 2, silent_actor(40.0), set(), young) for turn in range(60))


def test_a_learner_may_be_silent_as_long_as_a_step_takes():
    silent = status(peer("learner", "learner-0", silent_seconds=900.0))
    assert first(turns(Watch(10.0), 100, silent)) is None


def test_a_buffer_that_stops_answering_hangs():
    watch = Watch(10.0)
    assert first(turns(watch, 1, silent_actor(0.0))) is None
    assert first(turns(watch, 100, None, start=101.5)) == (20, {"buffer": "did not answer for 10 s"})
    assert watch.unanswered_seconds > 10.0


def test_a_buffer_that_was_restarted_has_time_to_open_its_ledger():
    watch = Watch(10.0)
    assert first(turns(watch, 1, silent_actor(0.0))) is None
    assert not any(watch.turn(101.5 + turn, None, set(), {"buffer": turn + 0.5}) for turn in range(100))


def test_a_buffer_that_has_never_answered_may_take_its_time():
    watch = Watch(10.0)
    assert first(turns(watch, 100, None)) is None
    assert watch.unanswered_seconds == 0.0


def test_time_in_which_the_launcher_was_frozen_counts_for_nobody():
    watch = Watch(10.0)
    watch.turn(100.0, silent_actor(0.0), {"learner"}, RUNNING)
    watch.turn(100.5, None, {"learner"}, RUNNING)
    assert watch.turn(5000.0, None, {"learner"}, RUNNING) == {}


def test_zero_waits_for_ever():
    assert first(turns(Watch(0.0), 1000, silent_actor(500.0), stopped=frozenset({"learner"}))) is None


def rank(number: int, limit: float, *, pieces: int = 7, silent_seconds: float = 0.5) -> Peer:
    working = peer("learner", f"learner-{number}", silent_seconds=silent_seconds)
    return replace(working, activity="trains on the batch for policy 41", num_pieces=pieces, limit_seconds=limit)


def test_a_learner_whose_ranks_are_all_beyond_their_limits_hangs():
    standing = status(rank(0, 100.0), rank(1, 200.0))
    number, hung = first(turns(Watch(10.0), 1000, standing)) or (0, {})
    # The first turn only sees how far the ranks are.
    assert number == 2 * 200 + 2
    assert hung == {
        "learner": "stands still: learner-0 trains on the batch for policy 41 and finished no piece of it for 200 s;"
        " learner-1 trains on the batch for policy 41 and finished no piece of it for 200 s (the limit is 200 s)"
    }


def test_a_rank_that_waits_or_makes_progress_excuses_the_others():
    assert first(turns(Watch(10.0), 1000, status(rank(0, 100.0), rank(1, 0.0)))) is None
    watch = Watch(10.0)
    for piece in range(20):
        ranks = status(rank(0, 100.0), rank(1, 100.0, pieces=piece))
        assert first(turns(watch, 90, ranks, start=100.0 + 90 * piece)) is None


def test_a_rank_that_is_silent_says_nothing_about_the_others():
    gone = rank(1, 1e6, silent_seconds=60.0)
    assert first(turns(Watch(10.0), 1000, status(rank(0, 100.0), gone))) is not None
    assert first(turns(Watch(10.0), 1000, status(gone))) is None


def test_a_learners_limit_is_not_below_that_of_others():
    number, _ = first(turns(Watch(300.0), 1000, status(rank(0, 100.0)))) or (0, {})
    assert number == 2 * 300 + 2


def test_a_learner_that_was_restarted_has_its_time_again():
    watch, standing = Watch(10.0), status(rank(0, 100.0))
    assert first(turns(watch, 1000, standing)) is not None
    # The new process is at the same number of pieces.
    found = [
        watch.turn(1000.0 + turn / 2, standing, set(), RUNNING | {"learner": turn / 2}) != {} for turn in range(300)
    ]
    assert found.index(True) == 2 * 100 + 1


def test_while_the_buffer_does_not_answer_nothing_is_known_of_the_learner():
    watch = Watch(10.0)
    assert first(turns(watch, 50, status(rank(0, 100.0)))) is None
    assert not any("learner" in hung for hung in turns(watch, 400, None, start=150.5))
    assert first(turns(watch, 90, status(rank(0, 100.0, pieces=9)), start=551.0)) is None
