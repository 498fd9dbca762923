"""The file RUN_DIR/waits.json: which processes wait, for what and since when, for `python -m buffer inspect`.

The buffer rewrites the file while it runs; a reader learns the file's age. The file is for display only and not part of
the ledger: it holds wall-clock times, and failures to write or read it are ignored.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from buffer.transport.messages import Wait

FILE_NAME = "waits.json"
REFRESH_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class SavedWaits:
    """The waits as of `age_seconds` ago."""

    waits: tuple[Wait, ...]
    age_seconds: float


def save_waits(run_dir: Path, waits: Sequence[Wait]) -> None:
    """Replace the file. Errors are ignored, because a full disk must not end the buffer."""
    temporary = run_dir / f"{FILE_NAME}.incomplete"
    with suppress(OSError):
        temporary.write_text(json.dumps({"saved_at": time.time(), "waits": [asdict(wait) for wait in waits]}))
        temporary.replace(run_dir / FILE_NAME)


def load_waits(run_dir: Path) -> SavedWaits | None:
    """Read the file's contents; None when the file cannot be read."""
    try:
        saved = json.loads((run_dir / FILE_NAME).read_text())
        waits = tuple(Wait(str(w["who"]), str(w["for_what"]), float(w["seconds"])) for w in saved["waits"])
        # The age would be negative if the clock was set back.
        return SavedWaits(waits, max(0.0, time.time() - float(saved["saved_at"])))
    except (OSError, ValueError, TypeError, KeyError):
        return None
