"""Makes files and their names survive a power cut. The ledger and the learner's checkpoints use it."""

from __future__ import annotations

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Wait until everything written to the file is on the disk; for a folder: the names in it.

    Raises:
        OSError: when the path cannot be opened or synced.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
