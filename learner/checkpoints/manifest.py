"""Finds checkpoints, and writes and checks the manifest of each: size and digest of every file.

The manifest is written last and checked before loading. The check finds files that a failing disk or an interrupted
copy damaged. It does not prove who wrote them: anyone who can write to the folder can write the manifest too.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

FILE_NAME = "manifest.json"


def complete_checkpoints(directory: Path) -> list[Path]:
    """Return the folders of the complete checkpoints in RUN_DIR/checkpoints, newest first. Their files are not read."""
    numbered = [path for path in directory.glob("*") if path.name.isdigit()]
    return sorted(numbered, key=lambda path: int(path.name), reverse=True)


def newest_checkpoint(directory: Path) -> Path | None:
    """Return the complete checkpoint with the highest version in RUN_DIR/checkpoints; None before the first."""
    return next(iter(complete_checkpoints(directory)), None)


def write_manifest(folder: Path) -> None:
    """Write the manifest of the files that are in `folder`.

    Raises:
        OSError: when a file cannot be read or the manifest cannot be written.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / FILE_NAME)
    entries = {path.relative_to(folder).as_posix(): [path.stat().st_size, _digest(path)] for path in files}
    (folder / FILE_NAME).write_text(json.dumps(entries, indent=1))


def defect(folder: Path) -> str | None:
    """Describe the first damaged or missing file; None when every file is as it was written."""
    try:
        entries: dict[str, tuple[int, str]] = json.loads((folder / FILE_NAME).read_text())
        for name, (num_bytes, digest) in entries.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != num_bytes:
                return f"{name} has {path.stat().st_size} bytes instead of {num_bytes}"
            if _digest(path) != digest:
                return f"{name} has other contents than were written"
    except FileNotFoundError:
        return f"{FILE_NAME} is missing"
    except OSError as error:
        return str(error)
    except (ValueError, TypeError, AttributeError):
        # A damaged manifest may still be valid JSON of any shape.
        return f"{FILE_NAME} cannot be understood"
    return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()
