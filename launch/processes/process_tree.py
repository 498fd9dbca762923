"""Finds all processes of a run by a mark in their environment, in whatever process group or session they are.

Child processes inherit the environment, so the mark finds vLLM's engines, torchrun's ranks and the verifier's workers
too. Standard library only, so that the guardian starts quickly.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Iterable
from pathlib import Path

MARK = "SLIPSTREAM_PROCESS"
"""Environment variable with the value RUN.NAME. Every launcher makes a new random RUN."""
HALTED_SECONDS = 5.0
"""At the end of a run, a learner that is halted for this long is not waited for: it writes no checkpoint."""
OTHERS_SECONDS = 5.0
"""At the end of a run, how long actors and relays may take to give back what they hold and to end."""
_MARKED = re.compile(rb"(?:^|\0)%s=([^\0]*)" % MARK.encode())
_SHARED_MEMORY = re.compile(r" (/dev/shm/[^/\s]+)$", re.MULTILINE)
"""Segments directly in /dev/shm. What lies in the run's own folder below it belongs to the learner or to a relay."""


def marked_processes(prefix: str) -> dict[int, str]:
    """Ids and marks of the living processes whose mark is `prefix` or begins with `prefix` and a dot."""
    found = {}
    for folder in Path("/proc").iterdir():
        # OSError: a process of another user, or one that has just ended.
        with contextlib.suppress(OSError):
            mark = _MARKED.search((folder / "environ").read_bytes()) if folder.name.isdigit() else None
            if mark is not None and f"{mark[1].decode(errors='replace')}.".startswith(f"{prefix}."):
                found[int(folder.name)] = mark[1].decode(errors="replace")
    return found


def is_stopped(pid: int) -> bool:
    """Whether a process is halted by SIGSTOP; a process under a debugger does not count."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return False
    # The process name before it may contain spaces and brackets.
    return stat.rpartition(")")[2].split()[0] == "T"


class HaltedProcesses:
    """Remembers since when processes are halted. Call `longest` every second or so, always with the same processes."""

    def __init__(self) -> None:
        self._since: dict[int, float] = {}

    def longest(self, pids: Iterable[int], now: float) -> float:
        """How long the process that has been halted longest has been so, in seconds; 0.0 if none is halted."""
        self._since = {pid: self._since.get(pid, now) for pid in pids if is_stopped(pid)}
        return max((now - since for since in self._since.values()), default=0.0)


def kill(pids: Iterable[int]) -> None:
    """Send SIGKILL, which also ends halted processes, and remove the shared memory that only they used.

    A segment that another living process has mapped stays, because it may be that process's own: an actor maps the
    learner's weights. Nothing in a folder below /dev/shm is removed; the guardian removes the run's folder.

    Resource trackers of Python's multiprocessing are not killed. A tracker removes the shared objects of dead processes
    and ends by itself when no process uses it any more.
    """
    pids = list(pids)
    # Before the signal: a process that is ending no longer says what it has mapped.
    shared = {path for pid in pids for path in _shared_memory(pid)}
    if shared:
        others = {int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdigit()} - set(pids)
        shared -= {path for pid in others for path in _shared_memory(pid)}
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT if _is_tracker(pid) else signal.SIGKILL)
    for path in shared:
        path.unlink(missing_ok=True)


def _is_tracker(pid: int) -> bool:
    try:
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _shared_memory(pid: int) -> set[Path]:
    """Named segments that a process has mapped. The kernel frees unlinked ones when the process ends."""
    try:
        mapped = Path(f"/proc/{pid}/maps").read_text(errors="replace")
    except OSError:
        return set()
    return {Path(name) for name in _SHARED_MEMORY.findall(mapped)}
