"""Starts a run's processes, watches them, restarts those that fail, and ends them all together.

Actors, buffer and learner come back from durable state a bounded number of times. The learner is the run's clock: when
it ends well, the run is over. Ending is a promise: after `stop` no process of the run is left, nor any that these have
started, in whatever process group or session they put it.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from launch.topology import ProcessSpec

logger = logging.getLogger(__name__)

NOT_WORTH_RETRYING = (2, 3)
"""Exit statuses of a user's mistake and of a refused log-probability check: the next attempt would end the same."""
LONGEST_BACKOFF_SECONDS = 30.0
_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG = 1
_MARK = "SLIPSTREAM_PROCESS"
"""Environment variable by which the descendants of a process are known."""


class RunFailedError(RuntimeError):
    """A process failed for good; the message names it, its exit status and its log."""


@dataclass
class _Child:
    spec: ProcessSpec
    mark: str
    process: subprocess.Popen[bytes]
    num_restarts: int = 0
    restart_at: float = 0.0


class Supervisor:
    """The processes of one run. Whoever calls `start` calls `stop`, also when `start` fails.

    Args:
        specs: in starting order.
        log_dir: one log file per process, appended to over restarts.
        max_restarts: per process.
    """

    def __init__(self, specs: Sequence[ProcessSpec], log_dir: Path, max_restarts: int) -> None:
        self._specs = tuple(specs)
        self._log_dir = log_dir
        self._max_restarts = max_restarts
        self._run_mark = uuid.uuid4().hex
        self._children: list[_Child] = []

    def start(self) -> None:
        """Start all processes. Call it once, from the main thread: children end with the thread that started them."""
        self._log_dir.mkdir(parents=True, exist_ok=True)
        for spec in self._specs:
            mark = f"{self._run_mark}.{spec.name}"
            self._children.append(_Child(spec, mark, self._start(spec, mark)))

    @property
    def pids(self) -> dict[str, int]:
        """Process id by name."""
        return {child.spec.name: child.process.pid for child in self._children}

    def poll(self) -> bool:
        """Restart what failed. Returns True when the learner has ended well.

        Raises:
            RunFailedError: when a process is not worth restarting any more.
        """
        now = time.monotonic()
        for child in self._children:
            status = child.process.poll()
            if status is None:
                continue
            if child.spec.role == "learner" and status == 0:
                return True
            if child.restart_at == 0.0:
                self._schedule_restart(child, status, now)
            elif now >= child.restart_at:
                child.restart_at = 0.0
                child.process = self._start(child.spec, child.mark)
        return False

    def _schedule_restart(self, child: _Child, status: int, now: float) -> None:
        log = self._log_path(child.spec)
        failed = f"{child.spec.name} ended with status {status}; its log is {log}"
        if status in NOT_WORTH_RETRYING or child.num_restarts >= self._max_restarts:
            raise RunFailedError(f"{failed}\n{last_line(log)}")
        backoff = min(2.0**child.num_restarts, LONGEST_BACKOFF_SECONDS)
        child.num_restarts += 1
        child.restart_at = now + backoff
        # What it started may have outlived it.
        _kill_family(child)
        logger.warning("%s; restart %d in %.0f s", failed, child.num_restarts, backoff)

    def stop(self, grace_seconds: float) -> None:
        """End everything: the learner first, which may write a checkpoint for `grace_seconds`, then the others.

        Waits for: every process. Gives up after: the grace and one more second, by killing what is left.
        """
        self._end([child for child in self._children if child.spec.role == "learner"], grace_seconds)
        self._end([child for child in self._children if child.spec.role != "learner"], 1.0)

    def _end(self, children: Sequence[_Child], grace_seconds: float) -> None:
        for child in children:
            if child.process.poll() is None:
                child.process.terminate()
        deadline = time.monotonic() + grace_seconds
        while time.monotonic() < deadline and any(child.process.poll() is None for child in children):
            time.sleep(0.02)
        for child in children:
            _kill_family(child)
            child.process.wait()

    def _start(self, spec: ProcessSpec, mark: str) -> subprocess.Popen[bytes]:
        logger.info("starting %s: %s", spec.name, spec.command_line)
        with self._log_path(spec).open("ab") as log:
            return subprocess.Popen(
                spec.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **spec.environment, _MARK: mark},
                # A group of its own: Ctrl-C reaches only the launcher, which ends the others in order.
                start_new_session=True,
                # Safe beside threads: it only makes system calls.
                preexec_fn=partial(_end_with_the_launcher, os.getpid()),  # noqa: PLW1509
            )

    def _log_path(self, spec: ProcessSpec) -> Path:
        return self._log_dir / f"{spec.name}.log"


def _end_with_the_launcher(launcher: int) -> None:
    """Runs in the child: the kernel sends SIGTERM when the launcher is gone, however it went."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != launcher:
        os._exit(1)


def _kill_family(child: _Child) -> None:
    """Kill a process and all it has started, also after it is gone itself.

    Its group is found by number; those who left it, such as the ranks of torchrun, by the mark in their environment.
    """
    # Nobody is left in the group.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.process.pid, signal.SIGKILL)
    for pid in _marked(child.mark):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _marked(mark: str) -> list[int]:
    entry, found = f"{_MARK}={mark}".encode(), []
    for folder in Path("/proc").iterdir():
        # Other users' processes cannot be read, and any may end meanwhile.
        with contextlib.suppress(OSError):
            if folder.name.isdigit() and entry in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def last_line(log: Path) -> str:
    """How a log ends, for the message of a failure."""
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "(its log is empty)"
