"""Settings of glibc's heap: use huge pages, and keep freed memory for the next step.

By default glibc returns free memory at the end of its heap to the system. The activations of every layer then take it
back page by page, and the system clears each page first. With pages of 4 KiB, streaming through activations also costs
a TLB lookup every 1,024 floats.
"""

from __future__ import annotations

import os

KEPT_BYTES = 256 << 20
"""Free memory at the end of the heap that glibc keeps, in bytes."""
POOLED_BYTES = 32 << 20
"""Largest block taken from the heap, in bytes: the most that glibc allows. Each larger block is mapped separately."""
_VARIABLE = "GLIBC_TUNABLES"


def heap_environment() -> dict[str, str]:
    """Return the environment variables to start a process with; glibc reads them before the program runs.

    Other C libraries ignore them. Huge pages need glibc 2.35 or later, and a system with `transparent_hugepage` at
    `madvise` or `always`. Tunables that this process was started with come last and take precedence.
    """
    ours = f"glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold={POOLED_BYTES}:glibc.malloc.trim_threshold={KEPT_BYTES}"
    return {_VARIABLE: ":".join(filter(None, [ours, os.environ.get(_VARIABLE, "")]))}
