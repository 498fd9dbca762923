"""One run of `benchmarks/peers.py`: starts it, watches its memory, and collects the time of every update.

Both are whole systems that a command starts: ours with `launch/cluster.py`, TRL with a script in its own virtual
environment. All times are in seconds from the start of that command.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from benchmarks.parts.marked_lines import heard
from benchmarks.parts.peers.work import Scale, Work

ROOT = Path(__file__).resolve().parents[3]
MEMORY_EVERY_SECONDS = 1.0
LAST_LINES = 3


@dataclass(frozen=True)
class Raw:
    """The record of one run."""

    stamps: Sequence[float]
    """[updates] seconds from the start of the command to the end of update 1, 2, ..."""
    tokens: Sequence[int]
    """[updates] completion tokens that each update trained on."""
    generated: Sequence[float]
    """[updates] completion tokens sampled until the end of each update, as reported to the learner."""
    wall_seconds: float
    """From the start of the command to its end."""
    resident_mb: float
    """Peak of the summed resident set sizes of all processes; a shared page counts in each of them."""
    shared_once_mb: float
    """Peak of the summed proportional set sizes of all processes; a shared page counts once."""
    folders: Mapping[int, Path]
    """Model folders by policy version."""
    logprob_difference: float | None = None
    """Largest difference between a log-probability of the peer's sampler and its trainer; None when not reported."""


def run_ours(num_actors: int, scale: Scale, seed: int, run_dir: Path) -> Raw:
    """Run Slipstream."""
    settings = (f"cluster.num_actors={num_actors}", f"seed={seed}", f"run_dir={run_dir}")
    command = [sys.executable, "launch/cluster.py", *scale.overrides(), *settings]
    started, wall_seconds, _, memory = _watched("slipstream", command, {}, range(0))
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    lengths = events.Scalars("reward/completion_tokens_mean")
    sampled = {event.step: event.value for event in events.Scalars("actor/tokens")}
    versions = [event.step for event in lengths]
    if versions != list(range(1, scale.updates + 1)):
        raise ValueError(
            f"slipstream: {len(versions)} of {scale.updates} updates are in {run_dir}/tensorboard; look at its logs"
        )
    return Raw(
        stamps=[event.wall_time - started for event in lengths],
        tokens=[round(event.value * scale.batch) for event in lengths],
        generated=[sampled.get(version, 0.0) for version in versions],
        wall_seconds=wall_seconds,
        resident_mb=memory.resident_mb,
        shared_once_mb=memory.shared_once_mb,
        folders={
            int(path.name): path / "policy" for path in (run_dir / "checkpoints").iterdir() if path.name.isdigit()
        },
    )


def run_trl(work: Work, python: Path, folder: Path) -> Raw:
    """Run TRL's trainer on `work.num_threads` cores, with as many threads."""
    request = folder / "work.json"
    work.write(request)
    cores = sorted(os.sched_getaffinity(0))[-work.num_threads :]
    environment = {
        "OMP_NUM_THREADS": str(work.num_threads),
        # Otherwise vLLM would bind its threads to other cores than the chosen ones.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [str(python), str(ROOT / "benchmarks" / "parts" / "peers" / "with_trl.py"), str(request)]
    started, wall_seconds, lines, memory = _watched(f"TRL ({work.mode})", command, environment, cores)
    said = list(heard(lines))
    updates = [line for line in said if "version" in line]
    if len(updates) != len(work.learning_rates):
        raise ValueError(f"TRL ({work.mode}): made {len(updates)} of {len(work.learning_rates)} updates; run it alone")
    tokens = [line["num_tokens"] for line in updates]
    differences = [line["logprob_difference"] for line in said if "logprob_difference" in line]
    folders = {int(path.name.removeprefix("checkpoint-")): path for path in Path(work.output).glob("checkpoint-*")}
    return Raw(
        stamps=[line["time"] - started for line in updates],
        tokens=tokens,
        # TRL samples every batch for exactly one update.
        generated=[float(sum(tokens[: index + 1])) for index in range(len(tokens))],
        wall_seconds=wall_seconds,
        resident_mb=memory.resident_mb,
        shared_once_mb=memory.shared_once_mb,
        folders=folders,
        logprob_difference=max(differences, default=None),
    )


class Memory:
    """Measures the memory of a process and all its children, from a thread of its own, until `close`."""

    def __init__(self, pid: int) -> None:
        self.resident_mb = self.shared_once_mb = 0.0
        self._root, self._over = psutil.Process(pid), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(MEMORY_EVERY_SECONDS):
            resident = shared_once = 0
            with contextlib.suppress(psutil.Error):
                for process in (self._root, *self._root.children(recursive=True)):
                    # A process may end meanwhile.
                    with contextlib.suppress(psutil.Error):
                        found = process.memory_full_info()
                        resident, shared_once = resident + found.rss, shared_once + found.pss
            self.resident_mb = max(self.resident_mb, resident / 1e6)
            self.shared_once_mb = max(self.shared_once_mb, shared_once / 1e6)

    def close(self) -> None:
        """Stop measuring. Waits for: the thread, which ends after its current measurement."""
        self._over.set()
        self._thread.join()


def _watched(
    name: str, command: Sequence[str], environment: Mapping[str, str], cores: Sequence[int]
) -> tuple[float, float, list[str], Memory]:
    """Runs a command on the given cores; returns (time of the start, seconds, lines of output, memory).

    Raises:
        ValueError: with one sentence that has the last lines of output, when the command fails.
    """
    started = time.time()
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        if cores:
            os.sched_setaffinity(process.pid, cores)
        memory = Memory(process.pid)
        try:
            assert process.stdout
            lines = process.stdout.read().splitlines()
        except BaseException:
            process.terminate()
            raise
        finally:
            memory.close()
    if process.returncode:
        words = " / ".join([line.strip() for line in lines if line.strip()][-LAST_LINES:]) or "it said nothing"
        raise ValueError(f"{name}: {' '.join(command[:3])} ended with status {process.returncode}: {words}")
    return started, time.time() - started, lines, memory
