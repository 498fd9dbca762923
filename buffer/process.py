"""Start and end of an actor or learner process: garbage collection during imports, exit without waiting for threads.

Called by the entry points `actors/__main__.py` and `learner/__main__.py`.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
from typing import NoReturn


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
