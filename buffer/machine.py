"""Cores and memory that this process may use: those of the machine, or of its container where that has less.

A container (a cgroup) sees the cores and the memory of the whole host and is held to a quota of both. A process that
counts the host's starts too many threads and is killed for too much memory. Both versions of cgroups are read, and
every level of the hierarchy counts: a limit further up holds for all below it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

MACHINE = Path("/")
THREADS_VARIABLE = "OMP_NUM_THREADS"
"""In a process's environment: the threads of OpenMP, MKL and OpenBLAS, which read it when they are imported."""
_MEMORY_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Limit, usage, and the line of memory.stat with what the kernel drops first: of cgroup v2 and of v1."""


def num_usable_cores(root: Path = MACHINE) -> int:
    """How many threads can run at the same time: cores of the affinity mask, at most the CPU quota.

    A quota of 2.5 cores counts as two. A third thread would use it up before each period ends, and then all threads
    stand still until the next one. Below one core it is still one thread.

    Args:
        root: what stands for `/`; a test brings its own.
    """
    cores = len(os.sched_getaffinity(0))
    quotas = [quota for group in _groups("cpu", root) if (quota := _cpu_quota(group)) is not None]
    return max(1, min([cores, *map(int, quotas)]))


def available_memory_bytes(root: Path = MACHINE) -> int:
    """What can be taken without swapping and without exceeding the container's limit.

    Args:
        root: as in `num_usable_cores`.
    """
    left = [_left_bytes(group) for group in _groups("memory", root)]
    return max(0, min([_host_bytes(root), *(num_bytes for num_bytes in left if num_bytes is not None)]))


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """The folders of the cgroups that limit this process, its own first, then those above it that can be seen."""
    paths = [line.split(":", 2) for line in _lines(root / "proc/self/cgroup")]
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        mounted, mount_point = (_unescaped(field) for field in before.split()[3:5])
        kind, *options = after.replace(",", " ").split()
        for _, controllers, path in paths:
            # An entry without controllers is that of v2, where one hierarchy has them all.
            is_v2 = kind == "cgroup2" and not controllers
            is_v1 = kind == "cgroup" and controller in controllers.split(",") and controller in options
            if is_v2 or is_v1:
                yield from _upward(root / mount_point.lstrip("/"), mounted, path)


def _upward(top: Path, mounted: str, path: str) -> Iterator[Path]:
    """From the cgroup `path` up to `top`, where the cgroup `mounted` is mounted.

    In a container `path` may be that of the host, which leads nowhere here; `top` then is the container's own cgroup.
    """
    below = os.path.relpath(path, mounted)
    folder = top if below.startswith("..") else top / below
    while folder != top:
        yield folder
        folder = folder.parent
    yield top


def _cpu_quota(group: Path) -> float | None:
    """Cores' worth of time that the cgroup gets; None: no limit."""
    for words in (
        [word for line in _lines(group / "cpu.max") for word in line.split()],
        [*_lines(group / "cpu.cfs_quota_us"), *_lines(group / "cpu.cfs_period_us")],
    ):
        if len(words) == 2 and words[0] not in ("max", "-1"):
            return int(words[0]) / int(words[1])
    return None


def _left_bytes(group: Path) -> int | None:
    """What the cgroup may still take; None: no limit. Files read long ago make room when it is needed."""
    for limit, usage, droppable in _MEMORY_FILES:
        limited, used = _lines(group / limit), _lines(group / usage)
        if limited and used and limited[0] != "max":
            return int(limited[0]) - int(used[0]) + _field(group / "memory.stat", droppable)
    return None


def _host_bytes(root: Path) -> int:
    return _field(root / "proc/meminfo", "MemAvailable:") * 1024


def _field(path: Path, name: str) -> int:
    """The number behind `name` in a file of one name and number per line; 0 where there is none."""
    return next((int(words[1]) for line in _lines(path) if (words := line.split())[:1] == [name]), 0)


def _lines(path: Path) -> list[str]:
    """Nothing where the file is not there or may not be read: then there is no limit to be read from it."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _unescaped(field: str) -> str:
    """A path of /proc/self/mountinfo, where a space is written as its octal number."""
    return re.sub(r"\\([0-7]{3})", lambda number: chr(int(number[1], 8)), field)
