"""Shared by all benchmarks: command line, machine and versions of a measurement, and the JSON file of its figures."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

WIDTH = 190
"""Characters per line when the output is a file or a pipe."""


def wide_console() -> Console:
    """The console for tables: as wide as the terminal, or WIDTH where there is none, so that no table is cut."""
    return Console(width=None if sys.stdout.isatty() else WIDTH)


def command() -> str:
    """The command line of this process."""
    return " ".join(["python", *sys.argv])


def machine() -> str:
    """Number and model of the cores, architecture and Python version of this machine."""
    cores = f"{os.cpu_count()} cores {platform.machine()}"
    return f"{cores} ({processor_model()}), Python {platform.python_version()}"


def processor_model() -> str:
    """The processor's name, as the kernel gives it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "CPU part")))
    return next(names, "unknown processor")


@dataclass(frozen=True)
class Busyness:
    """How busy a machine is at one moment."""

    load: float
    """Mean number of running processes over the last minute."""
    stolen: float
    total: float
    """Processor time since the machine started, in ticks: all, and what its host gave to other machines."""

    @classmethod
    def now(cls) -> Busyness:
        """Read it from the kernel."""
        ticks = [float(text) for text in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        return cls(os.getloadavg()[0], ticks[7], sum(ticks))


AT_THE_START = Busyness.now()
BUSY_LOAD = 0.3
"""Load per core at the start above which a measurement is marked: other processes take what is measured."""


def conditions(before: Busyness, after: Busyness) -> dict[str, Any]:
    """Load before and after a measurement, the share of time stolen meanwhile, and whether the machine was busy."""
    passed = after.total - before.total
    return {
        "load_before": round(before.load, 2),
        "load_after": round(after.load, 2),
        "stolen_percent": round(100 * (after.stolen - before.stolen) / passed, 2) if passed else 0.0,
        "was_busy": before.load > BUSY_LOAD * (os.cpu_count() or 1),
    }


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of installed packages, by name."""
    return {name: version(name) for name in packages}


def spread(values: Sequence[float], digits: int) -> str:
    """Median and range as text: `2.0 (1.5 to 2.5)`."""
    middle, low, high = (f"{value:,.{digits}f}" for value in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({low} to {high})"


def write(path: Path | None, figures: Mapping[str, Any]) -> None:
    """Print the conditions to standard error; with a path, write them and the figures as indented JSON."""
    found = conditions(AT_THE_START, Busyness.now())
    text = f"load {found['load_before']} before, {found['load_after']} after, {found['stolen_percent']} % stolen"
    busy = "; the machine was busy when this began: the figures mean little" if found["was_busy"] else ""
    Console(stderr=True, width=WIDTH).print(f"{machine()}; {text}{busy}", soft_wrap=True, highlight=False)
    if path is not None:
        path.write_text(json.dumps({**figures, "conditions": found}, indent=2) + "\n")
