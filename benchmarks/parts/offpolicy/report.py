"""Reports the results of `benchmarks/offpolicy.py`: the measures of every run, tables, and figures."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table

from benchmarks.parts.offpolicy.cells import CORRECTIONS, STALENESS
from benchmarks.plot_run import COLORS, STYLE

LAST = 3
"""Number of last evaluations whose mean is the final pass@1."""
GOAL = 0.8
"""The pass@1 whose time is measured."""
COLLAPSE = 0.5
"""A run has collapsed when it ends below this share of its best evaluation, or below its first evaluation."""
Line = dict[str, Any]


@dataclass(frozen=True)
class Measures:
    """The measures of one run."""

    final: float
    """Final pass@1: the mean of the last evaluations."""
    to_goal: float | None
    """Updates until pass@1 first reaches GOAL, interpolated between evaluations; None when it never does."""
    collapsed: bool
    ess: float
    """Effective sample size as a share of the tokens, mean of the run."""
    lowest_ess: float
    kl: float
    """KL(mu, pi) in nats per token (estimator k3), mean of the run."""


def measure(line: Line) -> Measures:
    """Computes the measures from a line of the results."""
    values = [value for _, value in line["pass_at_1"]]
    final = statistics.fmean(values[-LAST:])
    ess, kl = line["curves"]["ess"], line["curves"]["kl_k3"]
    return Measures(
        final=final,
        to_goal=updates_to(GOAL, line["pass_at_1"]),
        collapsed=final < values[0] or final < COLLAPSE * max(values),
        ess=statistics.fmean(ess),
        lowest_ess=min(ess),
        kl=statistics.fmean(kl),
    )


def updates_to(goal: float, evaluations: Sequence[Sequence[float]]) -> float | None:
    """The version at which the line through (version, pass@1) first reaches `goal`; None when it never does."""
    before: Sequence[float] | None = None
    for version, value in evaluations:
        if value >= goal:
            if before is None:
                return version
            return before[0] + (goal - before[1]) / (value - before[1]) * (version - before[0])
        before = version, value
    return None


Runs = dict[tuple[str, int | None], list[Line]]
"""Lines by (correction, staleness), one per seed."""


def by_cell(lines: Sequence[Line], algorithm: str) -> Runs:
    """The runs of an algorithm. Those at staleness 0 count for every correction, because the loss is the same."""
    runs: Runs = defaultdict(list)
    for line in lines:
        if line["algorithm"] == algorithm:
            for name in CORRECTIONS if line["staleness"] == 0 else (line["correction"],):
                runs[name, line["staleness"]].append(line)
    return runs


def present(runs: Runs) -> tuple[list[str], list[int | None]]:
    """The corrections and the values of staleness that have runs."""
    stale = {correction for correction, staleness in runs if staleness != 0}
    names = [name for name in CORRECTIONS if name in stale] or list(CORRECTIONS)
    return names, [staleness for staleness in STALENESS if any(s == staleness for _, s in runs)]


def label(staleness: int | None) -> str:
    return "no limit" if staleness is None else str(staleness)


def show(lines: Sequence[Line], algorithm: str, console: Console) -> None:
    """Print a table per measure, with a row per staleness and a column per correction: mean and range of the seeds."""
    runs = by_cell(lines, algorithm)
    names, stale = present(runs)
    questions: list[tuple[str, Callable[[list[Measures]], str]]] = [
        (f"final pass@1 (mean of the last {LAST} evaluations)", lambda found: spread([m.final for m in found])),
        (f"updates to pass@1 {GOAL}", _updates),
        ("effective sample size, mean of the run", lambda found: spread([m.ess for m in found])),
        ("collapsed runs", lambda found: f"{sum(m.collapsed for m in found)} of {len(found)}"),
    ]
    for title, cell in questions:
        table = Table(title=f"{algorithm}: {title}")
        for column in ("staleness", *names):
            table.add_column(column, justify="right")
        for staleness in stale:
            found = [[measure(line) for line in runs.get((name, staleness), [])] for name in names]
            table.add_row(label(staleness), *(cell(measures) if measures else "-" for measures in found))
        console.print(table)


def spread(values: Sequence[float], digits: int = 2) -> str:
    low, high = min(values), max(values)
    return f"{statistics.fmean(values):.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def _updates(found: Sequence[Measures]) -> str:
    reached = [m.to_goal for m in found if m.to_goal is not None]
    never = len(found) - len(reached)
    return (spread(reached, 0) if reached else "") + (f" {never} never" if never else "")


def draw(lines: Sequence[Line], algorithm: str, folder: Path, suffix: str = ".svg") -> list[Path]:
    """Draw the figures; the same lines give the same files. Returns their paths."""
    runs = by_cell(lines, algorithm)
    drawn = []
    with plt.rc_context(STYLE):
        for name, figure in (
            ("final", _against(runs, "final pass@1, held out", lambda m: m.final)),
            ("speed", _against(runs, f"updates to pass@1 {GOAL}", lambda m: m.to_goal, runs_end=True)),
            ("ess", _against(runs, "effective sample size, mean of the run", lambda m: m.ess)),
            ("distance", _distance(runs)),
            ("curves", _curves(runs)),
        ):
            drawn.append(folder / f"offpolicy_{name}{suffix}")
            # Without a date the file changes only when the results do.
            figure.savefig(drawn[-1], metadata={"Date": None} if suffix == ".svg" else None, dpi=150, facecolor="white")
            plt.close(figure)
    return drawn


def _against(runs: Runs, ylabel: str, of: Callable[[Measures], float | None], *, runs_end: bool = False) -> Any:
    """A measure against staleness: the mean over seeds as one line per correction, with bars for their range.

    With `runs_end` a run without the measure counts with its last update, which is a lower bound; its point is hollow.
    """
    figure, axis = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    names, stale = present(runs)
    for index, name in enumerate(names):
        points = []
        for place, staleness in enumerate(stale):
            lines = runs.get((name, staleness), [])
            if lines:
                found = [of(measure(line)) for line in lines]
                values = [lines[0]["updates"] if value is None else value for value in found]
                points.append((place + 0.06 * (index - len(names) / 2), values, None in found))
        where = [place for place, _, _ in points]
        means = [statistics.fmean(values) for _, values, _ in points]
        bars = [[m - min(v) for m, (_, v, _) in zip(means, points, strict=True)]]
        bars += [[max(v) - m for m, (_, v, _) in zip(means, points, strict=True)]]
        color = COLORS[index % len(COLORS)]
        axis.errorbar(where, means, bars, color=color, linewidth=1.4, elinewidth=0.9, capsize=2, label=name)
        for at, mean, (_, _, hollow) in zip(where, means, points, strict=True):
            face = "white" if hollow and runs_end else color
            axis.plot(at, mean, "o", markersize=4.5, color=color, markerfacecolor=face)
    axis.set_xticks(range(len(stale)), [label(staleness) for staleness in stale])
    axis.set_xlabel("staleness, versions (forced)")
    axis.set_ylabel(ylabel)
    axis.legend(frameon=False, fontsize=8)
    return figure


def _distance(runs: Runs) -> Any:
    """Final pass@1 against the mean KL divergence of a run's data, with a point for every run above staleness 0."""
    figure, axis = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    for index, name in enumerate(present(runs)[0]):
        lines = [line for (of, staleness), found in runs.items() if of == name and staleness != 0 for line in found]
        found = [measure(line) for line in lines]
        color = COLORS[index % len(COLORS)]
        axis.plot([m.kl for m in found], [m.final for m in found], "o", color=color, markersize=4.5, label=name)
    axis.set_xscale("log")
    axis.set_xlabel("KL(mu, pi), nats per token (k3, mean of the run)")
    axis.set_ylabel("final pass@1, held out")
    axis.legend(frameon=False, fontsize=8)
    return figure


