"""A power cut of the buffer: its process dies, and its files go back to what was on the disk.

The buffer of the measured run copies each of the ledger's files after every fsync of that file; `environment` makes it
do so. Whatever is written later is lost in a power cut, which is the worst that a real one may do.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import time
from collections.abc import Mapping
from contextlib import closing, suppress
from pathlib import Path

import psutil

IMAGES_VARIABLE = "SLIPSTREAM_CHAOS_IMAGES"
HOOK = Path(__file__).resolve().parent / "hook"
"""Folder on the measured processes' path whose `sitecustomize` records the fsyncs of the ledger's files."""


def environment(images: Path) -> Mapping[str, str]:
    """Return the variables that make the buffer keep the copies in `images`."""
    paths = [str(HOOK), os.environ.get("PYTHONPATH", "")]
    return {IMAGES_VARIABLE: str(images), "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def cut_power(launcher: int, buffer: psutil.Process, run_dir: Path, images: Path) -> None:
    """Kill the buffer and put the durable copies in the place of its files, before the launcher starts it again."""
    supervisor = psutil.Process(launcher)
    supervisor.suspend()
    try:
        buffer.kill()
        # The launcher is suspended, so the dead process stays a zombie.
        while buffer.is_running() and buffer.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        for suffix in ("", "-wal", "-shm"):
            file, image = run_dir / f"ledger.sqlite{suffix}", images / f"ledger.sqlite{suffix}"
            file.unlink(missing_ok=True)
            if image.exists():
                shutil.copyfile(image, file)
        _start_anew(run_dir / "ledger.sqlite", images)
    finally:
        supervisor.resume()


def _start_anew(ledger: Path, images: Path) -> None:
    """Make the ledger's next process see another start of its machine, as after every real power cut."""
    if not ledger.exists():
        return
    # Nothing of a ledger may have been on the disk yet, not even its tables.
    with suppress(sqlite3.OperationalError), closing(sqlite3.connect(ledger, isolation_level=None)) as db:
        db.execute("UPDATE meta SET value = 'before the power cut' WHERE key = 'boot'")
    # Closing has merged the log into the file and synced it, so that is on the disk now, and there is no log.
    for suffix in ("", "-wal"):
        file, image = Path(f"{ledger}{suffix}"), images / f"{ledger.name}{suffix}"
        image.unlink(missing_ok=True)
        if file.exists():
            shutil.copyfile(file, image)
