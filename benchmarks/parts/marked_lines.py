"""How a process tells the benchmark that started it: marked lines of JSON, among whatever its libraries print."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

MARK = "figures: "
"""Begins the lines that are meant."""


def say(**what: Any) -> None:
    """One marked line on standard output."""
    print(MARK + json.dumps(what), flush=True)


def heard(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """What was said among other output."""
    for line in lines:
        if line.startswith(MARK):
            yield json.loads(line.removeprefix(MARK))
