"""Starts a run's processes, restarts those that fail, and ends all of them together.

Actors, buffer and learner continue from durable state. Each is restarted a limited number of times without progress of
the run in between. An actor whose name a newer process took over is restarted only when that one has left. The run is
over when the learner exits with status 0. `stop` leaves no process of the run and no descendant, in whatever process
group or session. If the launcher is killed, the guardian does the same.
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from buffer.process import REPLACED
from launch.processes.process_tree import (
    HALTED_SECONDS,
    MARK,
    OTHERS_SECONDS,
    HaltedProcesses,
    is_stopped,
    kill,
    marked_processes,
)
from launch.processes.topology import ProcessSpec

logger = logging.getLogger(__name__)

NOT_WORTH_RETRYING = (2, 3)
"""Exit statuses of a user's mistake and of a failed log-probability check, which a restart would repeat."""
SILENT_SECONDS = 5.0
"""Longest silence of a process that took an actor's name over and still works."""
LEFT_SECONDS = 10.0
"""How long it must be silent, or unknown to the buffer, to have left. A restarted buffer has not heard of it yet."""
LONGEST_BACKOFF_SECONDS = 30.0
WAIT_SECONDS = 0.1
"""Interval of the look at the learner while its checkpoint is waited for."""
HALTED_EVERY_SECONDS = 1.0
"""Interval of the look whether it is halted, which reads the environment of every process on the machine."""
_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG = 1


class RunFailedError(RuntimeError):
    """A process failed for good; the message names it, its exit status and its log."""


@dataclass
class _Child:
    spec: ProcessSpec
    mark: str
    process: subprocess.Popen[bytes]
    started: float
    num_restarts: int = 0
    """Restarts since the last progress of the run."""
    version_at_failure: int = -1
    killed_because: str = ""
    """Why it was killed as hung; empty: it ended by itself."""
    restart_at: float = 0.0
    given_up: bool = False
    is_replaced: bool = False
    """Whether the process has ended because a newer one, which this supervisor did not start, took its name over."""
    unheard_since: float | None = None
    """Time since when the buffer has not heard that newer process."""


