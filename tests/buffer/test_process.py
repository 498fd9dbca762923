"""Garbage collection is off during startup, and never scans the objects of startup afterwards."""

import subprocess
import sys


def test_objects_made_during_startup_are_never_scanned_again() -> None:
    # In a process of its own, because a process has only one garbage collector.
    program = """
import gc
from buffer.process import pause_gc, resume_gc
pause_gc()
assert not gc.isenabled()
kept = [[] for _ in range(10_000)]
resume_gc()
assert gc.isenabled() and gc.get_freeze_count() > 10_000
assert not any(item is kept for item in gc.get_objects())
loop = []
loop.append(loop)
del loop
assert gc.collect()
"""
    subprocess.run([sys.executable, "-c", program], check=True)
