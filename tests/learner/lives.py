"""`python tests/learner/lives.py RUN_DIR SOCKETS MODEL TOTAL_STEPS` runs learner processes that kill themselves.

For each line on standard input this process, which has imported everything already, forks one learner (a *life*). With
`FILE NUMBER` the learner kills itself with SIGKILL after it has executed NUMBER lines of learner/FILE; with `. 0` it
trains to the end. Its exit status, negative for a signal, is printed. The log is RUN_DIR/learner.log.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import learner
from learner.algorithms.ppo import PPO
from learner.distributed.deepspeed_engine import init_distributed
from tests.learner.samples import CPU
from tests.learner.scripted_run import learn

PACKAGE = Path(learner.__file__).parent
LONGEST_LIFE_SECONDS = 120


def die_after(file: str, number: int) -> None:
    """Kill this process after `number` executed lines of one of the learner's files, in all threads started later."""
    wanted, executed = str(PACKAGE / file), 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal executed
        if frame.f_code.co_filename != wanted:
            return None
        if event == "line":
            executed += 1
            if executed == number:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    threading.settrace(trace)
    sys.settrace(trace)


def live(run_dir: Path, sockets: Path, folder: Path, total_steps: int, file: str, number: int) -> None:
    """One life; runs in a forked process."""
    signal.alarm(LONGEST_LIFE_SECONDS)
    logging.basicConfig(level=logging.INFO, format="%(message)s", filename=run_dir / "learner.log")
    torch.set_num_threads(1)
    if number:
        die_after(file, number)
    init_distributed(CPU)
    learn(run_dir, sockets, folder, PPO(), total_steps, stopping=threading.Event(), checkpoint_every=2)


def main(run_dir: Path, sockets: Path, folder: Path, total_steps: int) -> None:
    """Run one life per line of standard input."""
    for line in sys.stdin:
        file, number = line.split()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                live(run_dir, sockets, folder, total_steps, file, int(number))
                status = 0
            finally:
                os._exit(status)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:4]), int(sys.argv[4]))
