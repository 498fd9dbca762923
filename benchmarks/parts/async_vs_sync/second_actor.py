"""What a second actor adds where generation is the bottleneck; the second part of `benchmarks/async_vs_sync.py`.

Two cores, few completions in flight, so that generating a batch takes several times as long as training on it. With
one actor, core 0 generates and core 1 has everything else, which leaves it mostly idle. The second actor gets core 1
beside that. Where the first keeps a of a core busy and the rest u, two cores hold no more than 2 / (a + u) times that
work, and two actors do no more than twice that of one: the limit of the gain is min(2, 2 / (a + u)).
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
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
    # Eight completions at a time: an engine step costs nearly as much as with a hundred.
    "actor.max_groups_in_flight=2",
    "cluster.pin_cores=false",
    "total_steps=100000",
)
START_SECONDS, WARM_UP_SECONDS, STOP_SECONDS = 400.0, 5.0, 60.0


@dataclass(frozen=True)
class Rate:
    """One run."""

    groups_per_second: float
    """Trained on."""
    actor_cores: float
    """Processor time per second of all actors, with their engines and verifiers."""
    rest_cores: float
    """Of everything else."""
    actors_wanted: float
    """a (1 - i_a) / (1 - i_l), as docs/performance.md chooses the number of actors."""


def measure(num_actors: int, work: Sequence[str], seconds: float, run_dir: Path) -> Rate:
    """A run with actor i on core i and the rest on core 1, watched for `seconds` from when all actors generate.

    Waits for: the actors' start. Gives up after: `START_SECONDS`, with a TimeoutError.
    """
    settings = [*work, *GENERATION_BOUND, f"cluster.num_actors={num_actors}", f"run_dir={run_dir}"]
    launcher = subprocess.Popen(
        [sys.executable, "launch/cluster.py", *settings], cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True
    )
    try:
        _wait_for_actors(launcher, [run_dir / "logs" / f"actor-{index}.log" for index in range(num_actors)])
        families = _pin(psutil.Process(launcher.pid))
        time.sleep(WARM_UP_SECONDS)
        used, began, clock = [_processor_seconds(f) for f in families], time.monotonic(), time.time()
        time.sleep(seconds)
        elapsed = time.monotonic() - began
        cores = [(_processor_seconds(f) - before) / elapsed for f, before in zip(families, used, strict=True)]
        window = clock, time.time()
    finally:
        launcher.send_signal(signal.SIGTERM)
        launcher.wait(STOP_SECONDS)
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    stamps = [e.wall_time for e in events.Scalars("learner/train_seconds") if window[0] <= e.wall_time <= window[1]]
    return Rate(GROUPS_PER_BATCH * (len(stamps) - 1) / (stamps[-1] - stamps[0]), *cores, _wanted(events, num_actors))


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
    """Each actor with its engine and verifier to its core, all others to the second one. Returns (actors, others)."""
    cores = sorted(os.sched_getaffinity(0))
    first, second = cores[0], cores[min(1, len(cores) - 1)]
    actors: list[psutil.Process] = []
    others = [launcher]
    for child in launcher.children():
        family, command = [child, *child.children(recursive=True)], child.cmdline()
        (actors if "actors" in command else others).extend(family)
        for process in family:
            _keep_on(process, first if command[-1] == "actor-0" else second)
    return actors, others


def _keep_on(process: psutil.Process, core: int) -> None:
    for thread in process.threads():
        try:
            os.sched_setaffinity(thread.id, [core])
        except ProcessLookupError:
            continue  # A thread that has ended needs no core.


def _processor_seconds(processes: Sequence[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def report(one: Sequence[Rate], two: Sequence[Rate]) -> dict[str, Any]:
    """The figures of the table, from runs that alternated."""
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
    fields = {"groups/s": "groups_per_second", "cores: actors": "actor_cores", "cores: the rest": "rest_cores"}
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
