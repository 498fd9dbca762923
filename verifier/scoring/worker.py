"""One scoring process as the pool holds it; `client.py` is what runs inside.

A worker scores one completion at a time under a deadline. Past the deadline it is killed with everything it started,
and a new process takes its place before the next completion. From the first time on the next one is kept ready, so that
a hang costs its deadline and no start.
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
"""How often a completion is scored whose process is killed by somebody else."""
_OUTSIDE = (-signal.SIGKILL, 255)
"""Exit statuses that no limit leaves behind; multiprocessing says 255 where its fork server was killed."""

_PRELOADED = ["verifier.scoring.client", "sympy", "latex2sympy2_extended"]
_processes = threading.Lock()
"""Held while a process is started or reaped: multiprocessing looks after all of them in whatever thread calls it."""


class WorkerStartError(RuntimeError):
    """A scoring process cannot be started; the text says why."""


class _Held:
    """A scoring process and our end of its pipe."""

    def __init__(self, process: BaseProcess, connection: Connection) -> None:
        self.process, self.connection = process, connection
        # Asked twice per completion, so it is made once.
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)
        self._poll.register(process.sentinel, select.POLLIN)

    def wait(self, seconds: float) -> tuple[bool, bool]:
        """Whether there is something to read, or the other end is gone; and whether the process has died."""
        ready = {number for number, _ in self._poll.poll(math.ceil(seconds * 1000))}
        return self.connection.fileno() in ready, self.process.sentinel in ready

    def forget(self) -> None:
        """Reap it, once it was killed or has died."""
        self.process.join()
        self.process.close()
        self.connection.close()


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
        self._held: _Held | None = None
        self._standby: _Held | None = None
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
            if self._standby is not None and self._standby.wait(0)[1]:
                self._standby.forget()
                self._standby = None
            held = self._held = self._standby or self._launch()
            self._standby = None
        try:
            if not any(held.wait(START_SECONDS)):
                reason = f"it was not ready within {START_SECONDS:.0f} s"
            else:
                greeting = held.connection.recv_bytes()
                reason = "" if greeting == READY else greeting.decode(errors="replace")
        except (EOFError, OSError):
            reason = self._how_it_died().reason
        if reason:
            self.close()
            raise WorkerStartError(reason)
        # Where one completion hung, others may. What keeps a process from starting is said when it is needed.
        with _processes, contextlib.suppress(WorkerStartError):
            self._standby = self._launch() if self._was_replaced else None
        self._was_replaced = True

    def end(self) -> None:
        """Kill the process for good; whoever waits for it hears of its death."""
        with _processes:
            self._ended = True
            for held in (self._held, self._standby):
                _kill_group(held)

    def close(self) -> None:
        """Kill the process with all it started, and the one that is ready; `start` and `score` make another."""
        self._kill_process()
        with _processes:
            if self._standby is not None:
                _kill_group(self._standby)
                self._standby.forget()
            self._standby = None

    def _score_once(self, completion: Completion, fresh: bool) -> Score | Failure:
        if self._held is not None and self._held.wait(0)[1]:
            with _processes:
                # It died between two completions, some time ago: its number may be another process's by now.
                self._forget()
        if fresh or self._held is None:
            self.start()
        assert self._held is not None
        result: Score | Failure | None = None
        # A dead process breaks the pipe; how it died is asked below.
        with contextlib.suppress(OSError, EOFError):
            self._held.connection.send_bytes(pack_completion(completion))
            answered, died = self._held.wait(self._deadline_seconds)
            if answered:
                result = _read(self._held.connection)
            elif not died:
                result = Failure(Verdict.TIMEOUT, f"no score within {self._deadline_seconds:g} s")
        if result is None:
            result = self._how_it_died()
        if isinstance(result, Failure) and result.verdict is not Verdict.ERROR:
            self._kill_process()
        return result

    def _launch(self) -> _Held:
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
        return _Held(process, ours)

    def _how_it_died(self) -> Failure:
        with _processes:
            assert self._held is not None
            self._held.process.join(1.0)
            status = self._held.process.exitcode
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
            _kill_group(self._held)
            self._forget()

    def _forget(self) -> None:
        if self._held is not None:
            self._held.forget()
        self._held = None


def _read(connection: Connection) -> Score | Failure:
    try:
        return unpack_result(connection.recv_bytes())
    except ValueError as error:
        return Failure(Verdict.CRASH, f"the scoring process answered nonsense: {error}")


def _kill_group(held: _Held | None) -> None:
    """SIGKILL to a process and to all it started; call with the lock held."""
    if held is None or held.process.pid is None:
        return
    # Its group exists from its first statement on, and outlives it where it left a process behind.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(held.process.pid, signal.SIGKILL)
    held.process.kill()


def _bound_sending(connection: Connection, seconds: float) -> None:
    """Sending to a process that is halted in the middle of reading ends with an OSError instead of never."""
    with socket.socket(fileno=os.dup(connection.fileno())) as end:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", math.ceil(seconds) + 1, 0))
