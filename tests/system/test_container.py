"""A whole run with the limits of a container: less than two cores, and too little shared memory for the weights."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.containers import limited, with_shared_memory
from tests.system.runs import Launch, finish
from tests.system.test_loop import assert_sound, wait_for_versions

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]


def by_role(processes: list[psutil.Process], read: Callable[[psutil.Process], object]) -> dict[str, object]:
    """Calls `read` for the buffer, the learner and the actor; returns the results by role."""
    roles = {"buffer": "buffer", "learner": "learner", "actors": "actor"}
    words = {process: process.cmdline() for process in processes}
    return {
        roles[line[2]]: read(process) for process, line in words.items() if line[1:2] == ["-m"] and line[2] in roles
    }


def test_a_run_in_a_container_goes_to_its_end(launch: Launch, tmp_path: Path) -> None:
    run_dir, shared_memory = tmp_path / "contained", with_shared_memory(1 << 20)
    with limited(cpu=1.9) as group:
        process = launch(run_dir, "total_steps=4", inside=[*group, *shared_memory])
        processes = wait_for_versions(process, run_dir, at_least=1, within_seconds=480.0)
        cores = by_role(processes, lambda process: set(process.cpu_affinity()))
        threads = by_role(processes, lambda process: process.environ()["OMP_NUM_THREADS"])
        weights = run_dir / "weights"
        assert weights.is_dir() and not weights.is_symlink() and list(weights.glob("*.weights"))
        output = finish(process, run_dir)
    assert threads == {"buffer": "1", "learner": "1", "actor": "1"}
    # The cgroup limits processor time, not the choice of cores.
    assert all(allowed == os.sched_getaffinity(0) for allowed in cores.values())
    [note] = [line for line in output.splitlines() if "/dev/shm" in line]
    [wanted] = re.findall(r"6 versions of ([\d.]+) MB", note)
    published = re.findall(r"published in .* s \(([\d.]+) MB\)", (run_dir / "logs" / "learner.log").read_text())
    assert set(published) == {wanted}
    assert f"so they lie in {weights}" in note and "--shm-size" in note
    assert_sound(run_dir, steps=4, groups_per_batch=8, max_staleness=2)
