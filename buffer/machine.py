"""The cores and the memory that this process may use, within the limits of its container.

A process in a container sees all cores and all memory of the host, but its cgroup limits both. A process that relies on
the host's numbers starts too many threads and is killed for exceeding the memory limit. Versions 1 and 2 of cgroups are
supported, and every level of the hierarchy is read, because a limit applies to all cgroups below it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

MACHINE = Path("/")
THREADS_VARIABLE = "OMP_NUM_THREADS"
"""Environment variable with the number of threads of OpenMP, MKL and OpenBLAS, which read it when imported."""
_MEMORY_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""For cgroup v2 and v1: file of the limit, file of the usage, and line of memory.stat with the droppable bytes."""


def num_usable_cores(root: Path = MACHINE) -> int:
    """Return the number of threads that can run at once: the cores of the affinity mask, at most the CPU quota.

    A quota of 2.5 cores counts as two. With a third thread the quota would run out before the end of each period, and
    all threads would stop until the next one. A quota below one core counts as one.

    Args:
        root: the folder used as `/`; for tests.
    """
    cores = len(os.sched_getaffinity(0))
    quotas = [quota for group in _groups("cpu", root) if (quota := _cpu_quota(group)) is not None]
    return max(1, min([cores, *map(int, quotas)]))


def available_memory_bytes(root: Path = MACHINE) -> int:
    """Return the bytes that can be allocated without swapping and without exceeding the container's limit.

    Args:
        root: as in `num_usable_cores`.
    """
    left = [_left_bytes(group) for group in _groups("memory", root)]
    return max(0, min([_host_bytes(root), *(num_bytes for num_bytes in left if num_bytes is not None)]))


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """Yield the folders of the cgroups that limit this process: its own, then all visible ones above."""
    paths = [line.split(":", 2) for line in _lines(root / "proc/self/cgroup")]
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        mounted, mount_point = (_unescaped(field) for field in before.split()[3:5])
        kind, *options = after.replace(",", " ").split()
        for _, controllers, path in paths:
            # The entry of v2 names no controllers, because its single hierarchy has all of them.
            is_v2 = kind == "cgroup2" and not controllers
            is_v1 = kind == "cgroup" and controller in controllers.split(",") and controller in options
            if is_v2 or is_v1:
                yield from _upward(root / mount_point.lstrip("/"), mounted, path)


def _upward(top: Path, mounted: str, path: str) -> Iterator[Path]:
    """Yield the folders from the cgroup `path` up to `top`, the mount point of the cgroup `mounted`.

    In a container `path` may be a path of the host that does not exist here. `top` is then the container's own cgroup.
    """
    below = os.path.relpath(path, mounted)
    folder = top if below.startswith("..") else top / below
    while folder != top:
        yield folder
        folder = folder.parent
    yield top


def _cpu_quota(group: Path) -> float | None:
    """Return the cgroup's CPU quota in cores; None: no limit."""
    for words in (
        [word for line in _lines(group / "cpu.max") for word in line.split()],
        [*_lines(group / "cpu.cfs_quota_us"), *_lines(group / "cpu.cfs_period_us")],
    ):
        if len(words) == 2 and words[0] not in ("max", "-1"):
            return int(words[0]) / int(words[1])
    return None


def _left_bytes(group: Path) -> int | None:
    """Return the bytes that the cgroup may still allocate; None: no limit. Inactive file cache counts as free."""
    for limit, usage, droppable in _MEMORY_FILES:
        limited, used = _lines(group / limit), _lines(group / usage)
        if limited and used and limited[0] != "max":
            return int(limited[0]) - int(used[0]) + _field(group / "memory.stat", droppable)
    return None


def _host_bytes(root: Path) -> int:
    return _field(root / "proc/meminfo", "MemAvailable:") * 1024


def _field(path: Path, name: str) -> int:
    """Return the number after `name` in a file with a name and a number per line; 0 without such a line."""
    return next((int(words[1]) for line in _lines(path) if (words := line.split())[:1] == [name]), 0)


def _lines(path: Path) -> list[str]:
    """Return the file's lines; none when the file is absent or unreadable, which means that there is no limit."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _unescaped(field: str) -> str:
    """Decode a path of /proc/self/mountinfo, which has spaces as octal escapes."""
    return re.sub(r"\\([0-7]{3})", lambda number: chr(int(number[1], 8)), field)
