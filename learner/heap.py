"""The C library's heap: what a step frees stays with the process for the next one.

glibc hands free memory at the end of its heap back to the system and takes it again a moment later, page by page, each
of which the system clears first. Activations come and go with every layer.
"""

from __future__ import annotations

import ctypes

KEPT_BYTES = 256 << 20
"""Free memory at the end of the heap that is not handed back."""
POOLED_BYTES = 32 << 20
"""Blocks up to this size come from the heap, the largest that glibc allows; others are mapped one by one."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Of glibc's malloc.h."""


def keep_freed_memory() -> None:
    """Keep up to `KEPT_BYTES` of what is freed. Other C libraries are left alone."""
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(_M_MMAP_THRESHOLD, POOLED_BYTES)
        library.mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)
