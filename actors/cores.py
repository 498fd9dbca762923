"""Which cores a process keeps to."""

from __future__ import annotations

import os
from collections.abc import Sequence

import psutil


def keep_on(process: psutil.Process, cores: Sequence[int]) -> None:
    """Keep every thread that `process` has by now on `cores`; those that start later inherit them."""
    for thread in process.threads():
        try:
            os.sched_setaffinity(thread.id, cores)
        except ProcessLookupError:
            continue  # A thread that has ended needs no core.
