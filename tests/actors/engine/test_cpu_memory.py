"""The free memory that vLLM sees in a container whose page cache fills the limit."""

import pytest
from vllm.utils import cpu_resource_utils

from actors.engine import cpu_memory

MIB = 1 << 20


@pytest.mark.parametrize(("available", "free"), [(48 * MIB, 48 * MIB), (100 * MIB, 64 * MIB), (0, 0)])
def test_files_that_can_be_dropped_do_not_count(monkeypatch: pytest.MonkeyPatch, available: int, free: int) -> None:
    monkeypatch.setattr(cpu_resource_utils, "get_cgroup_memory_limit", lambda: 64 * MIB)
    monkeypatch.setattr(cpu_resource_utils, "get_cgroup_memory_usage", lambda: 64 * MIB)
    monkeypatch.setattr(cpu_memory, "available_memory_bytes", lambda: available)
    assert cpu_resource_utils.get_memory_node_info(0).available_memory == 0
    cpu_memory.ignore_page_cache()
    assert cpu_resource_utils.get_memory_node_info(0).available_memory == free


def test_without_a_limit_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_resource_utils, "get_cgroup_memory_limit", lambda: None)
    monkeypatch.setattr(cpu_resource_utils, "get_cgroup_memory_usage", lambda: None)
    cpu_memory.ignore_page_cache()
    assert cpu_resource_utils.get_cgroup_memory_usage() is None