def _curves(runs: Runs) -> Any:
    """pass@1 against the policy version at up to four values of staleness: mean and range of the seeds."""
    names, stale = present(runs)
    shown = [staleness for staleness in (0, 8, 32, None) if staleness in stale] or stale
    figure, axes = plt.subplots(1, len(shown), figsize=(2.6 * len(shown) + 0.6, 3.0), sharey=True, layout="constrained")
    for axis, staleness in zip([axes] if len(shown) == 1 else axes, shown, strict=True):
        for index, name in enumerate(names):
            lines = runs.get((name, staleness), [])
            if lines:
                versions = [version for version, _ in lines[0]["pass_at_1"]]
                seeds = list(zip(*([value for _, value in line["pass_at_1"]] for line in lines), strict=True))
                color = COLORS[index % len(COLORS)]
                axis.plot(versions, [statistics.fmean(at) for at in seeds], color=color, linewidth=1.4, label=name)
                axis.fill_between(
                    versions, [min(at) for at in seeds], [max(at) for at in seeds], color=color, alpha=0.15, linewidth=0
                )
        axis.set_title("no limit" if staleness is None else f"staleness {staleness}")
        axis.set_xlabel("policy version")
        axis.set_ylim(0.0, 1.02)
    first = axes if len(shown) == 1 else axes[0]
    first.set_ylabel("pass@1, held out")
    handles, labels = (first if len(shown) == 1 else axes[-1]).get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(names), frameon=False)
    return figure
