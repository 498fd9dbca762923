"""What every benchmark says of itself beside its figures, and the file that it writes."""

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
"""Columns of a table in a file or a pipe, where nothing says how many there are."""


def wide_console() -> Console:
    """Of the benchmark's tables: none of them is cut where it is kept."""
    return Console(width=None if sys.stdout.isatty() else WIDTH)


def command() -> str:
    """The command line of this process."""
    return " ".join(["python", *sys.argv])


def machine() -> str:
    """What this runs on."""
    return f"{os.cpu_count()} cores {platform.machine()}, Python {platform.python_version()}"


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Of installed distributions, by name."""
    return {name: version(name) for name in packages}


def spread(values: Sequence[float], digits: int) -> str:
    """Median and range."""
    middle, low, high = (f"{value:,.{digits}f}" for value in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({low} to {high})"


def write(path: Path | None, figures: Mapping[str, Any]) -> None:
    """As indented JSON, where a path was given."""
    if path is not None:
        path.write_text(json.dumps(figures, indent=2) + "\n")
