"""Killing a process takes the shared memory that only it used, and nothing that belongs to a living process."""

import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.processes.process_tree import MARK, is_stopped, kill, marked_processes

MAPS = """
import mmap, sys, time
mapped = []
for path in sys.argv[1:]:
    with open(path, "r+b") as file:
        mapped.append(mmap.mmap(file.fileno(), 0))
print("up", flush=True)
time.sleep(60)
"""


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder in shared memory, as a run has one for its weights."""
    with tempfile.TemporaryDirectory(prefix="slipstream-test-", dir="/dev/shm") as folder:
        yield Path(folder)


def start(mark: str, *paths: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-S", "-c", MAPS, *map(str, paths)]
    process = subprocess.Popen(command, env=os.environ | {MARK: mark}, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    return process


@pytest.mark.parametrize("halted", [False, True])
def test_the_learners_weights_stay_when_an_actor_that_maps_them_is_killed(shared: Path, halted: bool):
    weights = shared / "weights" / "v00000041-abcd.weights"
    weights.parent.mkdir()
    weights.write_bytes(b"x" * (1 << 20))
    run = uuid.uuid4().hex
    actor = start(f"{run}.actor-0", weights)
    if halted:
        os.kill(actor.pid, signal.SIGSTOP)
        while not is_stopped(actor.pid):
            time.sleep(0.01)
    assert list(marked_processes(run)) == [actor.pid]
    kill(marked_processes(run))
    actor.communicate(timeout=20)
    assert actor.returncode == -signal.SIGKILL
    # No process has it mapped any more, and still it is the learner's.
    assert weights.read_bytes() == b"x" * (1 << 20)


def test_a_segment_goes_with_the_last_process_that_uses_it():
    own, both = (Path(f"/dev/shm/test-{uuid.uuid4().hex}") for _ in range(2))
    try:
        for path in (own, both):
            path.write_bytes(bytes(1 << 12))
        run = uuid.uuid4().hex
        actor, learner = start(f"{run}.actor-0", own, both), start(f"{run}.learner", both)
        kill(marked_processes(f"{run}.actor-0"))
        assert not own.exists() and both.exists()
        assert learner.poll() is None
        kill(marked_processes(f"{run}.learner"))
        assert not both.exists()
        for process in (actor, learner):
            process.communicate(timeout=20)
    finally:
        for path in (own, both):
            path.unlink(missing_ok=True)
