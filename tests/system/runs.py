"""Helpers for tests that start whole runs, with the real vLLM, DeepSpeed and sockets."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from launch.processes.process_tree import marked_processes

ROOT = Path(__file__).resolve().parent.parent.parent
SMALL_RUN = (
    "pretraining.steps=100",
    "pretraining.num_traces=4000",
    "groups_per_batch=8",
    "samples_per_group=4",
    "actor.evaluation_prompts=40",
    "cluster.max_restarts=0",
)
"""Settings of a small run: a base model that has hardly learned more than the format, and small batches."""

Launch = Callable[..., "subprocess.Popen[str]"]


@dataclass
class Traces:
    """The resources of a run outside of its directory, all of which must be gone after it."""

    run_mark: str
    """The mark in the environment of all processes of the run."""
    files: set[Path]
    """Temporary folders and files in shared memory."""

    @classmethod
    def of(cls, processes: list[psutil.Process]) -> Traces:
        """Finds the mark, the temporary folders and the shared memory of running processes."""
        run_mark, files = "", set()
        for process in processes:
            environment = process.environ()
            if "SLIPSTREAM_PROCESS" in environment:
                run_mark = environment["SLIPSTREAM_PROCESS"].partition(".")[0]
                files.add(Path(environment["TMPDIR"]))
                maps = Path(f"/proc/{process.pid}/maps").read_text()
                # Only the first folder below /dev/shm: file names of the learner's versions change with every step.
                files |= {Path(name) for name in re.findall(r" (/dev/shm/[^/\s]+)\S*$", maps, re.MULTILINE)}
        assert run_mark
        assert all(path.exists() for path in files)
        # At least the learner's versions, and the temporary folder that all processes share.
        assert len(files) >= 2
        return cls(run_mark, files)

    def left(self) -> list[object]:
        """The processes and files that still exist."""
        return [*marked_processes(self.run_mark), *(path for path in self.files if path.exists())]


def finish(process: subprocess.Popen[str], run_dir: Path, timeout_seconds: float = 300.0) -> str:
    """Wait for a run that must succeed. Returns its output."""
    output, _ = process.communicate(timeout=timeout_seconds)
    if process.returncode:
        logs = "".join(f"\n== {log.name}\n{log.read_text()[-3000:]}" for log in (run_dir / "logs").glob("*.log"))
        pytest.fail(f"the run ended with status {process.returncode}:\n{output}{logs}")
    return output


def reward_curve(run_dir: Path) -> list[tuple[int, float]]:
    """Returns (policy version, mean reward) pairs from the event files of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("reward/mean")]
