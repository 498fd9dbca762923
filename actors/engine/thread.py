"""Runs vLLM's engine in a thread of the actor: one step after another while there are requests, other work in between.

vLLM's servers run the engine in a separate process to stream tokens. In the actor's own process nothing is sent per
token, a weight load is a function call, and vLLM is imported once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from buffer.process import start_thread

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.llm_engine import LLMEngine

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Work:
    """A call between two engine steps. `future` gets its result, or the output of the request that it adds."""

    do: Callable[[LLMEngine], None]
    future: Future[Any]


class EngineThread:
    """Creates an engine in a new thread and runs it until `close`.

    Args:
        make: creates the engine. It runs in the new thread, because CUDA's current device and OpenMP's number of
            threads are properties of a thread.
        cores: cores for the thread and the threads that it starts; empty: all.
    """

    def __init__(self, make: Callable[[], LLMEngine], cores: Sequence[int] = ()) -> None:
        self._make, self._cores = make, cores
        self._work: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._ended = ""
        """Why the thread accepts no more work; empty while it does."""
        self._lock = threading.Lock()
        """Guards `_ended` and the queue together, so that queued work is either done or refused."""
        self._sampling: dict[str, Future[RequestOutput]] = {}
        self._made = False
        self._thread = start_thread("engine", self._run)

    async def call(self, work: Callable[[LLMEngine], T]) -> T:
        """Return the result of `work`, which runs between two engine steps.

        Waits for: the step under way, and earlier work.

        Raises:
            RuntimeError: the engine has failed or is closed.
        """
        future: Future[T] = Future()
        self._put(_Work(lambda llm: future.set_result(work(llm)), future))
        return await asyncio.wrap_future(future)

    async def generate(self, request_id: str, prompt_ids: Sequence[int], parameters: SamplingParams) -> RequestOutput:
        """Generate the final output of a request. Cancelling the call aborts the request.

        Args:
            request_id: unique among the requests in flight.
            prompt_ids: token ids of the prompt.
            parameters: with the output kind FINAL_ONLY.

        Raises:
            RuntimeError: the engine has failed or is closed.
        """
        future: Future[RequestOutput] = Future()

        def begin(llm: LLMEngine) -> None:
            llm.add_request(request_id, {"prompt_token_ids": list(prompt_ids)}, parameters)
            self._sampling[request_id] = future

        self._put(_Work(begin, future))
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            self._work.put(_Work(lambda llm: self._abort(llm, request_id), Future()))
            raise

    def freeze(self, llm: LLMEngine) -> None:
        """Pause the requests in flight until `thaw`; none is aborted. Use within `call`."""
        core: Any = llm.engine_core
        core.engine_core.pause_scheduler("keep", clear_cache=False)
        # Finish the batches that are scheduled ahead of the device. Their tokens would otherwise be attributed to the
        # next version.
        while core.engine_core.batch_queue:
            self._step(llm)

    @staticmethod
    def thaw(llm: LLMEngine) -> None:
        """Resume the paused requests."""
        core: Any = llm.engine_core
        core.engine_core.resume_scheduler()

    def close(self, seconds: float) -> None:
        """End the engine. Waits for: the step under way. Gives up after: `seconds`; at once during creation."""
        self._work.put(None)
        self._thread.join(seconds if self._made else 0)
        if self._made and self._thread.is_alive():
            logger.warning("the engine did not end within %g s and is left behind", seconds)

    def _put(self, work: _Work) -> None:
        with self._lock:
            if self._ended:
                raise RuntimeError(self._ended)
            self._work.put(work)

    # --- the thread ---

    def _run(self) -> None:
        why, llm = "the engine is closed", None
        try:
            if self._cores:
                os.sched_setaffinity(0, self._cores)
            llm = self._make()
            self._made = True
            while self._do_all(llm):
                self._step(llm)
        except BaseException as error:
            why = f"the engine failed: {error!r}"
            raise
        finally:
            self._refuse_all(why)
            if llm is not None:
                llm.engine_core.shutdown()

    def _do_all(self, llm: LLMEngine) -> bool:
        """Do the queued work; wait for work while there are no requests. Returns False when `close` was called."""
        while True:
            try:
                work = self._work.get(block=not llm.has_unfinished_requests())
            except queue.Empty:
                return True
            if work is None:
                return False
            if work.future.set_running_or_notify_cancel():
                try:
                    work.do(llm)
                except Exception as error:
                    work.future.set_exception(error)

    def _step(self, llm: LLMEngine) -> None:
        for output in llm.step():
            if output.finished:
                self._sampling.pop(output.request_id).set_result(output)

    def _abort(self, llm: LLMEngine, request_id: str) -> None:
        if self._sampling.pop(request_id, None) is not None:
            llm.abort_request([request_id])

    def _refuse_all(self, why: str) -> None:
        with self._lock:
            self._ended = why
            while not self._work.empty():
                work = self._work.get()
                if work is not None and work.future.set_running_or_notify_cancel():
                    work.future.set_exception(RuntimeError(why))
        for future in self._sampling.values():
            future.set_exception(RuntimeError(why))
