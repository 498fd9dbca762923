"""Outlives the launcher, however that ends, and removes whatever of the run is left: processes, sockets, memory.

The launcher holds a `Guardian`; the process behind it, `python -m launch.processes.guardian`, is started before
anything else and in a session of its own. It waits for: the end of its standard input, a pipe that only the launcher
holds, so that the kernel closes it even after kill -9. By then the others have been asked to stop, by the launcher or
by the kernel. Whoever is still there after the grace is killed, also when it is frozen.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

from buffer.weights.config import MEMORY_VARIABLE
from launch.processes.process_tree import MARK, kill, marked

SHARED_MEMORY = Path("/dev/shm")
TICK_SECONDS = 0.05
KILLING_SECONDS = 10.0
"""How long it takes at most until the kernel has buried everyone."""
LONGEST_TEMPORARY_PATH = 40
"""Sockets get names below the temporary folder, and the kernel allows 107 characters for all of it."""


class Guardian:
    """The launcher's hold on a run: its mark, its temporary folders, and the process that clears all away.

    Args:
        grace_seconds: how long the run may take to end after the launcher has been killed.
        compiled: folder for compiled kernels, which are worth keeping longer than a run.
    """

    def __init__(self, grace_seconds: float, compiled: Path) -> None:
        self.run_mark = uuid.uuid4().hex
        short = len(tempfile.gettempdir()) <= LONGEST_TEMPORARY_PATH
        self.folder = tempfile.mkdtemp(prefix="slipstream-", dir=None if short else "/tmp")
        # Some containers have no shared memory; versions of the weights then lie in the run directory.
        usable = SHARED_MEMORY.is_dir() and os.access(SHARED_MEMORY, os.W_OK)
        self.memory = tempfile.mkdtemp(prefix="slipstream-", dir=SHARED_MEMORY) if usable else ""
        self.environment = {
            MARK: self.run_mark,
            "TMPDIR": self.folder,
            MEMORY_VARIABLE: self.memory,
            "TORCHINDUCTOR_CACHE_DIR": os.environ.get("TORCHINDUCTOR_CACHE_DIR", str(compiled)),
        }
        """What every process of the run must inherit."""
        root = str(Path(__file__).resolve().parents[2])
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-S",
                "-m",
                "launch.processes.guardian",
                self.run_mark,
                str(grace_seconds),
                self.folder,
                self.memory,
            ],
            cwd=root,
            stdin=subprocess.PIPE,
            start_new_session=True,
        )

    def close(self) -> None:
        """The run is over. Waits for: the guardian to find nobody left. Gives up after: its own grace and killing."""
        self._process.communicate()


def guard(run_mark: str, grace_seconds: float, *folders: str) -> None:
    """Wait for the launcher's end, then for the run's, then clean up."""
    # Whoever ends all of a person's processes politely asks the launcher too, and that one decides.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while os.read(sys.stdin.fileno(), 1 << 12):
        pass
    deadline = time.monotonic() + grace_seconds
    while time.monotonic() < deadline and marked(run_mark):
        time.sleep(TICK_SECONDS)
    deadline = time.monotonic() + KILLING_SECONDS
    while time.monotonic() < deadline and (left := marked(run_mark)):
        kill(left)
        time.sleep(TICK_SECONDS)
    for folder in filter(None, folders):
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    guard(sys.argv[1], float(sys.argv[2]), *sys.argv[3:])
