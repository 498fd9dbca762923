"""Files and disks: makes files and their names survive a power cut, and tells a full disk from a broken one."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def has_no_space(error: OSError) -> bool:
    """Return whether a file could not be written because its disk, or its owner's quota, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


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
