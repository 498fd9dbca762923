"""The figures, the table and the plot of `benchmarks/peers.py`, from the recorded runs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table

from benchmarks.parts.figures import spread as median_and_range
from benchmarks.parts.offpolicy.report import updates_to
from benchmarks.parts.peers.work import OURS
from benchmarks.plot_run import COLORS, STYLE

WARM_UP_UPDATES = 3
"""Number of first updates that the rates leave out: there, code is compiled and processes are still starting."""
GOAL = 0.8
Figures = Mapping[str, Any]


@dataclass(frozen=True)
class Measured:
    """The figures of one run."""

    samples_per_second: float
    """Completions trained on per second."""
    generated_per_second: float
    """Completion tokens sampled per second."""
    trained_per_second: float
    """Completion tokens trained on per second."""
    startup_seconds: float
    """From the start of the command to the end of the first update."""
    goal_seconds: float | None
    """From the start of the command until pass@1 reaches `GOAL`, interpolated between checkpoints; None: never."""
    resident_mb: float
    """Peak memory; pages that processes share count in each of them."""
    shared_once_mb: float
    """Peak memory; shared pages count once."""
    final: float
    """pass@1 of the last checkpoint."""


def measured(run: Mapping[str, Any], batch: int) -> Measured:
    """Computes the figures of a run; `batch` is the number of completions per update."""
    stamps, warm = run["stamps"], WARM_UP_UPDATES
    seconds = stamps[-1] - stamps[warm - 1]
    return Measured(
        samples_per_second=batch * (len(stamps) - warm) / seconds,
        generated_per_second=(run["generated"][-1] - run["generated"][warm - 1]) / seconds,
        trained_per_second=sum(run["tokens"][warm:]) / seconds,
        startup_seconds=stamps[0],
        goal_seconds=_seconds_to(GOAL, run),
        resident_mb=run["resident_mb"],
        shared_once_mb=run["shared_once_mb"],
        final=run["pass_at_1"][-1][1],
    )


def _seconds_to(goal: float, run: Mapping[str, Any]) -> float | None:
    version = updates_to(goal, run["pass_at_1"])
    if version is None:
        return None
    # Version 0 exists when the command starts.
    stamps = [0.0, *run["stamps"]]
    whole = min(int(version), len(stamps) - 2)
    return float(stamps[whole] + (version - whole) * (stamps[whole + 1] - stamps[whole]))


def measures(figures: Figures) -> dict[str, list[Measured]]:
    """The figures of all runs, by way."""
    batch = figures["scale"]["groups_per_batch"] * figures["scale"]["samples_per_group"]
    return {way: [measured(run, batch) for run in runs] for way, runs in figures["ways"].items()}


def ratio(ours: Sequence[Measured], theirs: Sequence[Measured], field: str) -> list[float]:
    """Our figure divided by theirs, for every pair of runs that followed each other."""
    return [vars(a)[field] / vars(b)[field] for a, b in zip(ours, theirs, strict=False)]


def rows(figures: Figures) -> list[list[str]]:
    """The cells of the table, beginning with its head."""
    found = measures(figures)
    lines = [["", *(figures["labels"][way] for way in found)]]
    for label, field, digits in (
        ("samples/s", "samples_per_second", 0),
        ("tokens/s generated", "generated_per_second", 0),
        ("tokens/s trained", "trained_per_second", 0),
        ("seconds until the first update", "startup_seconds", 0),
        (f"seconds to pass@1 {GOAL}", "goal_seconds", 0),
        ("pass@1 at the end", "final", 3),
        ("peak resident MB", "resident_mb", 0),
        ("peak MB, shared pages once", "shared_once_mb", 0),
    ):
        lines.append([label, *(spread([vars(run)[field] for run in runs], digits) for runs in found.values())])
    for ours in [way for way in OURS if way in found]:
        for label, field in (("samples/s", "samples_per_second"), ("tokens/s trained", "trained_per_second")):
            ratios = (ratio(found[ours], runs, field) if way not in OURS else [] for way, runs in found.items())
            cells = (spread(values, 2) if values else "" for values in ratios)
            lines.append([f"{figures['labels'][ours]} / this, {label}", *cells])
    return lines


def spread(values: Sequence[float | None], digits: int) -> str:
    """Median and range as text; None stands for a run that never reached the goal."""
    numbers = [value for value in values if value is not None]
    never = f"{len(values) - len(numbers)} of {len(values)} never" if len(numbers) < len(values) else ""
    if not numbers:
        return never
    said = f"{numbers[0]:,.{digits}f}" if len(numbers) == 1 else median_and_range(numbers, digits)
    return ", ".join(filter(None, [said, never]))


def show(figures: Figures, console: Console) -> None:
    scale, (head, *lines) = figures["scale"], rows(figures)
    batch = f"{scale['groups_per_batch']} prompts x {scale['samples_per_group']}"
    table = Table(title=f"{scale['model']} model, {scale['updates']} updates of {batch} completions")
    for column in head:
        table.add_column(column, justify="right" if column else "left")
    for line in lines:
        table.add_row(*line)
    console.print(table)
    for way, reason in figures["skipped"].items():
        console.print(f"{figures['labels'][way]}: not measured: {reason}", markup=False, highlight=False)
    for way, runs in figures["ways"].items():
        differences = [run["logprob_difference"] for run in runs if run["logprob_difference"] is not None]
        if differences:
            said = f"{figures['labels'][way]}: its sampler's and its trainer's log-probabilities differ by"
            console.print(f"{said} {max(differences):.4f} at most")
    console.print(f"{figures['machine']}; {figures['command']}")


def markdown(figures: Figures) -> str:
    """The table in Markdown."""
    head, *lines = rows(figures)
    ruled = [head, ["---"] * len(head), *lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in ruled)


def plot(figures: Figures, path: Path) -> None:
    """Draw samples per second by way, and pass@1 against wall-clock time. The same figures give the same file."""
    found = measures(figures)
    colors = dict(zip(found, COLORS, strict=False))
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
        for place, (way, runs) in enumerate(found.items()):
            rates = [run.samples_per_second for run in runs]
            middle = statistics.median(rates)
            errors = [[middle - min(rates)], [max(rates) - middle]]
            left.barh(-place, middle, xerr=errors, color=colors[way], capsize=2)
            for index, run in enumerate(figures["ways"][way]):
                # Until the first update pass@1 is that of the base model.
                seconds = [0.0, *(run["stamps"][max(version - 1, 0)] for version, _ in run["pass_at_1"])]
                shares = [run["pass_at_1"][0][1], *(share for _, share in run["pass_at_1"])]
                label = figures["labels"][way] if index == 0 else None
                right.plot(seconds, shares, color=colors[way], marker="o", markersize=3, linewidth=1.2, label=label)
        left.set_yticks([-place for place in range(len(found))], [figures["labels"][way] for way in found])
        left.set_xlabel("samples/s, start-up left out")
        right.axhline(GOAL, color="#777777", linewidth=0.8, linestyle=":")
        right.set_xlabel("seconds from the start of the command")
        right.set_ylabel("pass@1, held out")
        right.set_ylim(0.0, 1.02)
        right.legend(frameon=False, fontsize=8)
        # Without a date the file changes only when the runs do.
        figure.savefig(path, metadata={"Date": None}, facecolor="white")
        plt.close(figure)
