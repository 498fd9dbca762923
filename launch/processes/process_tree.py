"""The processes of a run, known by a mark in their environment, whatever group or session they put themselves in.

A process hands its environment to all it starts, so the mark finds vLLM's engines, torchrun's ranks and the verifier's
workers too. Standard library only: the guardian starts with it in a moment.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Iterable
from pathlib import Path

MARK = "SLIPSTREAM_PROCESS"
"""Environment variable that holds RUN.NAME, where RUN is drawn anew by every launcher."""
_MARKED = re.compile(rb"(?:^|\0)%s=([^\0]*)" % MARK.encode())
_SHARED_MEMORY = re.compile(r" (/dev/shm/\S+)$", re.MULTILINE)


def marked(prefix: str) -> dict[int, str]:
    """Living processes by id, with their mark: those whose mark is `prefix`, or goes on with a dot after it."""
    found = {}
    for folder in Path("/proc").iterdir():
        # Other users' processes cannot be read, and any may end meanwhile.
        with contextlib.suppress(OSError):
            mark = _MARKED.search((folder / "environ").read_bytes()) if folder.name.isdigit() else None
            if mark is not None and f"{mark[1].decode(errors='replace')}.".startswith(f"{prefix}."):
                found[int(folder.name)] = mark[1].decode(errors="replace")
    return found


def is_stopped(pid: int) -> bool:
    """Whether a process was halted by SIGSTOP; one under a debugger is not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return False
    # The name before it may hold anything, even spaces and brackets.
    return stat.rpartition(")")[2].split()[0] == "T"


def kill(pids: Iterable[int]) -> None:
    """SIGKILL, which also ends what is halted, and remove the shared memory they could not remove themselves.

    Spared are the resource trackers of Python's multiprocessing: they end by themselves once nobody is left who shares
    anything, and remove what the dead have shared.
    """
    pids = list(pids)
    shared = {path for pid in pids for path in _shared_memory(pid)}
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
    """Named segments that a process has mapped; those without a name any more end with it."""
    try:
        mapped = Path(f"/proc/{pid}/maps").read_text(errors="replace")
    except OSError:
        return set()
    return {Path(name) for name in _SHARED_MEMORY.findall(mapped)}
