"""Cores and memory in fake trees of /proc and /sys/fs/cgroup, and in a real cgroup if one can be created."""

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from buffer.machine import available_memory_bytes, num_usable_cores
from tests.containers import limited, run

ROOT = Path(__file__).parents[2]
GIB = 1 << 30
NO_LIMIT = 9223372036854771712
"""The limit that cgroup v1 reports when there is none."""
V2 = "41 31 0:38 {mounted} /sys/fs/cgroup rw,relatime - cgroup2 cgroup2 rw"
V1_CPU = "32 31 0:29 {mounted} /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct"
V1_MEMORY = "35 31 0:32 {mounted} /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory"
OTHERS = (
    "23 1 254:0 / / rw,relatime - ext4 /dev/root rw\n34 31 0:31 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset"
)

MakeTree = Callable[..., Path]


@pytest.fixture(autouse=True)
def sixty_four_cores(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))


@pytest.fixture
def tree(tmp_path: Path) -> MakeTree:
    """A machine with 64 GiB, 60 of them available, and these cgroups."""

    def make(groups: str, mounts: str, files: Mapping[str, object], available: int = 60 * GIB) -> Path:
        everything = {
            "proc/self/cgroup": groups,
            "proc/self/mountinfo": f"{OTHERS}\n{mounts}",
            "proc/meminfo": f"MemTotal: {64 << 20} kB\nMemFree: 9 kB\nMemAvailable: {available >> 10} kB",
            **{f"sys/fs/cgroup/{name}": contents for name, contents in files.items()},
        }
        for name, contents in everything.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{contents}\n")
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("groups", "mounted", "files", "cores"),
    [
        ("0::/", "/", {}, 64),
        ("0::/", "/", {"cpu.max": "max 100000"}, 64),
        # A container with a namespace of its own sees its cgroup as the root.
        ("0::/", "/", {"cpu.max": "200000 100000"}, 2),
        ("0::/", "/", {"cpu.max": "250000 100000"}, 2),
        ("0::/", "/", {"cpu.max": "25000 50000"}, 1),
        ("0::/", "/", {"cpu.max": "9900000 100000"}, 64),
        # Limits of parent cgroups apply; limits of siblings do not.
        (
            "0::/a/b",
            "/",
            {"a/b/cpu.max": "max 100000", "a/cpu.max": "300000 100000", "a/c/cpu.max": "100000 100000"},
            3,
        ),
        ("0::/a/b", "/", {"a/b/cpu.max": "200000 100000", "a/cpu.max": "300000 100000"}, 2),
        ("0::/a/b", "/", {"a/b/cpu.max": "400000 100000", "a/cpu.max": "max 100000", "cpu.max": "500000 100000"}, 4),
        # Without a namespace only the container's part of the tree is mounted, or its path does not exist.
        ("0::/docker/c1", "/docker/c1", {"cpu.max": "200000 100000"}, 2),
        ("0::/docker/c1/x", "/docker/c1", {"cpu.max": "max 100000", "x/cpu.max": "200000 100000"}, 2),
        ("0::/docker/c1", "/", {"cpu.max": "200000 100000"}, 2),
        ("0::/../other", "/", {"cpu.max": "200000 100000"}, 2),
        ("0::/docker/c2", "/docker/c1", {"cpu.max": "200000 100000", "../c2/cpu.max": "100000 100000"}, 2),
    ],
)
def test_a_quota_of_version_2_limits_the_cores(
    tree: MakeTree, groups: str, mounted: str, files: Mapping[str, str], cores: int
):
    assert num_usable_cores(tree(groups, V2.format(mounted=mounted), files)) == cores


def v1_quota(folder: str, quota: int) -> dict[str, object]:
    return {f"cpu,cpuacct/{folder}cpu.cfs_quota_us": quota, f"cpu,cpuacct/{folder}cpu.cfs_period_us": 100_000}


@pytest.mark.parametrize(
    ("path", "mounted", "files", "cores"),
    [
        ("/", "/", v1_quota("", -1), 64),
        ("/", "/", v1_quota("", 200_000), 2),
        ("/a/b", "/", v1_quota("a/b/", -1) | v1_quota("a/", 350_000), 3),
        ("/docker/c1", "/docker/c1", v1_quota("", 200_000), 2),
        # The file of a controller that does not apply.
        ("/a", "/", {"cpuset/a/cpu.cfs_quota_us": 100_000, "cpuset/a/cpu.cfs_period_us": 100_000}, 64),
    ],
)
def test_a_quota_of_version_1_limits_the_cores(
    tree: MakeTree, path: str, mounted: str, files: Mapping[str, object], cores: int
):
    # The last entry is a hierarchy of cgroup v2 without controllers.
    groups = f"9:cpuset:{path}\n4:cpu,cpuacct:{path}\n1:name=systemd:/\n0::/"
    mounts = f"{V1_CPU.format(mounted=mounted)}\n{V2.format(mounted='/').replace('cgroup rw', 'cgroup/unified rw', 1)}"
    assert num_usable_cores(tree(groups, mounts, files)) == cores


