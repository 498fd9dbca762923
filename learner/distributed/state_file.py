"""The only way tensors and training state become a file and come back: never by unpickling just anything.

Reading builds tensors, plain containers and the classes the caller names, nothing else, whatever a file asks for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def write_state(state: Any, path: Path) -> None:
    """Write `state` to `path`.

    Raises:
        OSError: when it cannot be written, also where torch calls that a RuntimeError.
    """
    try:
        torch.save(state, path)
    except RuntimeError as error:
        raise OSError(f"{path} cannot be written: {str(error).splitlines()[0]}") from error


def read_state_file(path: Path, allowed: Sequence[type | Any] = ()) -> Any:
    """What `write_state` wrote, on the CPU.

    Raises:
        pickle.UnpicklingError: when the file asks for a class or function that is not `allowed`.
    """
    with torch.serialization.safe_globals(list(allowed)):
        return torch.load(path, map_location="cpu", weights_only=True)
