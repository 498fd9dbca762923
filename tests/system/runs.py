"""Starting whole runs and waiting for them: the real vLLM, the real DeepSpeed and real sockets."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
SMALL_RUN = (
    "pretraining.steps=100",
    "pretraining.num_traces=4000",
    "groups_per_batch=8",
    "samples_per_group=4",
    "actor.evaluation_prompts=40",
    "cluster.max_restarts=0",
)
"""A base model that knows the format and little else, and small batches."""

Launch = Callable[..., "subprocess.Popen[str]"]


def finish(process: subprocess.Popen[str], run_dir: Path, timeout_seconds: float = 300.0) -> str:
    """Wait for a run that must end well. Returns what it printed."""
    output, _ = process.communicate(timeout=timeout_seconds)
    if process.returncode:
        logs = "".join(f"\n== {log.name}\n{log.read_text()[-3000:]}" for log in (run_dir / "logs").glob("*.log"))
        pytest.fail(f"the run ended with status {process.returncode}:\n{output}{logs}")
    return output


def reward_curve(run_dir: Path) -> list[tuple[int, float]]:
    """(version, mean reward) as TensorBoard shows it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("reward/mean")]
