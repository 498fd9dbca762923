"""Ties the engine's worker processes to their actor: vLLM's processes would outlive an actor that was killed.

The actor names itself in the environment before it starts an engine; a worker, which imports this through
`actors/weights/vllm_loader.py`, then ends with it. An engine whose workers are other processes ends when it finds them
dead.
"""

from __future__ import annotations

import os
import select
import signal
import threading

ACTOR_PID = "SLIPSTREAM_ACTOR_PID"


def name_actor() -> None:
    """Call in the actor, before its engine is started."""
    os.environ[ACTOR_PID] = str(os.getpid())


def end_with_actor() -> None:
    """Call in a worker; does nothing in the actor itself, and where no actor is named."""
    pid = int(os.environ.get(ACTOR_PID, os.getpid()))
    if pid != os.getpid():
        threading.Thread(target=_wait_and_end, args=(pid,), name="watch-actor", daemon=True).start()


def _wait_and_end(pid: int) -> None:
    try:
        poller = select.poll()
        poller.register(os.pidfd_open(pid), select.POLLIN)
        poller.poll()
    except ProcessLookupError:
        pass  # It ended before it could be watched.
    os.kill(os.getpid(), signal.SIGKILL)
