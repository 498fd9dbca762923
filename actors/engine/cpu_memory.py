"""Corrects vLLM's view of the free memory in a container, on a CPU.

vLLM counts the page cache as used memory and refuses to start when little else seems free. vLLM's own libraries alone
fill several gigabytes of the page cache, which the kernel frees when memory is needed. `actors/engine/engine.py` calls
`ignore_page_cache` before it creates an engine in this process.
"""

from __future__ import annotations

from vllm.utils import cpu_resource_utils

from buffer.machine import available_memory_bytes


def ignore_page_cache() -> None:
    """Make vLLM compute the used memory as the limit minus the memory that is available."""
    cpu_resource_utils.get_cgroup_memory_usage = _usage_bytes


def _usage_bytes() -> int | None:
    limit = cpu_resource_utils.get_cgroup_memory_limit()
    return None if limit is None else max(0, limit - available_memory_bytes())
