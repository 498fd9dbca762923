"""Ends vLLM's worker processes with their actor, because they would outlive an actor that was killed.

The actor writes its process id to the environment before it starts an engine (`name_actor`). Each worker waits for the
end of that process in a thread, and then ends itself (`end_with_actor`, called by `actors/weights/vllm_worker.py`). An
engine with workers in other processes ends when it finds them dead.
"""

from __future__ import annotations

import os
import select
import signal
from functools import partial

from buffer.process import start_thread

ACTOR_PID = "SLIPSTREAM_ACTOR_PID"


def name_actor() -> None:
    """Write this process's id to the environment. Call in the actor before its engine starts."""
    os.environ[ACTOR_PID] = str(os.getpid())


def end_with_actor() -> None:
    """Kill this process when its actor ends. Does nothing in the actor itself, or when the environment names none."""
    pid = int(os.environ.get(ACTOR_PID, os.getpid()))
    if pid != os.getpid():
        start_thread("watch-actor", partial(_wait_and_end, pid))


def _wait_and_end(pid: int) -> None:
    try:
        poller = select.poll()
        poller.register(os.pidfd_open(pid), select.POLLIN)
        poller.poll()
    except ProcessLookupError:
        pass  # The actor ended before this thread could watch it.
    os.kill(os.getpid(), signal.SIGKILL)
