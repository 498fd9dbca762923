"""Memory that comes and goes is taken from the system once."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FAULTS = """
import resource, torch
{before}
def work():
    held = [torch.zeros(1 << 18) for _ in range(40)]
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
already = faults()
for _ in range(3):
    work()
print(faults() - already)
"""


def faults(before: str) -> int:
    """Pages that the same 40 MB took from the system, the second to the fourth time."""
    command = [sys.executable, "-c", FAULTS.format(before=before)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return int(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left alone")
def test_memory_that_is_freed_is_not_taken_from_the_system_again():
    kept = faults("from learner.heap import keep_freed_memory; keep_freed_memory()")
    assert 4 * kept < faults("")
