"""Scores completions in worker processes, under a deadline and with limits of memory and processor time.

The actor calls `await pool.score_group(completions)` and gets the scores in order. All workers take completions from
one queue, so a completion that hangs blocks one worker for one deadline and delays no other completion by more.

A completion that cannot be scored gets the verdict `timeout`, `crash` or `error`, is counted and logged, and is treated
as configured. It never silently becomes a zero.

Workers come from a fork server and import neither torch nor vllm. Python imports the main script again in every worker,
so a script that starts a pool must guard its heavy imports; `python -m PACKAGE` needs no guard.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field

from verifier.base import Completion, RewardSpec, Score, Verdict
from verifier.config import check_treatment
from verifier.scoring.messages import Failure
from verifier.scoring.scorer import build_scorer
from verifier.scoring.worker import Worker, WorkerStartError

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Group:
    """The completions of one call of `score_group`, and their scores so far."""

    completions: list[Completion]
    scores: list[Score | None]
    num_missing: int
    """Number of completions that have no score yet."""
    future: Future[list[Score]] = field(default_factory=Future)
    """Completed with all scores once none is missing."""


class ScoringPool:
    """A pool of scoring processes.

    Args:
        spec: the task's rewards, exactly one of them a grader.
        num_workers: number of scoring processes.
        deadline_seconds: time limit for one completion.
        memory_bytes: limit of the address space of one worker.
        on_timeout: treatment of a completion that was not scored in time. `wrong` and `no_answer`: it gets the reward
            of that verdict. `skip`: its score is marked as skipped. `retry`: it is scored again in a new process, and
            counts as wrong when that fails too.
        on_error: treatment of a completion whose worker crashed or whose reward raised; the same values.
        max_retries: largest number of times that `retry` scores a completion again.

    Waits for: the first worker to be ready; gives up after 60 seconds.

    Raises:
        ValueError: for an unknown reward, `on_timeout` or `on_error`.
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
        on_error: str = "wrong",
        max_retries: int = 1,
    ) -> None:
        check_treatment("on_timeout", on_timeout)
        check_treatment("on_error", on_error)
        self._scorer = build_scorer(spec)
        self._treatments = {Verdict.TIMEOUT: on_timeout, Verdict.CRASH: on_error, Verdict.ERROR: on_error}
        self._max_retries = max_retries
        self._lock = threading.Lock()
        self._closed = False
        self._counts: Counter[str] = Counter()
        self._groups: set[_Group] = set()
        self._jobs: queue.SimpleQueue[tuple[_Group, int] | None] = queue.SimpleQueue()
        self._workers = [
            Worker(spec, deadline_seconds=deadline_seconds, memory_bytes=memory_bytes) for _ in range(num_workers)
        ]
        try:
            self._workers[0].start()
        except WorkerStartError as error:
            raise RuntimeError(
                f"no scoring process started ({error}); is verifier.memory_bytes={memory_bytes} enough?"
            ) from error
        self._threads = [
            threading.Thread(target=self._serve, args=(worker,), name="scoring", daemon=True)
            for worker in self._workers
        ]
        for thread in self._threads:
            thread.start()

    async def score_group(self, completions: Sequence[Completion]) -> list[Score]:
        """Returns one score per completion, in order.

        Waits for: the workers. Unblocked by: a score, the death of a worker, or the deadline of every completion and
        retry.

        Raises:
            RuntimeError: when the pool is closed, or workers cannot be started any more.
        """
        group = _Group(list(completions), [None] * len(completions), len(completions))
        with self._lock:
            if self._closed:
                raise RuntimeError("the scoring pool is closed")
            if not group.completions:
                return []
            self._groups.add(group)
        group.future.add_done_callback(lambda _: self._groups.discard(group))
        for index in range(len(group.completions)):
            self._jobs.put((group, index))
        return await asyncio.wrap_future(group.future)

    def counts(self) -> dict[str, float]:
        """Numbers of timeouts, crashes, errors, retries and skipped completions since the pool started."""
        names = ("timeouts", "crashes", "errors", "retries", "skipped")
        with self._lock:
            return {name: float(self._counts[name]) for name in names}

    def close(self) -> None:
        """End the workers and cancel the calls of `score_group` that still wait. May be called twice."""
        with self._lock:
            self._closed = True
            groups = list(self._groups)
        for group in groups:
            group.future.cancel()
        for _ in self._threads:
            self._jobs.put(None)
        for worker in self._workers:
            worker.end()
        for thread in self._threads:
            thread.join()

    def _serve(self, worker: Worker) -> None:
        """Thread of one worker: scores one completion after another until the pool is closed."""
        try:
            while (job := self._jobs.get()) is not None:
                group, index = job
                # A cancelled group needs no scores.
                if not group.future.done():
                    self._deliver(group, index, self._score(worker, group.completions[index]))
        # If this thread ended silently, score_group would wait forever. The error fails its calls and ends the actor.
        except BaseException as error:
            self._fail(RuntimeError(f"the scoring pool broke: {error}"))
        finally:
            worker.close()

    def _score(self, worker: Worker, completion: Completion) -> Score:
        result = worker.score(completion)
        for _ in range(self._max_retries):
            if isinstance(result, Score) or self._treatments[result.verdict] != "retry":
                break
            self._count("retries")
            log.info("scored again: %s (gold %.80r)", result.reason, completion.gold)
            result = worker.score(completion, fresh=True)
        return result if isinstance(result, Score) else self._unscored(result, completion)

    def _unscored(self, failure: Failure, completion: Completion) -> Score:
        treatment = self._treatments[failure.verdict]
        log.warning("%s: %s (gold %.80r)", failure.verdict.value, failure.reason, completion.gold)
        self._count({Verdict.TIMEOUT: "timeouts", Verdict.CRASH: "crashes"}.get(failure.verdict, "errors"))
        if treatment == "skip":
            self._count("skipped")
        counts_as = Verdict.NO_ANSWER if treatment == "no_answer" else Verdict.WRONG
        return self._scorer.unscored(failure.verdict, counts_as, skipped=treatment == "skip")

    def _count(self, name: str) -> None:
        with self._lock:
            self._counts[name] += 1

    def _deliver(self, group: _Group, index: int, score: Score) -> None:
        with self._lock:
            group.scores[index] = score
            group.num_missing -= 1
            if group.num_missing:
                return
        # The group may have been cancelled a moment ago.
        with contextlib.suppress(InvalidStateError):
            group.future.set_result([score for score in group.scores if score is not None])

    def _fail(self, error: RuntimeError) -> None:
        with self._lock:
            self._closed = True
            groups = list(self._groups)
        for group in groups:
            with contextlib.suppress(InvalidStateError):
                group.future.set_exception(error)