def test_a_mask_smaller_than_the_quota_counts(tree: MakeTree, monkeypatch: pytest.MonkeyPatch):
    root = tree("0::/", V2.format(mounted="/"), {"cpu.max": "400000 100000"})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5, 9})
    assert num_usable_cores(root) == 2


def test_a_mount_point_may_have_a_space(tree: MakeTree):
    mount = V2.format(mounted="/").replace("/sys/fs/cgroup", r"/sys/fs/cgroup/the\040groups")
    assert num_usable_cores(tree("0::/", mount, {"the groups/cpu.max": "200000 100000"})) == 2


def test_without_cgroups_the_machine_is_all_there_is(tmp_path: Path):
    assert num_usable_cores(tmp_path) == 64
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 2000 kB\nMemAvailable: 1000 kB\n")
    assert available_memory_bytes(tmp_path) == 1000 << 10


def memory(folder: str, limit: object, usage: int, inactive: int = 0) -> dict[str, object]:
    """The memory files of a cgroup v2."""
    return {
        f"{folder}memory.max": limit,
        f"{folder}memory.current": usage,
        f"{folder}memory.stat": f"anon 1\ninactive_file {inactive}\nactive_file 7",
    }


@pytest.mark.parametrize(
    ("path", "files", "available"),
    [
        ("/", {}, 60 * GIB),
        ("/", memory("", "max", 3 * GIB), 60 * GIB),
        ("/", memory("", 4 * GIB, GIB), 3 * GIB),
        # Inactive file cache counts as free.
        ("/", memory("", 4 * GIB, 4 * GIB, 3 * GIB), 3 * GIB),
        ("/", memory("", 4 * GIB, 5 * GIB), 0),
        ("/", memory("", 100 * GIB, GIB), 60 * GIB),
        ("/a/b", memory("a/b/", "max", GIB) | memory("a/", 4 * GIB, 2 * GIB), 2 * GIB),
        ("/a/b", memory("a/b/", 8 * GIB, GIB) | memory("a/", 32 * GIB, 30 * GIB), 2 * GIB),
        ("/a/b", memory("a/b/", 2 * GIB, GIB) | memory("a/", 32 * GIB, 3 * GIB) | memory("a/c/", 1, 1), GIB),
    ],
)
def test_a_limit_of_version_2_counts_for_memory(tree: MakeTree, path: str, files: Mapping[str, object], available: int):
    assert available_memory_bytes(tree(f"0::{path}", V2.format(mounted="/"), files)) == available


@pytest.mark.parametrize(
    ("limit", "usage", "inactive", "available"),
    [(NO_LIMIT, 3 * GIB, GIB, 60 * GIB), (4 * GIB, 3 * GIB, 0, GIB), (4 * GIB, 4 * GIB, GIB, GIB)],
)
def test_a_limit_of_version_1_counts_for_memory(tree: MakeTree, limit: int, usage: int, inactive: int, available: int):
    # The line without `total_` leaves out the child cgroups.
    stat = f"inactive_file 0\ntotal_inactive_file {inactive}"
    names = {"limit_in_bytes": limit, "usage_in_bytes": usage, "stat": stat}
    files = {f"memory/docker/c1/memory.{name}": value for name, value in names.items()}
    root = tree("5:memory:/docker/c1\n0::/", V1_MEMORY.format(mounted="/"), files)
    assert available_memory_bytes(root) == available


def asked(question: str, *inside: str) -> int:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from buffer.machine import *; print({question})"
    return int(run([*inside, sys.executable, "-c", code]))


def test_a_real_quota_is_read():
    with limited(cpu=1.0) as inside:
        assert asked("num_usable_cores()", *inside) == 1


def test_a_real_limit_of_memory_is_read():
    limit = GIB // 4
    assert asked("available_memory_bytes()") > limit
    with limited(memory_bytes=limit) as inside:
        assert limit // 2 < asked("available_memory_bytes()", *inside) <= limit
