"""Virtual time: one heap of events, processes with event loops of their own, and one source of randomness.

A process is an asyncio event loop that runs on the world's clock, so the real actor runs in it unchanged. A frozen
process does nothing until it thaws; what was due meanwhile (timers and received messages) then happens in any order, as
with threads that wake up together. A killed process does nothing ever again.
"""

import asyncio
import contextvars
import heapq
import random
from collections import deque
from collections.abc import Callable, Coroutine
from itertools import count
from typing import Any

TRACED_EVENTS = 80
"""Lines of the trace that are kept for the report of a failure."""
THAW_SECONDS = 0.02
"""The time within which a thawed process does what was due while it was frozen."""


class InvariantError(AssertionError):
    """The protocol broke a promise."""


class World:
    """The clock, the events to come, the randomness and the trace of one simulation."""

    def __init__(self, seed: int) -> None:
        self.now = 0.0
        self.rng = random.Random(seed)
        self.num_events = 0
        self.trace: deque[str] = deque(maxlen=TRACED_EVENTS)
        self.echo = False
        self.errors: list[BaseException] = []
        """Raised inside a process's callbacks, which asyncio catches."""
        self._heap: list[tuple[float, int, Process | None, Callable[[], object]]] = []
        self._order = count()

    def log(self, who: str, what: str) -> None:
        """Add a line to the trace."""
        line = f"{self.now:9.3f} {who:<14} {what}"
        self.trace.append(line)
        if self.echo:
            print(line, flush=True)

    def after(self, seconds: float, action: Callable[[], object], process: "Process | None" = None) -> None:
        """Do `action` in `seconds`; not if `process` is killed before, and later if it is frozen then."""
        heapq.heappush(self._heap, (self.now + seconds, next(self._order), process, action))

    def step(self) -> None:
        """Let the next event happen."""
        at, _, process, action = heapq.heappop(self._heap)
        self.now = max(self.now, at)
        self.num_events += 1
        if process is None:
            action()
        elif process.alive:
            if process.frozen_until > self.now:
                late = process.frozen_until - self.now + self.rng.uniform(0.0, THAW_SECONDS)
                return self.after(late, action, process)
            process.run(action)
        if self.errors:
            raise self.errors[0]

    def uniform(self, low: float, high: float) -> float:
        return self.rng.uniform(low, high)

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability


class _NumberedTask(asyncio.Task[Any]):
    """A task whose place in sets of tasks is the same in every run."""

    def __init__(self, number: int, *arguments: Any, **options: Any) -> None:
        self._number = number
        super().__init__(*arguments, **options)

    def __hash__(self) -> int:
        return self._number


class Process(asyncio.AbstractEventLoop):
    """One process: an event loop in virtual time that can be frozen and killed.

    Args:
        world: its clock.
        name: its name in the trace; `identity` is unique per process.
    """

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.identity = f"{name}-{world.rng.getrandbits(32):08x}"
        self.alive, self.frozen_until = True, 0.0
        self.on_end: list[Callable[[BaseException | None], object]] = []
        """Called with the error of the main task when it is over. Not called when the process is killed."""
        self._ready: deque[asyncio.Handle] = deque()
        self._due = False
        self._tasks: list[_NumberedTask] = []
        self._numbers = count()
        self.main: asyncio.Task[Any] | None = None

    def log(self, what: str) -> None:
        self.world.log(self.identity, what)

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Begin the main task."""
        self.main = self.create_task(work)
        self.main.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        error: BaseException | None = asyncio.CancelledError() if task.cancelled() else task.exception()
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        self.alive = False
        for call in self.on_end:
            call(error)

    def freeze(self, seconds: float) -> None:
        self.log(f"is frozen for {seconds:.2f} s")
        self.frozen_until = self.world.now + seconds

    def kill(self) -> None:
        """End at once, as by kill -9."""
        self.log("is killed")
        self.alive = False

    def terminate(self) -> None:
        """Cancel the main task, as SIGTERM does."""
        self.log("gets SIGTERM")
        assert self.main is not None
        self.world.after(0.0, self.main.cancel, self)

    def run(self, action: Callable[[], object]) -> None:
        """Do `action` inside this loop."""
        asyncio._set_running_loop(self)
        try:
            action()
        finally:
            asyncio._set_running_loop(None)

    def forget(self) -> None:
        """Close the coroutines of a process that is over, so that none is closed at a random moment later."""
        self._ready.clear()
        for task in self._tasks:
            task._log_destroy_pending = False
            if task.done():
                if not task.cancelled():
                    task.exception()  # Retrieved, so that nobody logs it.
                continue
            coroutine: Any = task.get_coro()
            for _ in range(20):
                try:
                    coroutine.close()
                except RuntimeError:  # It waits again while it is closed.
                    continue
                except BaseException:
                    pass
                break
        self._tasks.clear()

    # The event loop, as far as it is needed.

    def time(self) -> float:
        return self.world.now

    def _drain(self) -> None:
        self._due = False
        for _ in range(len(self._ready)):
            handle = self._ready.popleft()
            if not handle.cancelled() and self.alive:
                handle._run()

    def call_soon(
        self, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        if not self._due:
            self._due = True
            self.world.after(0.0, self._drain, self)
        return handle

    call_soon_threadsafe = call_soon

    def call_later(
        self, delay: float, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(self.time() + delay, callback, args, self, context)
        self.world.after(max(0.0, delay), lambda: None if handle.cancelled() else handle._run(), self)
        return handle

    def call_at(
        self, when: float, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_later(when - self.time(), callback, *args, context=context)

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        pass

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, **options: Any) -> asyncio.Task[Any]:
        task = _NumberedTask(next(self._numbers), coro, loop=self, **options)
        self._tasks.append(task)
        return task

    async def _now(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> Any:
        return self.create_task(self._now(func, *args))

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self.world.errors.append(context.get("exception") or InvariantError(context["message"]))

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False
