"""The limits of groups, by what earlier groups took."""

import asyncio

import pytest

from actors.rollouts.deadlines import FACTOR, LEAST_SECONDS, NUM_PACES_NEEDED, Completed, GroupDeadlines, OverdueError
from actors.rollouts.trajectories import Completion
from verifier.base import Score, Verdict


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now

    async def take(self, seconds: float, num_tokens: int = 10) -> Completed:
        completion = Completion()
        completion.loss_mask = [True] * num_tokens
        self.now += seconds
        return [(completion, Score(1.0, {}, Verdict.CORRECT))]


@pytest.fixture
def clock() -> Clock:
    return Clock()


async def measure(deadlines: GroupDeadlines, clock: Clock, *seconds: float) -> None:
    for each in seconds:
        await deadlines.complete(clock.take(each), 100)


def test_the_limit_is_the_longest_until_enough_groups_are_measured(clock: Clock):
    deadlines = GroupDeadlines(1800.0, clock)
    asyncio.run(measure(deadlines, clock, *[2.0] * (NUM_PACES_NEEDED - 1)))
    assert deadlines.seconds(1000) == 1800.0
    asyncio.run(measure(deadlines, clock, 3.0))
    assert deadlines.seconds(1000) == FACTOR * 0.3 * 1000, "the slowest pace of all, for as many tokens"
    assert deadlines.seconds(10) == LEAST_SECONDS
    assert deadlines.seconds(100_000) == 1800.0


def test_work_whose_time_is_over_is_cancelled_and_other_work_is_not(clock: Clock):
    async def check() -> None:
        deadlines = GroupDeadlines(1800.0, clock)
        await measure(deadlines, clock, *[1.0] * NUM_PACES_NEEDED)
        ended = asyncio.Event()

        async def never() -> Completed:
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()
            raise AssertionError

        short = asyncio.create_task(deadlines.complete(never(), 200))
        long = asyncio.create_task(deadlines.complete(never(), 1000))
        await asyncio.sleep(0)
        clock.now += FACTOR * 0.1 * 200
        deadlines.check()
        clock.now += 1.0
        assert not ended.is_set()
        deadlines.check()
        with pytest.raises(OverdueError, match="81 s, at most 80 s were expected"):
            await short
        assert ended.is_set() and not long.done()
        long.cancel()

    asyncio.run(check())


def test_pauses_do_not_count(clock: Clock):
    async def check() -> None:
        deadlines = GroupDeadlines(50.0, clock)
        work = asyncio.create_task(deadlines.complete(asyncio.sleep(3600, []), 10))
        await asyncio.sleep(0)
        clock.now += 40.0
        with deadlines.paused():
            clock.now += 1000.0
            deadlines.check()
        deadlines.check()
        await asyncio.sleep(0.01)
        assert not work.done()
        clock.now += 11.0
        deadlines.check()
        with pytest.raises(OverdueError):
            await work

    asyncio.run(check())


def test_a_cancelled_task_is_not_overdue(clock: Clock):
    async def check() -> None:
        deadlines = GroupDeadlines(50.0, clock)
        work = asyncio.create_task(deadlines.complete(asyncio.sleep(3600, []), 10))
        await asyncio.sleep(0)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        clock.now += 100.0
        deadlines.check()

    asyncio.run(check())
