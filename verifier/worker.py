"""One scoring process as the pool holds it; `scoring.py` is what runs inside.

A worker scores one completion at a time under a deadline. Past the deadline it is killed with everything it started,
and a new process takes its place before the next completion. From the first time on the next one is kept ready, so that
a hang costs its deadline and no start.
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
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from verifier.base import Completion, RewardSpec, Score, Verdict
from verifier.scoring import READY, Failure, serve

START_SECONDS = 60.0
NUM_START_TRIES = 3
START_PAUSE_SECONDS = 0.2
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
        self._standby: tuple[BaseProcess, Connection] | None = None
        self._was_replaced = False
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
        self._kill_process()
        with _processes:
            if self._standby is not None and wait([self._standby[0].sentinel], 0):
                _forget(*self._standby)
                self._standby = None
            self._process, self._connection = self._standby or self._launch()
            self._standby = None
        try:
            answered = wait([self._connection, self._process.sentinel], START_SECONDS)
            greeting = self._connection.recv() if answered else f"it was not ready within {START_SECONDS:.0f} s"
        except (EOFError, OSError):
            greeting = self._how_it_died().reason
        if greeting != READY:
            self.close()
            raise WorkerStartError(greeting)
        # Where one completion hung, others may. What keeps a process from starting is said when it is needed.
        with _processes, contextlib.suppress(WorkerStartError):
            self._standby = self._launch() if self._was_replaced else None
        self._was_replaced = True

    def end(self) -> None:
        """Kill the process for good; whoever waits for it hears of its death."""
        with _processes:
            self._ended = True
            for process in (self._process, self._standby and self._standby[0]):
                _kill_group(process)

    def close(self) -> None:
        """Kill the process with all it started, and the one that is ready; `start` and `score` make another."""
        self._kill_process()
        with _processes:
            if self._standby is not None:
                _kill_group(self._standby[0])
                _forget(*self._standby)
            self._standby = None

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
            self._kill_process()
        return result

    def _launch(self) -> tuple[BaseProcess, Connection]:
        """A new process, not yet ready, and our end of its pipe; call with the lock held."""
        if self._ended:
            raise WorkerStartError("the scoring pool is closed")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        for tries_left in reversed(range(NUM_START_TRIES)):
            ours, theirs = multiprocessing.Pipe()
            process = context.Process(target=serve, args=(theirs, *self._arguments), name="scoring", daemon=True)
            with theirs:
                try:
                    process.start()
                # A fork server that is dying at this moment refuses; the next try starts another one.
                except (OSError, EOFError) as error:
                    ours.close()
                    if not tries_left:
                        raise WorkerStartError(f"no process could be started: {error}") from error
                    time.sleep(START_PAUSE_SECONDS)
                    continue
            break
        _bound_sending(ours, self._deadline_seconds)
        return process, ours

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

    def _kill_process(self) -> None:
        """Kill the process with all it started, and forget it."""
        with _processes:
            _kill_group(self._process)
            self._forget()

    def _forget(self) -> None:
        if self._process is not None and self._connection is not None:
            _forget(self._process, self._connection)
        self._process = self._connection = None


def _kill_group(process: BaseProcess | None) -> None:
    """SIGKILL to a process and to all it started; call with the lock held."""
    if process is None or process.pid is None:
        return
    # Its group exists from its first statement on, and outlives it where it left a process behind.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()


def _forget(process: BaseProcess, connection: Connection) -> None:
    process.join()
    process.close()
    connection.close()


def _bound_sending(connection: Connection, seconds: float) -> None:
    """Sending to a process that is halted in the middle of reading ends with an OSError instead of never."""
    with socket.socket(fileno=os.dup(connection.fileno())) as end:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", math.ceil(seconds) + 1, 0))
