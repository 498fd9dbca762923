"""Start and end of a process and of its threads.

Garbage collection is paused during imports, a process exits without waiting for library threads, and a thread that dies
ends its process. Every thread of buffer, actors and learner is started by `start_thread`; the work of a
`ThreadPoolExecutor` reports its errors through futures, which somebody must read.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

log = logging.getLogger(__name__)

REPLACED = 4
"""Exit status of an actor whose name a newer process took over."""


def pause_gc() -> None:
    """Disable the garbage collector while heavy libraries are imported.

    The collector would scan all imported objects again and again; with vLLM that is a quarter of the import time. Call
    `resume_gc` when startup is complete. A startup that fails ends the process and need not call it.
    """
    gc.disable()


def resume_gc() -> None:
    """Enable the garbage collector again. Objects that exist at this point are never scanned again."""
    gc.freeze()
    gc.enable()


def exit_now(status: int) -> NoReturn:
    """Exit without waiting for library threads.

    Threads of gloo, or of a hanging engine, may abort the interpreter's teardown; a successful run would then count as
    failed. Log handlers and the standard streams are flushed first.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def start_thread(name: str, function: Callable[[], None]) -> threading.Thread:
    """Run `function` in a new daemon thread. An exception in it ends the process at once, with status 1.

    Others wait for what the thread does, and would wait for ever. The supervisor restarts the process; its log has the
    thread's name and the traceback.
    """

    def run() -> None:
        try:
            function()
        except BaseException:
            log.critical("the thread %s failed, so this process ends", name, exc_info=True)
            exit_now(1)

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    return thread
