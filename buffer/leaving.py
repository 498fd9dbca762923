"""How a process ends in which threads of a library have run."""

from __future__ import annotations

import logging
import os
import sys
from typing import NoReturn


def leave(status: int) -> NoReturn:
    """End this process without tearing the interpreter down.

    Threads of gloo, or of an engine that hangs, may abort a teardown, and a run that has ended well would count as
    failed.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
