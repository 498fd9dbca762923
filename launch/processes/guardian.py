"""A process that outlives the launcher and removes what is left of the run: processes, sockets, shared memory.

The launcher holds a `Guardian`. Its process, `python -m launch.processes.guardian`, starts before all others, in a
session of its own.

Waits for: the end of its standard input, a pipe that only the launcher holds; the kernel closes it even after kill -9.
By then the launcher or the kernel has sent SIGTERM to all but the buffer. The guardian ends the buffer after the
learner, which reports its checkpoint to it. Gives up after: the learner's grace period, or a few seconds for a halted
learner and for all other processes; those that are left, frozen ones too, are then killed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

from buffer.weights.config import MEMORY_VARIABLE
from launch.processes.process_tree import (
    HALTED_SECONDS,
    MARK,
    OTHERS_SECONDS,
    HaltedProcesses,
    kill,
    marked_processes,
)

SHARED_MEMORY = Path("/dev/shm")
TICK_SECONDS = 0.05
WAIT_SECONDS = 0.25
"""Interval of the look at what is left, while the learner has its time."""
BUFFER_SECONDS = 5.0
"""How long the buffer may take to end."""
KILLING_SECONDS = 10.0
"""How long killed processes may take to disappear."""
LONGEST_TEMPORARY_PATH = 40
"""In characters. Sockets lie in the temporary folder, and the kernel allows a socket's path 107 characters."""


class Guardian:
    """The run's mark, its temporary folders, and the guardian process. The launcher must call `close`.

    Args:
        grace_seconds: how long the learner may take to end after the launcher has been killed; math.inf: no limit.
        compiled: folder for compiled kernels, which later runs use again.
    """

    def __init__(self, grace_seconds: float, compiled: Path) -> None:
        self.run_mark = uuid.uuid4().hex
        short = len(tempfile.gettempdir()) <= LONGEST_TEMPORARY_PATH
        self.folder = tempfile.mkdtemp(prefix="slipstream-", dir=None if short else "/tmp")
        # Without shared memory, as in some containers, the weights are published in the run directory.
        usable = SHARED_MEMORY.is_dir() and os.access(SHARED_MEMORY, os.W_OK)
        self.memory = tempfile.mkdtemp(prefix="slipstream-", dir=SHARED_MEMORY) if usable else ""
        self.environment = {
            MARK: self.run_mark,
            "TMPDIR": self.folder,
            MEMORY_VARIABLE: self.memory,
            "TORCHINDUCTOR_CACHE_DIR": os.environ.get("TORCHINDUCTOR_CACHE_DIR", str(compiled)),
        }
        """Variables that every process of the run must inherit."""
        root = str(Path(__file__).resolve().parents[2])
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-S",
                "-m",
                "launch.processes.guardian",
                self.run_mark,
                str(grace_seconds),
                self.folder,
                self.memory,
            ],
            cwd=root,
            stdin=subprocess.PIPE,
            start_new_session=True,
        )

    def close(self) -> None:
        """Clean up after the run.

        Waits for: the guardian's end. Gives up after: the guardian's own grace period and killing time.
        """
        self._process.communicate()


def guard(run_mark: str, grace_seconds: float, *folders: str) -> None:
    """Wait for the end of the launcher and of the run's processes, kill those that are left, remove the folders."""
    # A signal to all of a user's processes reaches the launcher too; the guardian follows the launcher.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while os.read(sys.stdin.fileno(), 1 << 12):
        pass
    _await_learner(run_mark, grace_seconds)
    _end_buffer(run_mark)
    deadline = time.monotonic() + KILLING_SECONDS
    while time.monotonic() < deadline and (left := marked_processes(run_mark)):
        kill(left)
        time.sleep(TICK_SECONDS)
    for folder in filter(None, folders):
        shutil.rmtree(folder, ignore_errors=True)


def _await_learner(run_mark: str, grace_seconds: float) -> None:
    began, halted = time.monotonic(), HaltedProcesses()
    while left := _without_buffer(run_mark):
        now = time.monotonic()
        learner = {pid for pid, mark in left.items() if mark == f"{run_mark}.learner"}
        is_over = now - began >= grace_seconds or halted.longest(learner, now) >= HALTED_SECONDS
        if is_over or now - began >= OTHERS_SECONDS:
            kill(left if is_over else left.keys() - learner)
        if is_over:
            return
        time.sleep(WAIT_SECONDS)


def _without_buffer(run_mark: str) -> dict[int, str]:
    return {pid: mark for pid, mark in marked_processes(run_mark).items() if mark != f"{run_mark}.buffer"}


def _end_buffer(run_mark: str) -> None:
    for pid in marked_processes(f"{run_mark}.buffer"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + BUFFER_SECONDS
    while time.monotonic() < deadline and marked_processes(f"{run_mark}.buffer"):
        time.sleep(TICK_SECONDS)


if __name__ == "__main__":
    guard(sys.argv[1], float(sys.argv[2]), *sys.argv[3:])
