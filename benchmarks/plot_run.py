"""Draws one or more runs: `python benchmarks/plot_run.py OUT.svg LABEL=RUN_DIR [LABEL=RUN_DIR ...]`.

Reads the TensorBoard event files in RUN_DIR/tensorboard. Draws held-out pass@1, training reward, staleness (in policy
versions) and effective sample size (a share from 0 to 1) against the policy version, with one color per run. The suffix
of OUT decides the format. `--json FILE` also writes the series as `{label: {tag: [[policy_version, value], ...]}}`. No
run is started or changed.

Exit status: 0; 2 with one sentence for a mistake in the arguments or a run without data.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

Series = tuple[tuple[int, float], ...]
"""(policy_version, value) pairs with rising versions, one value per version."""

FORMATS = (".svg", ".png", ".pdf")
STYLE = {
    "svg.hashsalt": "slipstream",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
}
"""matplotlib's settings for every figure. The fixed hash salt gives the same file for the same runs."""
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""The palette of Okabe and Ito, which color-blind readers can tell apart."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One of the four plots."""

    tag: str
    title: str
    label: str
    """Label of the y-axis, with the unit."""
    top: float | None
    """Upper end of a y-axis that starts at 0; None: the data decide both ends."""
    marker: str = ""


PANELS = (
    Panel("evaluation/pass_at_1", "Held-out pass@1", "share of prompts solved", 1.02, "o"),
    Panel("reward/mean", "Training reward", "mean of the batch", None),
    Panel("staleness/mean", "Staleness", "mean of the batch, versions", None),
    Panel("importance/effective_sample_size", "Effective sample size", "share of the tokens", 1.02),
)


@dataclass(frozen=True, slots=True)
class Run:
    """The series of one run."""

    label: str
    series: Mapping[str, Series]
    """Series by TensorBoard tag; a tag that the run never wrote is absent."""


def read_run(label: str, run_dir: Path) -> Run:
    """Reads the series of the panels from all event files of a run.

    A resumed run may write a version again; then the later value counts.

    Raises:
        ValueError: when the folder or the event files are missing, or have none of the panels' tags.
    """
    directory = run_dir / "tensorboard"
    if not run_dir.is_dir():
        raise ValueError(f"{label}: {run_dir} is not a folder; give the directory of a run that was started")
    if not any(directory.glob("*tfevents*")):
        raise ValueError(f"{label}: {directory} holds no event files; give a run whose learner made at least one step")
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    events.Reload()
    written = set(events.Tags()["scalars"])
    series = {panel.tag: _series(events.Scalars(panel.tag)) for panel in PANELS if panel.tag in written}
    if not series:
        tags = ", ".join(panel.tag for panel in PANELS)
        raise ValueError(f"{label}: the event files in {directory} have none of {tags}; give a run of this project")
    return Run(label, series)


def _series(events: Sequence[Any]) -> Series:
    by_version = {int(event.step): float(event.value) for event in sorted(events, key=lambda event: event.wall_time)}
    return tuple(sorted(by_version.items()))


def draw(runs: Sequence[Run], output: Path, title: str) -> None:
    """Write the figure. The same runs give the same file."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(9, 6), sharex=True, layout="constrained")
        for panel, axis in zip(PANELS, axes.flat, strict=True):
            _draw_panel(panel, axis, runs)
        for axis in axes[1]:
            axis.set_xlabel("policy version (optimizer steps)")
        figure.suptitle(title)
        handles = [plt.Line2D([], [], color=color, label=run.label) for run, color in _colored(runs)]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(runs), 4), frameon=False)
        # Without a date the file changes only when the runs do.
        metadata = {"Date": None} if output.suffix == ".svg" else None
        figure.savefig(output, metadata=metadata, dpi=150, facecolor="white")
        plt.close(figure)


def _draw_panel(panel: Panel, axis: Any, runs: Sequence[Run]) -> None:
    for run, color in _colored(runs):
        series = run.series.get(panel.tag, ())
        if series:
            versions, values = zip(*series, strict=True)
            axis.plot(versions, values, color=color, linewidth=1.4, marker=panel.marker, markersize=3.5)
    axis.set_title(panel.title)
    axis.set_ylabel(panel.label)
    if not axis.lines:
        axis.text(0.5, 0.5, "not recorded", transform=axis.transAxes, ha="center", color="#777777")
    elif panel.top is not None:
        axis.set_ylim(0.0, panel.top)


def _colored(runs: Sequence[Run]) -> list[tuple[Run, str]]:
    return [(run, COLORS[index % len(COLORS)]) for index, run in enumerate(runs)]


def parse_runs(arguments: Sequence[str]) -> list[tuple[str, Path]]:
    """Splits every LABEL=RUN_DIR into (label, run directory).

    Raises:
        ValueError: when a part is missing, or a label is given twice.
    """
    runs: list[tuple[str, Path]] = []
    for argument in arguments:
        label, equals, folder = argument.partition("=")
        if not (label and equals and folder):
            raise ValueError(f"{argument!r} is not LABEL=RUN_DIR; write for example PPO=runs/my_run")
        if label in dict(runs):
            raise ValueError(f"the label {label!r} is given twice; every run needs its own")
        runs.append((label, Path(folder).expanduser()))
    return runs


def _check_output(output: Path) -> None:
    if output.suffix not in FORMATS:
        raise ValueError(f"{output} does not end in one of {', '.join(FORMATS)}; name the figure so, for example a.svg")
    if not output.parent.is_dir():
        raise ValueError(f"the folder {output.parent} of the output {output} does not exist; make it first")


def _write_json(runs: Sequence[Run], path: Path) -> None:
    """Write the series as JSON. NaN and infinities become null, because JSON has none."""
    content = {
        run.label: {
            tag: [[version, value if math.isfinite(value) else None] for version, value in series]
            for tag, series in run.series.items()
        }
        for run in runs
    }
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw what the command line asks for. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, metavar="OUT", help=f"file of the figure; one of {', '.join(FORMATS)}")
    parser.add_argument("runs", nargs="+", metavar="LABEL=RUN_DIR", help="a name for the legend, and a run's directory")
    parser.add_argument("--title", default="Slipstream: runs by policy version", help="title of the figure")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the series to this file")
    parser.add_argument("--quick", action="store_true", help="no effect; every benchmark accepts it")
    options = parser.parse_args(arguments)
    try:
        _check_output(options.output)
        runs = [read_run(label, run_dir) for label, run_dir in parse_runs(options.runs)]
        draw(runs, options.output, options.title)
        if options.json is not None:
            _write_json(runs, options.json)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.output}: {', '.join(run.label for run in runs)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
