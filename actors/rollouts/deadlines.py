"""How long a group may take, by what the groups before it took.

Owned by `actors/actor.py`, on its event loop. A completion that never ends, or an environment or scoring that hangs,
costs its group, whose work is cancelled, and nothing else.

A group's work is bounded by the tokens that its longest completion may have. Its limit is `FACTOR` times what so many
tokens take at the slowest *pace* of the last groups: seconds from start to scores, per token of the longest completion.
So a long answer is never taken for a stuck one because the first answers were short. Time in which generation was
paused for new weights does not count.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from actors.rollouts.trajectories import Completion
from verifier.base import Score

Completed = list[tuple[Completion, Score]]

FACTOR = 4.0
LEAST_SECONDS = 60.0
"""No limit is shorter."""
NUM_PACES, NUM_PACES_NEEDED = 64, 8
"""Number of groups whose paces are kept, and are needed before limits shorter than the longest are set."""


class OverdueError(Exception):
    """The work on a prompt's completions took longer than its limit and was cancelled. The text has both times."""


@dataclass(slots=True, eq=False)
class _Work:
    started: float
    """Time of the start, later by all pauses since."""
    most_tokens: int
    timeout: asyncio.Timeout


class GroupDeadlines:
    """The limits of all work under way. Call `check` every second or so.

    Args:
        most_seconds: the longest limit, which also holds while too few groups have been measured.
        clock: seconds of a monotonic clock.
    """

    def __init__(self, most_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._most_seconds, self._clock = most_seconds, clock
        self._paces: deque[float] = deque(maxlen=NUM_PACES)
        self._works: dict[_Work, None] = {}
        """In the order of their starts."""
        self._paused_since: float | None = None

    async def complete(self, work: Awaitable[Completed], most_tokens: int) -> Completed:
        """Wait for the completions of one prompt, and cancel the work on them when its time is over.

        Args:
            work: samples and scores them.
            most_tokens: largest number of tokens that one of them may have.

        Raises:
            OverdueError: the time was over.
        """
        timeout = asyncio.timeout(None)
        entry = _Work(self._clock(), most_tokens, timeout)
        self._works[entry] = None
        try:
            async with timeout:
                completed = await work
        except TimeoutError as error:
            if not timeout.expired():
                raise
            seconds = self._clock() - entry.started
            raise OverdueError(f"{seconds:.0f} s, at most {self.seconds(most_tokens):.0f} s were expected") from error
        finally:
            del self._works[entry]
        longest = max((completion.num_sampled for completion, _ in completed), default=0)
        self._paces.append((self._clock() - entry.started) / max(longest, 1))
        return completed

    def seconds(self, most_tokens: int) -> float:
        """Return the present limit of a group whose completions may have `most_tokens` tokens."""
        if len(self._paces) < NUM_PACES_NEEDED:
            return self._most_seconds
        return min(self._most_seconds, max(LEAST_SECONDS, FACTOR * max(self._paces) * most_tokens))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time in which the context is open, because generation is paused."""
        since = self._paused_since = self._clock()
        try:
            yield
        finally:
            now, self._paused_since = self._clock(), None
            for work in self._works:
                work.started += now - max(since, work.started)

    @property
    def is_paused(self) -> bool:
        """Whether generation is paused."""
        return self._paused_since is not None

    def check(self) -> None:
        """Cancel the work on all groups whose time is over."""
        now, loop = self._clock(), asyncio.get_running_loop()
        for work in self._works:
            is_over = now - work.started > self.seconds(work.most_tokens)
            if is_over and not self.is_paused and work.timeout.when() is None:
                work.timeout.reschedule(loop.time())