class Supervisor:
    """The processes of one run. The caller of `start` must call `stop`, even if `start` fails.

    Args:
        specs: in starting order.
        log_dir: folder with one log file per process, to which restarts append.
        max_restarts: per process, without progress of the run in between.
        healthy_seconds: how long a restarted process must live before its restarts are forgotten.
        run_mark: value of the environment variable by which the run's processes are found.
    """

    def __init__(
        self,
        specs: Sequence[ProcessSpec],
        log_dir: Path,
        *,
        max_restarts: int,
        healthy_seconds: float,
        run_mark: str,
    ) -> None:
        self._specs = tuple(specs)
        self._log_dir = log_dir
        self._max_restarts = max_restarts
        self._healthy_seconds = healthy_seconds
        self._run_mark = run_mark
        self._children: list[_Child] = []
        self._newest_version = 0
        self.notes: dict[str, str] = {}
        """A sentence for each process that has failed, by name, until it counts as healthy again."""

    def start(self) -> None:
        """Start all processes. Call once, from the main thread: a child gets SIGTERM when its starting thread ends."""
        self._log_dir.mkdir(parents=True, exist_ok=True)
        for spec in self._specs:
            mark = f"{self._run_mark}.{spec.name}"
            self._children.append(_Child(spec, mark, self._start(spec, mark), time.monotonic()))

    @property
    def pids(self) -> dict[str, int]:
        """Process ids by name, without processes that were given up."""
        return {child.spec.name: child.process.pid for child in self._children if not child.given_up}

    def running_seconds(self) -> dict[str, float]:
        """How long every running process has been running, by name."""
        now = time.monotonic()
        return {child.spec.name: now - child.started for child in self._children if child.process.poll() is None}

    def stopped(self) -> set[str]:
        """Names of the processes that are halted by SIGSTOP or have a halted descendant."""
        return {mark.partition(".")[2] for pid, mark in marked_processes(self._run_mark).items() if is_stopped(pid)}

    def progress(self, policy_version: int) -> None:
        """Note the run's newest version. After progress, a restarted process that has lived long enough is healthy."""
        self._newest_version = max(self._newest_version, policy_version)
        for name, seconds in self.running_seconds().items():
            child = self._child(name)
            ahead = self._newest_version > child.version_at_failure
            if child.num_restarts and ahead and seconds >= self._healthy_seconds:
                child.num_restarts = 0
                self.notes.pop(name, None)

    def heard(self, silent_seconds: Mapping[str, float]) -> None:
        """Start an actor again if the process that took its name over has left.

        Args:
            silent_seconds: by an answer of the buffer, how long every actor that it knows has been silent, by name.
        """
        now = time.monotonic()
        for child in self._children:
            if not child.is_replaced:
                continue
            if silent_seconds.get(child.spec.name, math.inf) < SILENT_SECONDS:
                child.unheard_since = None
                continue
            if child.unheard_since is None:
                child.unheard_since = now
            if now - child.unheard_since >= LEFT_SECONDS:
                logger.info("the process that took the name %s over has left", child.spec.name)
                self.notes.pop(child.spec.name, None)
                child.is_replaced, child.unheard_since, child.restart_at = False, None, now

    def kill(self, name: str, reason: str) -> None:
        """Kill a process that hangs; `poll` then restarts it."""
        child = self._child(name)
        logger.warning("%s %s: killed", name, reason)
        _kill_tree(child)
        child.process.wait()
        child.killed_because = reason

    def restart(self, name: str) -> None:
        """Restart a process that exited with status 0 before the run was finished."""
        self._schedule_restart(self._child(name), 0, time.monotonic())

    def poll(self) -> bool:
        """Restart processes that failed. Returns True when the learner has exited with status 0.

        Raises:
            RunFailedError: a process that the run needs has failed for good.
        """
        now = time.monotonic()
        for child in self._children:
            status = child.process.poll()
            if status is None or child.given_up or child.is_replaced:
                continue
            if child.spec.role == "learner" and status == 0 and child.restart_at == 0.0:
                return True
            if child.restart_at == 0.0 and child.spec.role == "actor" and status == REPLACED:
                self._leave_name(child)
            elif child.restart_at == 0.0:
                self._schedule_restart(child, status, now)
            elif now >= child.restart_at:
                child.restart_at = 0.0
                child.process, child.started = self._start(child.spec, child.mark), now
        return False

    def _schedule_restart(self, child: _Child, status: int, now: float) -> None:
        log = self._log_path(child.spec)
        ended, child.killed_because = child.killed_because or f"ended with status {status}", ""
        failed = f"{child.spec.name} {ended}; its log is {log}"
        # Its descendants may still be running.
        _kill_tree(child)
        if status in NOT_WORTH_RETRYING or child.num_restarts >= self._max_restarts:
            self._give_up(child, f"{failed}\n{last_line(log)}")
            return
        backoff = min(2.0**child.num_restarts, LONGEST_BACKOFF_SECONDS)
        child.num_restarts += 1
        child.restart_at = now + backoff
        child.version_at_failure = self._newest_version
        times = "once" if child.num_restarts == 1 else f"{child.num_restarts} times"
        self.notes[child.spec.name] = f"{child.spec.name} was restarted {times}, last because it {ended}"
        logger.warning("%s; restart %d in %.0f s", failed, child.num_restarts, backoff)

    def _leave_name(self, child: _Child) -> None:
        """Let the process that took an actor's name over work in its place. This is no failure."""
        _kill_tree(child)
        child.is_replaced = True
        name = child.spec.name
        self.notes[name] = f"another process took the name {name} over; when it has left, {name} is started again"
        logger.warning("%s; the log of %s is %s", self.notes[name], name, self._log_path(child.spec))

    def _give_up(self, child: _Child, why: str) -> None:
        """Stop restarting a process. The run goes on while it has its buffer, its learner and one actor."""
        child.given_up = True
        role = child.spec.role
        no_actor = all(other.given_up for other in self._children if other.spec.role == "actor")
        if role in ("buffer", "learner") or (role == "actor" and no_actor):
            raise RunFailedError(why)
        self.notes[child.spec.name] = f"{child.spec.name} is given up; its log is {self._log_path(child.spec)}"
        logger.error("%s\n%s is given up", why, child.spec.name)

    def _child(self, name: str) -> _Child:
        return next(child for child in self._children if child.spec.name == name)

    def stop(
        self,
        grace_seconds: float,
        at_once: Callable[[], bool] = lambda: False,
        show: Callable[[float], None] = lambda _: None,
    ) -> None:
        """End all processes, the buffer last, because the learner reports its checkpoint to it.

        Waits for: the learner's checkpoint, then every process for one more second. Unblocked by: `at_once`, or a
        learner that is halted. Gives up after: `grace_seconds`; processes that are left are then killed, with their
        descendants.

        Args:
            grace_seconds: how long the learner may take; math.inf: no limit.
            at_once: whether not to wait any longer.
            show: called again and again during the wait, with its length so far in seconds.
        """
        buffers = [child for child in self._children if child.spec.role == "buffer"]
        others = [child for child in self._children if child.spec.role != "buffer"]
        _ask_to_end(others)
        self._await_learner(grace_seconds, at_once, show)
        _ask_to_end(buffers)
        _wait(self._children, 0.0 if at_once() else 1.0)
        for child in self._children:
            _kill_tree(child)
            child.process.wait()

    def _await_learner(self, grace_seconds: float, at_once: Callable[[], bool], show: Callable[[float], None]) -> None:
        began, halted, next_look = time.monotonic(), HaltedProcesses(), 0.0
        learners = [child for child in self._children if child.spec.role == "learner"]
        others = [child for child in self._children if child.spec.role not in ("learner", "buffer")]
        while any(child.process.poll() is None for child in learners) and not at_once():
            now = time.monotonic()
            if now - began >= grace_seconds:
                return
            if now >= next_look:
                next_look = now + HALTED_EVERY_SECONDS
                pids = [pid for child in learners for pid in marked_processes(child.mark)]
                if halted.longest(pids, now) >= HALTED_SECONDS:
                    return
            if now - began >= OTHERS_SECONDS:
                for child in others:
                    if child.process.poll() is None:
                        _kill_tree(child)
            show(now - began)
            time.sleep(WAIT_SECONDS)

    def _start(self, spec: ProcessSpec, mark: str) -> subprocess.Popen[bytes]:
        logger.info("starting %s: %s", spec.name, spec.command_line)
        with self._log_path(spec).open("ab") as log:
            return subprocess.Popen(
                spec.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **spec.environment, MARK: mark},
                # In a session of its own, so that Ctrl-C reaches only the launcher, which ends the others in order.
                start_new_session=True,
                # Safe despite other threads: the function only makes system calls.
                preexec_fn=partial(_end_with_the_launcher, os.getpid(), spec.role),  # noqa: PLW1509
            )

    def _log_path(self, spec: ProcessSpec) -> Path:
        return self._log_dir / f"{spec.name}.log"


def _end_with_the_launcher(launcher: int, role: str) -> None:
    """In the child: ask the kernel for SIGTERM when the launcher ends, for whatever reason.

    The guardian ends the buffer, after the learner has reported its checkpoint to it.
    """
    if role != "buffer":
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != launcher:
        os._exit(1)


def _ask_to_end(children: Sequence[_Child]) -> None:
    for child in children:
        if child.process.poll() is None:
            child.process.terminate()


def _wait(children: Sequence[_Child], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(child.process.poll() is None for child in children):
        time.sleep(0.02)


def _kill_tree(child: _Child) -> None:
    """Kill a process and its descendants, even if the process itself has ended."""
    kill(marked_processes(child.mark))
    child.process.kill()


def last_line(log: Path) -> str:
    """The last line of a log, for an error message."""
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "(its log is empty)"
