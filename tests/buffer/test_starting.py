"""The collector is off while a process starts, and leaves what was made then alone afterwards."""

import subprocess
import sys


def test_what_was_made_at_the_start_is_not_looked_through_again() -> None:
    # In a process of its own: the collector is everybody's.
    program = """
import gc
from buffer import starting
starting.begin()
assert not gc.isenabled()
kept = [[] for _ in range(10_000)]
starting.done()
assert gc.isenabled() and gc.get_freeze_count() > 10_000
assert not any(item is kept for item in gc.get_objects())
loop = []
loop.append(loop)
del loop
assert gc.collect()
"""
    subprocess.run([sys.executable, "-c", program], check=True)
