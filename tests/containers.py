"""Runs test commands with two properties of a container, where the machine allows it: cgroup limits, small /dev/shm."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

CGROUPS = Path("/sys/fs/cgroup")
ENTER = 'for group in $GROUPS_TO_ENTER; do echo $$ > "$group/cgroup.procs" || exit 99; done; exec "$@"'


@contextmanager
def limited(cpu: float | None = None, memory_bytes: int | None = None) -> Iterator[list[str]]:
    """Gives a prefix for a command that makes it run in a new cgroup. Skips the test when no cgroup can be made.

    Args:
        cpu: limit of processor time, in cores; None: no limit.
        memory_bytes: limit of the memory of all processes in the cgroup together; None: no limit.
    """
    name, period = f"slipstream-test-{os.getpid()}", 100_000
    wanted = {
        "cpu": cpu and {"cpu.cfs_quota_us": f"{int(cpu * period)}", "cpu.max": f"{int(cpu * period)} {period}"},
        "memory": memory_bytes and {"memory.limit_in_bytes": f"{memory_bytes}", "memory.max": f"{memory_bytes}"},
    }
    folders: set[Path] = set()
    try:
        for controller, settings in wanted.items():
            if not settings:
                continue
            # cgroup v1 has a folder per controller, v2 one folder for all.
            folder = (CGROUPS / controller if (CGROUPS / controller).is_dir() else CGROUPS) / name
            try:
                folder.mkdir(exist_ok=True)
                folders.add(folder)
                file, value = next((file, value) for file, value in settings.items() if (folder / file).exists())
                (folder / file).write_text(value)
            except (OSError, StopIteration) as error:
                pytest.skip(f"no cgroup with a limit of {controller} can be made here: {error!r}")
        entering = f"GROUPS_TO_ENTER={' '.join(map(str, folders))}"
        yield ["env", entering, "sh", "-c", ENTER, "sh"]
    finally:
        for folder in folders:
            # A cgroup cannot be removed while a process of a failed test runs in it.
            with suppress(OSError):
                folder.rmdir()


def with_shared_memory(num_bytes: int) -> list[str]:
    """Returns a prefix for a command that gives it a /dev/shm of this size. Skips the test when none can be mounted."""
    prefix = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs -o size={num_bytes} tmpfs /dev/shm && exec "$@"', "sh"]
    if shutil.which("unshare") is None:
        pytest.skip("no unshare here to give a process another /dev/shm")
    tried = subprocess.run([*prefix, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"no other /dev/shm can be mounted here: {tried.stderr.strip()}")
    return prefix


def run(command: Sequence[str]) -> str:
    """Runs a command that must succeed; returns its output."""
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
