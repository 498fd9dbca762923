"""The gain of a second actor where generation is the bottleneck: `benchmarks/async_vs_sync.py --actors`.

Two cores are used, and the settings are the defaults: the buffer divides the places of the batches between the actors.
With one actor, core 0 generates, and core 1 runs all other processes and is mostly idle. The second actor
also runs on core 1.

The gain, in groups trained per second, has a limit. With one actor, let the actor use a cores and all other processes u
cores. Two cores can do at most 2 / (a + u) times that work, and two actors at most twice the work of one. So the limit
is min(2, 2 / (a + u)).
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.parts.figures import spread

ROOT = Path(__file__).resolve().parents[3]
GROUPS_PER_BATCH = 16
GENERATION_BOUND = (
    f"groups_per_batch={GROUPS_PER_BATCH}",
    "samples_per_group=4",
    "cluster.pin_cores=false",
    "total_steps=100000",
)
START_SECONDS, WARM_UP_SECONDS, STOP_SECONDS = 400.0, 5.0, 60.0


@dataclass(frozen=True)
class Rate:
    """Figures of one run."""

    groups_per_second: float
    """Groups trained on per second."""
    actor_cores: float
    """Processor seconds per second of all actors, with their engines and scoring processes."""
    rest_cores: float
    """Processor seconds per second of all other processes."""
    actors_wanted: float
    """n (1 - i_a) / (1 - i_l) for n actors with idle share i_a and a learner with idle share i_l: the number of actors
    that docs/performance.md recommends."""


def measure(num_actors: int, work: Sequence[str], seconds: float, run_dir: Path) -> Rate:
    """Start a run with actor i on core i and all other processes on core 1, and measure it for `seconds`.

    Waits for: all actors to generate. Gives up after: `START_SECONDS`, with a TimeoutError.
    """
    settings = [*work, *GENERATION_BOUND, f"cluster.num_actors={num_actors}", f"run_dir={run_dir}"]
    launcher = subprocess.Popen(
        [sys.executable, "launch/cluster.py", *settings], cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True
    )
    try:
        _wait_for_actors(launcher, [run_dir / "logs" / f"actor-{index}.log" for index in range(num_actors)])
        actors, others = _pin(psutil.Process(launcher.pid))
        time.sleep(WARM_UP_SECONDS)
        actor_before, rest_before = _processor_seconds(actors), _processor_seconds(others)
        began, clock = time.monotonic(), time.time()
        time.sleep(seconds)
        elapsed = time.monotonic() - began
        actor_cores = (_processor_seconds(actors) - actor_before) / elapsed
        rest_cores = (_processor_seconds(others) - rest_before) / elapsed
        window = clock, time.time()
    finally:
        launcher.send_signal(signal.SIGTERM)
        launcher.wait(STOP_SECONDS)
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    stamps = [e.wall_time for e in events.Scalars("learner/train_seconds") if window[0] <= e.wall_time <= window[1]]
    return Rate(
        groups_per_second=GROUPS_PER_BATCH * (len(stamps) - 1) / (stamps[-1] - stamps[0]),
        actor_cores=actor_cores,
        rest_cores=rest_cores,
        actors_wanted=_wanted(events, num_actors),
    )


def _wanted(events: EventAccumulator, num_actors: int) -> float:
    actor, learner = (events.Scalars(f"{role}/idle_fraction")[-1].value for role in ("actor", "learner"))
    return num_actors * (1 - actor) / (1 - learner)


def _wait_for_actors(launcher: subprocess.Popen[bytes], logs: Sequence[Path]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not all(log.exists() and "parameters verified" in log.read_text(errors="replace") for log in logs):
        if launcher.poll() is not None or time.monotonic() > deadline:
            raise TimeoutError(f"not all actors came to generate; their logs are in {logs[0].parent}")
        time.sleep(0.5)


def _pin(launcher: psutil.Process) -> tuple[list[psutil.Process], list[psutil.Process]]:
    """Pin actor-0 with its child processes to the first core and all other processes to the second.

    Returns (processes of the actors, all other processes).
    """
    cores = sorted(os.sched_getaffinity(0))
    first, second = cores[0], cores[min(1, len(cores) - 1)]
    actors: list[psutil.Process] = []
    others = [launcher]
    for child in launcher.children():
        tree, command = [child, *child.children(recursive=True)], child.cmdline()
        (actors if "actors" in command else others).extend(tree)
        for process in tree:
            _pin_threads(process, first if command[-1] == "actor-0" else second)
    return actors, others


def _pin_threads(process: psutil.Process, core: int) -> None:
    for thread in process.threads():
        # The thread may have ended.
        with suppress(ProcessLookupError):
            os.sched_setaffinity(thread.id, [core])


def _processor_seconds(processes: Sequence[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def report(one: Sequence[Rate], two: Sequence[Rate]) -> dict[str, Any]:
    """Computes the figures of the table; run i of `one` was followed by run i of `two`."""
    gains = [b.groups_per_second / a.groups_per_second for a, b in zip(one, two, strict=True)]
    limit = min(2.0, 2 / statistics.median(rate.actor_cores + rate.rest_cores for rate in one))
    return {
        "gain": statistics.median(gains),
        "gain_spread": [min(gains), max(gains)],
        "limit": limit,
        "share_of_limit": statistics.median(gains) / limit,
        "one": [asdict(rate) for rate in one],
        "two": [asdict(rate) for rate in two],
    }


def show(figures: dict[str, Any], console: Console) -> None:
    table = Table(title="a second actor where generation is the bottleneck, two cores")
    for column in ("", "one actor", "two actors"):
        table.add_column(column)
    fields = {"groups/s": "groups_per_second", "cores: actors": "actor_cores", "cores: others": "rest_cores"}
    fields |= {"actors wanted": "actors_wanted"}
    for label, field in fields.items():
        both = [[rate[field] for rate in figures[name]] for name in ("one", "two")]
        table.add_row(label, *(spread(values, 2) for values in both))
    console.print(table)
    low, high = figures["gain_spread"]
    console.print(
        f"gain {figures['gain']:.2f} ({low:.2f} to {high:.2f}), limit min(2, 2 / (a + u)) ="
        f" {figures['limit']:.2f}, {100 * figures['share_of_limit']:.0f} % of it"
    )
