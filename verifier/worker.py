"""One scoring process as the pool holds it; `scoring.py` is what runs inside.

A worker scores one completion at a time under a deadline. Past the deadline it is killed with everything it started,
and a new process takes its place before the next completion.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import signal
import socket
import struct
import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from verifier.base import Completion, RewardSpec, Score, Verdict
from verifier.scoring import READY, Failure, serve

START_SECONDS = 60.0
NUM_OUTSIDE_KILLS = 3
"""How often a completion is scored whose process is killed by somebody else."""
_OUTSIDE = (-signal.SIGKILL, 255)
"""Exit statuses that no limit leaves behind; multiprocessing says 255 where its fork server was killed."""

_PRELOADED = ["verifier.scoring", "sympy", "latex2sympy2_extended"]
_processes = threading.Lock()
"""Held while a process is started or reaped: multiprocessing looks after all of them in whatever thread calls it."""


class WorkerStartError(RuntimeError):
    """A scoring process cannot be started; the text says why."""


class Worker:
    """The pool's half. Used by one thread, but for `end`, which any may call; `close` follows it.

    Args:
        spec: the task's rewards.
        deadline_seconds: for each completion.
        memory_bytes: address space of the process.
    """

    def __init__(self, spec: Sequence[RewardSpec], *, deadline_seconds: float, memory_bytes: int) -> None:
        self._deadline_seconds = deadline_seconds
        self._arguments = (list(spec), memory_bytes, deadline_seconds)
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None
        self._ended = False

    def score(self, completion: Completion, *, fresh: bool = False) -> Score | Failure:
        """Score one completion, in a new process where `fresh`, or where there is none.

        Waits for: the process's answer. Unblocked by: it, its death, or the deadline.

        Raises:
            WorkerStartError: when a new process is needed and does not start, or after `end`.
        """
        for _ in range(NUM_OUTSIDE_KILLS):
            result = self._score_once(completion, fresh)
            if isinstance(result, Score) or not result.from_outside:
                break
        return result

    def start(self) -> None:
        """Replace the process.

        Waits for: the new one to be ready. Gives up after 60 seconds.

        Raises:
            WorkerStartError: with the reason.
        """
        self.close()
        ours, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        process = context.Process(target=serve, args=(theirs, *self._arguments), name="scoring", daemon=True)
        with _processes, theirs:
            if self._ended:
                raise WorkerStartError("the scoring pool is closed")
            try:
                process.start()
            except OSError as error:
                raise WorkerStartError(f"no process could be started: {error}") from error
            self._process, self._connection = process, ours
        _bound_sending(ours, self._deadline_seconds)
        try:
            answered = wait([ours, process.sentinel], START_SECONDS)
            greeting = ours.recv() if answered else f"it was not ready within {START_SECONDS:.0f} s"
        except (EOFError, OSError):
            greeting = self._how_it_died().reason
        if greeting != READY:
            self.close()
            raise WorkerStartError(greeting)

    def end(self) -> None:
        """Kill the process for good; whoever waits for it hears of its death."""
        with _processes:
            self._ended = True
            self._signal_group()

    def close(self) -> None:
        """Kill the process with all it started, and forget it; `start` and `score` make another."""
        with _processes:
            self._signal_group()
            self._forget()

    def _score_once(self, completion: Completion, fresh: bool) -> Score | Failure:
        if self._process is not None and wait([self._process.sentinel], 0):
            with _processes:
                # It died between two completions, some time ago: its number may be another process's by now.
                self._forget()
        if fresh or self._process is None:
            self.start()
        assert self._process is not None
        assert self._connection is not None
        result: Score | Failure | None = None
        # A dead process breaks the pipe; how it died is asked below.
        with contextlib.suppress(OSError, EOFError):
            self._connection.send(completion)
            if not wait([self._connection, self._process.sentinel], self._deadline_seconds):
                result = Failure(Verdict.TIMEOUT, f"no score within {self._deadline_seconds:g} s")
            elif self._connection.poll():
                result = self._connection.recv()
        if result is None:
            result = self._how_it_died()
        if isinstance(result, Failure) and result.verdict is not Verdict.ERROR:
            self.close()
        return result

    def _how_it_died(self) -> Failure:
        with _processes:
            assert self._process is not None
            self._process.join(1.0)
            status = self._process.exitcode
        if status == -signal.SIGXCPU:
            return Failure(Verdict.TIMEOUT, "it used more of the processor than the deadline allows")
        if status is None:
            return Failure(Verdict.TIMEOUT, "the scoring process is halted and reads nothing")
        if status >= 0:
            return Failure(Verdict.CRASH, f"the scoring process ended with exit status {status}", status in _OUTSIDE)
        name = signal.strsignal(-status)
        return Failure(Verdict.CRASH, f"the scoring process was ended by a signal: {name}", status in _OUTSIDE)

    def _forget(self) -> None:
        if self._process is not None:
            self._process.join()
            self._process.close()
        if self._connection is not None:
            self._connection.close()
        self._process = self._connection = None

    def _signal_group(self) -> None:
        """SIGKILL to the process and to all it started; call with the lock held."""
        if self._process is None or self._process.pid is None:
            return
        # Its group exists from its first statement on, and outlives it where it left a process behind.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()


def _bound_sending(connection: Connection, seconds: float) -> None:
    """Sending to a process that is halted in the middle of reading ends with an OSError instead of never."""
    with socket.socket(fileno=os.dup(connection.fileno())) as end:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", math.ceil(seconds) + 1, 0))
