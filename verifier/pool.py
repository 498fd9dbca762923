"""Scores groups of completions in worker processes, killed and replaced at a deadline and limited in memory.

The actor calls `await pool.score_group(completions)`; one job scores a whole group. When the job exceeds its deadline
or its worker dies, each completion is scored alone, so that exactly the ones to blame get `timeout` or `error` and the
others their real score. Both are counted and logged, never silently a zero. Workers come from a fork server and import
neither torch nor vllm. Python imports a plain script again in every worker, so a script that starts a pool guards its
heavy imports; `python -m PACKAGE` needs no guard.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import resource
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

from pebble import ProcessExpired, ProcessPool

from verifier.base import Completion, RewardSpec, Score, Verdict
from verifier.config import check_on_timeout
from verifier.rewards import Scorer, build_scorer

log = logging.getLogger(__name__)

_PRELOADED = ["verifier.rewards", "verifier.pool", "sympy", "latex2sympy2_extended"]
_START_SECONDS = 60.0
_WATCH_SECONDS = 1.0
_NUM_TRIES = 3


@dataclass(frozen=True, slots=True)
class _Failure:
    """A completion whose reward raised inside the worker."""

    reason: str


class ScoringPool:
    """A pool of scoring processes.

    Args:
        spec: the task's rewards, exactly one of them a grader.
        num_workers: scoring processes.
        deadline_seconds: for a group, and for each completion that is scored alone after its group failed.
        memory_bytes: address space of one worker; more is a MemoryError, and the verdict `error`.
        on_timeout: whose reward an unscored completion gets, `wrong` or `no_answer`.

    Waits for: the first worker to be ready; gives up after 60 seconds.

    Raises:
        ValueError: for an unknown reward or `on_timeout`.
        RuntimeError: when no worker starts.
    """

    def __init__(
        self,
        spec: Sequence[RewardSpec],
        *,
        num_workers: int,
        deadline_seconds: float,
        memory_bytes: int,
        on_timeout: str = "wrong",
    ) -> None:
        self.num_timeouts = 0
        self.num_errors = 0
        self.num_workers = num_workers
        self.deadline_seconds = deadline_seconds
        self.memory_bytes = memory_bytes
        self._spec = list(spec)
        self._scorer = build_scorer(self._spec)
        self._treated_as = check_on_timeout(on_timeout)
        self._lock = threading.Lock()
        self._closed = False
        self._awaited: set[Future[Any]] = set()
        self._pool = self._start()
        self._check_start()

    async def score_group(self, completions: Sequence[Completion]) -> list[Score]:
        """One score per completion, in order.

        Waits for: a free worker, then at most the deadline for the group and again for each completion.
        Unblocked by: the worker's answer, its death, or its deadline.

        Raises:
            RuntimeError: when the pool is closed.
        """
        results = await self._run(list(completions))
        if isinstance(results, list):
            return [self._finish(result, completion) for result, completion in zip(results, completions, strict=True)]
        scores = []
        for completion in completions:
            alone = await self._run([completion])
            scores.append(self._finish(alone[0] if isinstance(alone, list) else alone, completion))
        return scores

    def close(self) -> None:
        """Ends the workers; scores still awaited are cancelled. May be called twice."""
        with self._lock:
            self._closed = True
            pool, awaited = self._pool, list(self._awaited)
        for future in awaited:
            future.cancel()
        pool.stop()
        pool.join()

    async def _run(self, completions: list[Completion]) -> list[Score | _Failure] | Verdict | _Failure:
        """The results of one job; TIMEOUT when it exceeded its deadline, a failure when its worker died."""
        reason = ""
        for _ in range(_NUM_TRIES):
            pool = self._usable_pool()
            try:
                return await self._schedule(pool, completions)
            except TimeoutError:
                return Verdict.TIMEOUT
            # A worker that dies is this pool's business: the group is scored again one by one.
            except ProcessExpired as error:
                return _Failure(f"the scoring process died: {error}")
            # Who is to blame for a broken pool is not known, so everyone tries again.
            except (BrokenProcessPool, RuntimeError) as error:
                reason = f"the scoring pool broke {_NUM_TRIES} times: {error}"
        return _Failure(reason)

    async def _schedule(self, pool: ProcessPool, completions: list[Completion]) -> list[Score | _Failure]:
        """One job, watched, since a pool that breaks may forget the jobs it holds."""
        future = pool.schedule(_score_in_worker, args=(completions,), timeout=self.deadline_seconds)
        self._awaited.add(future)
        future.add_done_callback(self._awaited.discard)
        waiting = asyncio.wrap_future(future)
        try:
            while not waiting.done():
                await asyncio.wait((waiting,), timeout=_WATCH_SECONDS)
                if not waiting.done() and not pool.active:
                    raise BrokenProcessPool("the pool stopped with a job unfinished")
            results: list[Score | _Failure] = waiting.result()
            return results
        finally:
            waiting.cancel()

    def _finish(self, result: Score | _Failure | Verdict, completion: Completion) -> Score:
        if isinstance(result, Score):
            return result
        if isinstance(result, Verdict):
            self.num_timeouts += 1
            log.warning("scoring exceeded %.1f s (gold %.80r)", self.deadline_seconds, completion.gold)
            return self._scorer.unscored(Verdict.TIMEOUT, self._treated_as)
        self.num_errors += 1
        log.warning("scoring failed (gold %.80r): %s", completion.gold, result.reason)
        return self._scorer.unscored(Verdict.ERROR, self._treated_as)

    def _usable_pool(self) -> ProcessPool:
        """The running pool; a new one where the old broke because a worker died between two jobs."""
        with self._lock:
            if self._closed:
                raise RuntimeError("the scoring pool is closed")
            if not self._pool.active:
                log.warning("a scoring process died between two jobs; the pool starts again")
                self._pool.stop()
                self._pool.join()
                self._pool = self._start()
            return self._pool

    def _check_start(self) -> None:
        """Fails now, not with every completion, when workers cannot start at all."""
        try:
            self._pool.schedule(_score_in_worker, args=([],)).result(_START_SECONDS)
        except Exception as error:
            self.close()
            raise RuntimeError(
                f"no scoring process started within {_START_SECONDS:.0f} s ({type(error).__name__}: {error}); is"
                f" verifier.memory_bytes={self.memory_bytes} enough?"
            ) from error

    def _start(self) -> ProcessPool:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        return ProcessPool(
            max_workers=self.num_workers,
            initializer=_prepare_worker,
            initargs=(self._spec, self.memory_bytes),
            context=context,
        )


_worker_scorer: Scorer | None = None


def _prepare_worker(spec: Sequence[RewardSpec], memory_bytes: int) -> None:
    """Runs in a new worker before any deadline: limits memory, builds the scorer, loads what its grader needs."""
    global _worker_scorer  # noqa: PLW0603  # the worker's only state, set once
    threading.Thread(target=_die_with_parent, name="watch-parent", daemon=True).start()
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _worker_scorer = build_scorer(spec)
    _worker_scorer.grader.prepare()


def _die_with_parent() -> None:
    """Ends this worker when the actor was killed: a worker in an endless loop would not notice by itself."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)


def _score_in_worker(completions: Sequence[Completion]) -> list[Score | _Failure]:
    """Scores a group inside a worker."""
    assert _worker_scorer is not None
    results: list[Score | _Failure] = []
    for completion in completions:
        # One completion's failure, out of memory included, must not cost the others their scores.
        try:
            results.append(_worker_scorer(completion))
        except Exception as error:
            results.append(_Failure(f"{type(error).__name__}: {error}"[:300]))
    return results
