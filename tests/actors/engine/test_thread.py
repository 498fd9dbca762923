"""The engine thread with a stand-in engine that takes three steps per request."""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from actors.engine.thread import EngineThread


@dataclass
class Output:
    request_id: str
    finished: bool
    made_by: int
    """Identity of the thread."""


@dataclass
class Counting:
    """A stand-in for vLLM's engine. A request needs three steps; `ahead`: a batch is scheduled while another runs."""

    steps_of: dict[str, int] = field(default_factory=dict)
    ahead: bool = False
    paused: bool = False
    breaks: bool = False
    gate: threading.Event = field(default_factory=threading.Event)
    """Steps wait until this event is set."""
    shut: bool = False

    def __post_init__(self) -> None:
        self.gate.set()
        self.engine_core = self
        self.batch_queue: deque[str] | None = deque() if self.ahead else None

    def has_unfinished_requests(self) -> bool:
        return bool(self.steps_of)

    def add_request(self, request_id: str, prompt: dict[str, Any], parameters: Any) -> None:
        if not prompt["prompt_token_ids"]:
            raise ValueError("an empty prompt")
        self.steps_of[request_id] = 3

    def abort_request(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            del self.steps_of[request_id]

    def step(self) -> list[Output]:
        assert self.gate.wait(10)
        if self.breaks:
            raise OSError("a kernel failed")
        if self.batch_queue is not None and not self.paused:
            self.batch_queue.append("batch")
            if len(self.batch_queue) == 1:
                return []
        if self.batch_queue:
            self.batch_queue.popleft()
        self.steps_of = {name: left - 1 for name, left in self.steps_of.items()}
        done = [name for name, left in self.steps_of.items() if not left]
        outputs = [Output(name, not left, threading.get_ident()) for name, left in self.steps_of.items()]
        for name in done:
            del self.steps_of[name]
        return outputs

    def pause_scheduler(self, mode: str, clear_cache: bool) -> None:
        assert (mode, clear_cache) == ("keep", False)
        self.paused = True

    def resume_scheduler(self) -> None:
        self.paused = False

    def shutdown(self) -> None:
        self.shut = True


@contextmanager
def running(llm: Counting) -> Iterator[EngineThread]:
    thread = EngineThread(lambda: llm)  # type: ignore[arg-type, return-value]
    try:
        yield thread
    finally:
        llm.gate.set()
        thread.close(10)
        assert llm.shut


def run(llm: Counting, do: Callable[[EngineThread], Awaitable[None]]) -> None:
    async def body() -> None:
        with running(llm) as thread:
            async with asyncio.timeout(10):
                await do(thread)

    asyncio.run(body())


async def sampled(thread: EngineThread, name: str, prompt: tuple[int, ...] = (1, 2)) -> Any:
    return await thread.generate(name, prompt, None)  # type: ignore[arg-type]


async def held(thread: EngineThread, llm: Counting, name: str) -> "asyncio.Future[Any]":
    """A request whose first step waits for the gate."""
    llm.gate.clear()
    request = asyncio.ensure_future(sampled(thread, name))
    await asyncio.sleep(0.05)
    return request


def test_requests_come_back_whole_and_all_is_done_in_one_thread() -> None:
    async def do(thread: EngineThread) -> None:
        outputs = await asyncio.gather(*(sampled(thread, f"r{index}") for index in range(5)))
        assert [output.request_id for output in outputs] == [f"r{index}" for index in range(5)]
        assert all(output.finished for output in outputs)
        assert {output.made_by for output in outputs} == {await thread.call(lambda _: threading.get_ident())}
        assert threading.get_ident() not in {output.made_by for output in outputs}

    run(Counting(), do)


def test_work_is_done_between_two_steps_while_requests_are_in_flight() -> None:
    llm = Counting()

    async def do(thread: EngineThread) -> None:
        running = await held(thread, llm, "r")
        left = asyncio.ensure_future(thread.call(lambda llm: dict(llm.steps_of)))  # type: ignore[attr-defined]
        await asyncio.sleep(0.05)
        assert not left.done()
        llm.gate.set()
        assert (await left)["r"] in (2, 3)
        assert (await running).finished

    run(llm, do)


def test_an_error_of_some_work_is_its_own() -> None:
    async def do(thread: EngineThread) -> None:
        good = asyncio.ensure_future(sampled(thread, "good"))
        with pytest.raises(ValueError, match="an empty prompt"):
            await sampled(thread, "bad", ())
        with pytest.raises(ZeroDivisionError):
            await thread.call(lambda _: 1 // 0)
        assert (await good).finished

    run(Counting(), do)


def test_when_the_engine_fails_everybody_is_told_and_the_process_ends(ended: list[int]) -> None:
    llm = Counting()

    async def do(thread: EngineThread) -> None:
        waiting = [await held(thread, llm, "r")]
        waiting.append(asyncio.ensure_future(thread.call(lambda _: None)))
        await asyncio.sleep(0.05)
        llm.breaks = True
        llm.gate.set()
        for outcome in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(outcome, RuntimeError)
            assert "the engine failed: OSError('a kernel failed')" in str(outcome)
        with pytest.raises(RuntimeError, match="a kernel failed"):
            await sampled(thread, "late")

    run(llm, do)
    assert ended == [1]
    ended.clear()


def test_an_engine_that_cannot_be_made_says_so(ended: list[int]) -> None:
    def make() -> Any:
        raise MemoryError("no room for the cache")

    async def body() -> None:
        thread = EngineThread(make)
        with pytest.raises(RuntimeError, match="no room for the cache"):
            await thread.call(lambda _: None)
        thread.close(10)
        thread._thread.join(10)

    asyncio.run(body())
    assert ended == [1]
    ended.clear()


def test_an_engine_in_the_making_keeps_nobody() -> None:
    go_on = threading.Event()

    def make() -> Any:
        assert go_on.wait(10)
        return Counting()

    thread = EngineThread(make)
    before = time.monotonic()
    thread.close(10)
    assert time.monotonic() - before < 5
    go_on.set()


def test_a_cancelled_request_leaves_the_engine() -> None:
    llm = Counting()

    async def do(thread: EngineThread) -> None:
        request = await held(thread, llm, "unwanted")
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        llm.gate.set()
        assert await thread.call(lambda llm: dict(llm.steps_of)) == {}  # type: ignore[attr-defined]
        # The request id can be used again.
        assert (await sampled(thread, "unwanted")).finished

    run(llm, do)


def test_batches_scheduled_ahead_end_before_anything_is_frozen() -> None:
    llm = Counting(ahead=True)

    async def do(thread: EngineThread) -> None:
        request = await held(thread, llm, "r")

        def frozen(llm: Any) -> int:
            thread.freeze(llm)
            return len(llm.batch_queue)

        under_way = asyncio.ensure_future(thread.call(frozen))
        await asyncio.sleep(0.05)
        llm.gate.set()
        assert await under_way == 0
        assert llm.paused
        await thread.call(thread.thaw)
        assert (await request).finished

    run(llm, do)


def test_a_closed_engine_takes_nothing() -> None:
    async def body() -> None:
        llm = Counting()
        with running(llm) as thread:
            pass
        with pytest.raises(RuntimeError, match="the engine is closed"):
            await sampled(thread, "late")

    asyncio.run(body())
