"""Measures what staleness costs, and how much of it each correction recovers, with the default task and model.

    python benchmarks/offpolicy.py                      # the whole grid: hours on one core; resumes after a stop
    python benchmarks/offpolicy.py --staleness 0 8 --corrections none decoupled_tis --seeds 1
    python benchmarks/offpolicy.py --plot-only --plots docs/images

Measured, by staleness (in policy versions) and correction: the final pass@1, the updates until pass@1 reaches 0.8, the
effective sample size (a share from 0 to 1), and the number of runs that collapsed. All corrections are compared on the
same seeds, beside staleness 0.

Staleness is exact: batch v is sampled by policy max(0, v - staleness), because learner and actor take turns in one
process (`parts/offpolicy/run.py`). `unbounded` samples every batch from policy 0. Each run becomes a line of the file
`--json` when it ends; a run that is in the file is not repeated.

Exit status: 0; 2 with one sentence for a mistake in the arguments.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console

from benchmarks.parts.figures import wide_console
from benchmarks.parts.offpolicy.cells import CORRECTIONS, STALENESS, Cell, Scale, add_line, grid, missing, read_lines

ROOT = Path(__file__).resolve().parent.parent
ALGORITHMS = ("ppo", "grpo")
QUICK = Scale(updates=4, groups=4, samples=4, evaluate_every=2, evaluation_prompts=20)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--json", type=Path, default=Path("offpolicy.jsonl"), metavar="FILE", help="file of results, one line per run"
    )
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="write offpolicy_*.svg into this folder")
    parser.add_argument("--plot-only", action="store_true", help="start no run; show and draw the results in --json")
    parser.add_argument("--quick", action="store_true", help="two short runs; takes less than two minutes")
    parser.add_argument("--algorithm", choices=ALGORITHMS, default="ppo", help="algorithm of all runs")
    parser.add_argument(
        "--staleness", nargs="+", metavar="S", help="policy versions, or unbounded; default: all values of the study"
    )
    parser.add_argument(
        "--corrections", nargs="+", choices=CORRECTIONS, help="corrections to compare; default: all of the algorithm"
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of every combination, with the seeds 0, 1, ...")
    parser.add_argument("--updates", type=int, default=Scale.updates, help="optimizer steps per run")
    parser.add_argument("--rate", type=float, default=Scale.rate, help="factor on the default learning rates")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="further settings of every run")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the runs that are missing, then show and draw all results. Returns the exit status."""
    options = parse(arguments)
    console = wide_console()
    try:
        scale = (
            QUICK if options.quick else Scale(updates=options.updates, rate=options.rate, settings=tuple(options.set))
        )
        cells = wanted(options)
        done = read_lines(options.json)
        if not options.plot_only:
            run(missing(cells, scale, done), scale, options.json, console)
        lines = [line for line in read_lines(options.json) if scale.made(line)]
        if not lines:
            raise ValueError(f"{options.json} holds no run of this size; leave --plot-only out to make them")
        if options.plots is not None and not options.plots.is_dir():
            raise ValueError(f"--plots {options.plots} is not a folder; make it first")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from benchmarks.parts.offpolicy.report import draw, show

    show(lines, options.algorithm, console)
    if options.plots is not None:
        for path in draw(lines, options.algorithm, options.plots):
            console.print(str(path), markup=False)
    return 0


def wanted(options: argparse.Namespace) -> list[Cell]:
    """The cells of the grid that the arguments ask for.

    Raises:
        ValueError: for a staleness that is not a number of versions.
    """
    if options.quick and options.staleness is None:
        return [Cell(options.algorithm, "none", staleness, 0) for staleness in (0, 2)]
    stale: list[int | None] = list(STALENESS)
    if options.staleness is not None:
        stale = [_staleness(text) for text in options.staleness]
    corrections = options.corrections or [c for c in CORRECTIONS if c != "vtrace" or options.algorithm == "ppo"]
    return list(grid(options.algorithm, stale, corrections, options.seeds))


def _staleness(text: str) -> int | None:
    if text == "unbounded":
        return None
    if not text.isdigit():
        raise ValueError(f"--staleness {text} is no number of versions; give 0, 1, 2, ... or unbounded")
    return int(text)


def run(cells: Sequence[Cell], scale: Scale, path: Path, console: Console) -> None:
    """Run every cell, and append its result to `path` when it ends."""
    if not cells:
        return
    from benchmarks.parts.offpolicy.run import Study

    study = Study.start(scale)
    for number, cell in enumerate(cells, start=1):
        line = study.run(cell)
        add_line(path, line)
        start, end = line["pass_at_1"][0][1], line["pass_at_1"][-1][1]
        console.print(
            f"{number} of {len(cells)}: {cell.algorithm} {cell.correction}, staleness {cell.staleness}, seed"
            f" {cell.seed}: pass@1 {start:.3f} to {end:.3f} in {line['seconds']:.0f} s",
            markup=False,
            highlight=False,
        )
    study.close()


if __name__ == "__main__":
    # Processes of vLLM and of the scoring pool import this file again and need the project's path.
    os.environ["PYTHONPATH"] = str(ROOT)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
