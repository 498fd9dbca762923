"""Who waits for whom, since when, kept beside the ledger for `python -m buffer inspect`.

The buffer refreshes `RUN_DIR/waits.json` while it runs; whoever reads it is told how old it is. It is a display and
no part of the ledger: wall-clock times stand in it, and a file that cannot be written or read is passed over.
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
REFRESH_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class SavedWaits:
    """What the buffer knew `age_seconds` ago."""

    waits: tuple[Wait, ...]
    age_seconds: float


def save_waits(run_dir: Path, waits: Sequence[Wait]) -> None:
    """Replace the file. A full disk must not end the buffer for a display's sake."""
    temporary = run_dir / f"{FILE_NAME}.incomplete"
    with suppress(OSError):
        temporary.write_text(json.dumps({"saved_at": time.time(), "waits": [asdict(wait) for wait in waits]}))
        temporary.replace(run_dir / FILE_NAME)


def load_waits(run_dir: Path) -> SavedWaits | None:
    """The file's contents; None when there is none to be read."""
    try:
        saved = json.loads((run_dir / FILE_NAME).read_text())
        waits = tuple(Wait(str(w["who"]), str(w["for_what"]), float(w["seconds"])) for w in saved["waits"])
        # A clock that was set back since would give a negative age.
        return SavedWaits(waits, max(0.0, time.time() - float(saved["saved_at"])))
    except (OSError, ValueError, TypeError, KeyError):
        return None
