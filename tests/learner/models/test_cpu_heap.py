"""Memory that is freed and allocated again is taken from the system once, in huge pages."""

import os
import platform
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from learner.models.cpu_heap import heap_environment

WORK = """
import re, resource, torch
def work():
    held = [torch.zeros(1 << 18) for _ in range(40)]
    return re.search(r"AnonHugePages: *([0-9]+)", open("/proc/self/smaps_rollup").read())[1]
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
already = faults()
for _ in range(3):
    huge = work()
print(faults() - already, huge)
"""
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left alone")


def faults_and_huge_pages(environment: dict[str, str]) -> tuple[int, int]:
    """Pages that allocations 2 to 4 of the same 40 MB took from the system, and KiB in huge pages."""
    return measured(tuple(environment.items()))


@cache
def measured(environment: tuple[tuple[str, str], ...]) -> tuple[int, int]:
    without = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    command = [sys.executable, "-c", WORK]
    said = subprocess.run(command, env=without | dict(environment), check=True, capture_output=True, text=True).stdout
    faults, huge = map(int, said.split())
    return faults, huge


def test_memory_that_is_freed_is_not_taken_from_the_system_again():
    kept, _ = faults_and_huge_pages(heap_environment())
    taken, _ = faults_and_huge_pages({})
    assert 4 * kept < taken


@pytest.mark.skipif(
    not HUGE_PAGES.exists() or "[never]" in HUGE_PAGES.read_text(), reason="this system gives nobody huge pages"
)
def test_most_of_it_is_in_huge_pages():
    assert faults_and_huge_pages(heap_environment())[1] > 30_000


def test_what_the_user_has_set_comes_last_and_wins(monkeypatch: pytest.MonkeyPatch):
    kept, _ = faults_and_huge_pages(heap_environment())
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0:glibc.malloc.trim_threshold=0")
    taken, _ = faults_and_huge_pages(heap_environment())
    assert 4 * kept < taken
