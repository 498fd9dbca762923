"""How much memory vLLM believes to be free in a container, on a CPU.

vLLM counts every file that was read in the container as used memory, and refuses to start with its cache where they
fill the limit: those of its own libraries are several gigabytes. The kernel drops them when memory is wanted. Called by
`actors/engine/engine.py` before an engine is made in this process.
"""

from __future__ import annotations

from vllm.utils import cpu_resource_utils

from buffer.machine import available_memory_bytes


def count_only_what_is_needed() -> None:
    """Let vLLM see a usage that leaves the memory which is really available."""
    cpu_resource_utils.get_cgroup_memory_usage = _usage_bytes


def _usage_bytes() -> int | None:
    limit = cpu_resource_utils.get_cgroup_memory_limit()
    return None if limit is None else max(0, limit - available_memory_bytes())
