"""How a process starts that imports a large library: without the garbage collector.

It would look through everything that was imported so far again and again, for a quarter of the time that importing vLLM
takes, and now and then for as long as the process lasts.
"""

from __future__ import annotations

import gc


def begin() -> None:
    """Before the imports. A start that fails ends the process, so nobody needs to call `done` then."""
    gc.disable()


def done() -> None:
    """All that exists now is kept to the end and never looked through."""
    gc.freeze()
    gc.enable()
