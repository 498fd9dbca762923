"""Shared by all benchmarks: command line, machine and versions of a measurement, and the JSON file of its figures."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
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
    """Number of cores, architecture and Python version of this machine."""
    return f"{os.cpu_count()} cores {platform.machine()}, Python {platform.python_version()}"


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of installed packages, by name."""
    return {name: version(name) for name in packages}


def spread(values: Sequence[float], digits: int) -> str:
    """Median and range as text: `2.0 (1.5 to 2.5)`."""
    middle, low, high = (f"{value:,.{digits}f}" for value in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({low} to {high})"


def write(path: Path | None, figures: Mapping[str, Any]) -> None:
    """Write the figures as indented JSON; nothing without a path."""
    if path is not None:
        path.write_text(json.dumps(figures, indent=2) + "\n")
