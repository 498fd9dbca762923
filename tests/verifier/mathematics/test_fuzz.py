"""Fuzzes the judge for some seconds; `python -m tests.verifier.mathematics.fuzz` does it for longer.

FUZZ_SEED repeats a run that failed.
"""

import os
import random

from tests.verifier.mathematics.fuzz import DEADLINE_SECONDS, fuzz

SEED = int(os.environ.get("FUZZ_SEED") or random.SystemRandom().randrange(1 << 32))


def test_hostile_answers_neither_raise_nor_hang_nor_eat_memory():
    report = fuzz(SEED, 5.0)
    assert report.num_pairs > 200, report
    assert report.slowest_seconds < DEADLINE_SECONDS, report
    assert report.peak_bytes < 1 << 29, report
