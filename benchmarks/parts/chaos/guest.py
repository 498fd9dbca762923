"""An actor that is started by hand beside those of the launcher, as on another node, and started anew when it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from launch.processes.process_tree import MARK

ROOT = Path(__file__).resolve().parents[3]
NAME = "guest"


class Guest:
    """The processes named `guest`: one, or two of which the older has to give way.

    Args:
        run_dir: of the run.
        log: file that all of them append to.
    """

    def __init__(self, run_dir: Path, log: Path) -> None:
        self._run_dir, self._log = run_dir, log
        self._processes: list[subprocess.Popen[bytes]] = []
        self.num_replaced = 0
        """Processes that ended by themselves because a newer one had taken their name."""

    @property
    def processes(self) -> list[psutil.Process]:
        """The living ones, oldest first."""
        return [psutil.Process(process.pid) for process in self._processes if process.poll() is None]

    def step(self) -> None:
        """Count those that have given way, and start one when none is left."""
        for process in [process for process in self._processes if process.poll() is not None]:
            self._processes.remove(process)
            if process.returncode > 0 and self._processes:
                self.num_replaced += 1
        if not self._processes:
            self.start()

    def start(self) -> None:
        """Start another process of the same name."""
        environment = {name: value for name, value in os.environ.items() if name != MARK}
        environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, "-m", "actors", str(self._run_dir), "--name", NAME]
        with self._log.open("ab") as log:
            self._processes.append(
                subprocess.Popen(
                    command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
                )
            )

    def end(self) -> None:
        """End all of them."""
        for process in self._processes:
            process.send_signal(signal.SIGCONT)
            process.terminate()
        for process in self._processes:
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
