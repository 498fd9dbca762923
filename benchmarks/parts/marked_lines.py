"""Messages from a process to the benchmark that started it: marked lines of JSON in its standard output.

The mark tells them from the output of libraries.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

MARK = "figures: "
"""Prefix of a message's line."""


def say(**fields: Any) -> None:
    """Print one message: a marked line with `fields` as a JSON object."""
    print(MARK + json.dumps(fields), flush=True)


def heard(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Yields the messages in lines of output."""
    for line in lines:
        if line.startswith(MARK):
            yield json.loads(line.removeprefix(MARK))
