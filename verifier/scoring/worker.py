"""The pool's handle of one scoring process; `client.py` runs inside the process.

A worker scores one completion at a time under a deadline. Past the deadline it kills the process with everything that
the process started, and replaces it before the next completion. After the first replacement a standby process is always
ready, so that a hang costs its deadline but no start of a process.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import select
import signal
import socket
import struct
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from verifier.base import Completion, RewardSpec, Score, Verdict
from verifier.scoring.client import READY, serve
from verifier.scoring.messages import Failure, pack_completion, unpack_result

START_SECONDS = 60.0
NUM_START_TRIES = 3
START_PAUSE_SECONDS = 0.2
NUM_OUTSIDE_KILLS = 3
"""Largest number of attempts at a completion whose process is killed from outside, as by the out-of-memory killer."""
_OUTSIDE = (-signal.SIGKILL, 255)
"""Exit statuses of a kill from outside: no limit causes them. multiprocessing reports 255 when its fork server died."""

_PRELOADED = ["verifier.scoring.client", "sympy", "latex2sympy2_extended"]
_processes = threading.Lock()
"""Held while a process is started or reaped: each such call of multiprocessing touches all processes of the pool."""


class WorkerStartError(RuntimeError):
    """A scoring process cannot be started; the text says why."""


class _Process:
    """A scoring process and the pool's end of its pipe."""

    def __init__(self, process: BaseProcess, connection: Connection) -> None:
        self.process, self.connection = process, connection
        # Used twice per completion, so created once.
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)
        self._poll.register(process.sentinel, select.POLLIN)

    def wait(self, seconds: float) -> tuple[bool, bool]:
        """Wait up to `seconds`; returns (whether the pipe can be read or is closed, whether the process has died)."""
        ready = {number for number, _ in self._poll.poll(math.ceil(seconds * 1000))}
        return self.connection.fileno() in ready, self.process.sentinel in ready

    def reap(self) -> None:
        """Wait for the end of a process that was killed or has died, and free what belongs to it."""
        self.process.join()
        self.process.close()
        self.connection.close()


