"""Writes tensors and training state to files and reads them back without unpickling arbitrary objects.

The learner writes and reads all such files with this module. Reading creates tensors, plain containers and the classes
that the caller allows, and refuses everything else that a file names.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def write_state(state: Any, path: Path) -> None:
    """Write `state` to `path`.

    Raises:
        OSError: when the file cannot be written; torch raises RuntimeError for some of these cases.
    """
    try:
        torch.save(state, path)
    except RuntimeError as error:
        raise OSError(f"{path} cannot be written: {str(error).splitlines()[0]}") from error


def read_state_file(path: Path, allowed: Sequence[type | Any] = ()) -> Any:
    """Read what `write_state` wrote, into host memory.

    Raises:
        pickle.UnpicklingError: when the file names a class or function that is not in `allowed`.
    """
    with torch.serialization.safe_globals(list(allowed)):
        return torch.load(path, map_location="cpu", weights_only=True)
