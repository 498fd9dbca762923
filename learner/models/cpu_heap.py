"""The C library's heap: huge pages, and what a step frees stays with the process for the next one.

glibc hands free memory at the end of its heap back to the system and takes it again a moment later, page by page, each
of which the system clears first. Activations come and go with every layer. They are read and written whole, so in pages
of 4 KiB the processor looks up an address every thousand numbers.
"""

from __future__ import annotations

import os

KEPT_BYTES = 256 << 20
"""Free memory at the end of the heap that is not handed back."""
POOLED_BYTES = 32 << 20
"""Blocks up to this size come from the heap, the largest that glibc allows; others are mapped one by one."""
_VARIABLE = "GLIBC_TUNABLES"


def heap_environment() -> dict[str, str]:
    """What a process has to be started with, since glibc reads it before anything runs. Other C libraries don't.

    Huge pages are there where the system gives them to who asks (`transparent_hugepage` is `madvise` or `always`), with
    glibc 2.35 or later. What this process was started with comes last and wins.
    """
    ours = f"glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold={POOLED_BYTES}:glibc.malloc.trim_threshold={KEPT_BYTES}"
    return {_VARIABLE: ":".join(filter(None, [ours, os.environ.get(_VARIABLE, "")]))}