class Worker:
    """A scoring process that is replaced when it hangs or dies.

    One thread uses a worker. Only `end` may be called from any thread; the worker's thread then calls `close`.

    Args:
        spec: the task's rewards.
        deadline_seconds: time limit for one completion.
        memory_bytes: limit of the address space of the process.
    """

    def __init__(self, spec: Sequence[RewardSpec], *, deadline_seconds: float, memory_bytes: int) -> None:
        self._deadline_seconds = deadline_seconds
        self._serve_arguments = {"spec": list(spec), "memory_bytes": memory_bytes, "cpu_seconds": deadline_seconds}
        self._current: _Process | None = None
        self._standby: _Process | None = None
        self._was_replaced = False
        self._ended = False

    def score(self, completion: Completion, *, fresh: bool = False) -> Score | Failure:
        """Score one completion; with `fresh` in a new process.

        Waits for: the answer. Unblocked by: the answer, the death of the process, or the deadline.

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

        Waits for: the new process to be ready. Gives up after: 60 seconds.

        Raises:
            WorkerStartError: when the process does not start; the text says why.
        """
        for tries_left in reversed(range(NUM_OUTSIDE_KILLS)):
            problem = self._start_once()
            if problem is None:
                break
            # The next process may start although another program killed this one during its start.
            if not problem.from_outside or not tries_left:
                self.close()
                raise WorkerStartError(problem.reason)
        # Where one completion hung, others may hang too. An error at this start is reported when the process is needed.
        with _processes, contextlib.suppress(WorkerStartError):
            self._standby = self._launch() if self._was_replaced else None
        self._was_replaced = True

    def _start_once(self) -> Failure | None:
        """Replace the process by the standby or by a new one. Returns why it did not become ready."""
        self._kill_process()
        with _processes:
            if self._standby is not None and self._standby.wait(0)[1]:
                self._standby.reap()
                self._standby = None
            current = self._current = self._standby or self._launch()
            self._standby = None
        try:
            if not any(current.wait(START_SECONDS)):
                return Failure(Verdict.TIMEOUT, f"it was not ready within {START_SECONDS:.0f} s")
            greeting = current.connection.recv_bytes()
        except (EOFError, OSError):
            return self._how_it_died()
        return None if greeting == READY else Failure(Verdict.ERROR, greeting.decode(errors="replace"))

    def end(self) -> None:
        """Kill the process for good. A `score` that waits for it returns a Failure."""
        with _processes:
            self._ended = True
            for process in (self._current, self._standby):
                _kill_group(process)

    def close(self) -> None:
        """Kill the process with everything it started, and the standby. `start` and `score` launch a new one."""
        self._kill_process()
        with _processes:
            if self._standby is not None:
                _kill_group(self._standby)
                self._standby.reap()
            self._standby = None

    def _score_once(self, completion: Completion, fresh: bool) -> Score | Failure:
        if self._current is not None and self._current.wait(0)[1]:
            with _processes:
                # Died after the last completion. It is not killed again: its id may belong to another process already.
                self._reap_current()
        if fresh or self._current is None:
            self.start()
        assert self._current is not None
        result: Score | Failure | None = None
        # A dead process breaks the pipe; `_how_it_died` below says why.
        with contextlib.suppress(OSError, EOFError):
            self._current.connection.send_bytes(pack_completion(completion))
            answered, died = self._current.wait(self._deadline_seconds)
            if answered:
                result = _read(self._current.connection)
            elif not died:
                result = Failure(Verdict.TIMEOUT, f"no score within {self._deadline_seconds:g} s")
        if result is None:
            result = self._how_it_died()
        if isinstance(result, Failure) and result.verdict is not Verdict.ERROR:
            self._kill_process()
        return result

    def _launch(self) -> _Process:
        """Start a new process without waiting until it is ready; call with `_processes` held."""
        if self._ended:
            raise WorkerStartError("the scoring pool is closed")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        for tries_left in reversed(range(NUM_START_TRIES)):
            ours, theirs = multiprocessing.Pipe()
            arguments = {"connection": theirs, **self._serve_arguments}
            process = context.Process(target=serve, kwargs=arguments, name="scoring", daemon=True)
            with theirs:
                try:
                    process.start()
                # A fork server that is about to end refuses; the next try starts a new fork server.
                except (OSError, EOFError) as error:
                    ours.close()
                    if not tries_left:
                        raise WorkerStartError(f"no process could be started: {error}") from error
                    time.sleep(START_PAUSE_SECONDS)
                    continue
            break
        _bound_sending(ours, self._deadline_seconds)
        return _Process(process, ours)

    def _how_it_died(self) -> Failure:
        with _processes:
            assert self._current is not None
            self._current.process.join(1.0)
            status = self._current.process.exitcode
        if status == -signal.SIGXCPU:
            return Failure(Verdict.TIMEOUT, "it used more of the processor than the deadline allows")
        if status is None:
            return Failure(Verdict.TIMEOUT, "the scoring process is halted and reads nothing")
        if status >= 0:
            return Failure(Verdict.CRASH, f"the scoring process ended with exit status {status}", status in _OUTSIDE)
        name = signal.strsignal(-status)
        return Failure(Verdict.CRASH, f"the scoring process was ended by a signal: {name}", status in _OUTSIDE)

    def _kill_process(self) -> None:
        """Kill the process with everything it started, and reap it."""
        with _processes:
            _kill_group(self._current)
            self._reap_current()

    def _reap_current(self) -> None:
        if self._current is not None:
            self._current.reap()
        self._current = None


def _read(connection: Connection) -> Score | Failure:
    try:
        return unpack_result(connection.recv_bytes())
    except ValueError as error:
        return Failure(Verdict.CRASH, f"the scoring process answered nonsense: {error}")


def _kill_group(process: _Process | None) -> None:
    """Send SIGKILL to a process and to everything it started; call with `_processes` held."""
    if process is None or process.process.pid is None:
        return
    # The process group exists once `serve` has begun. It outlives the process while one of its children runs.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.process.pid, signal.SIGKILL)
    process.process.kill()


def _bound_sending(connection: Connection, seconds: float) -> None:
    """Set a send timeout: sending to a process that stopped in the middle of a read then raises OSError."""
    with socket.socket(fileno=os.dup(connection.fileno())) as end:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", math.ceil(seconds) + 1, 0))
