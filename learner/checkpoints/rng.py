"""The states of a process's random number generators, saved in a checkpoint as one file per rank."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch

from learner.distributed.state_file import read_state_file, write_state


def save_generators(path: Path) -> None:
    """Write the states of Python's, numpy's and torch's generators, and of every CUDA device's.

    Raises:
        OSError: when the file cannot be written.
    """
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    state = {
        "python": random.getstate(),
        "numpy": (str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_state(state, path)


def load_generators(path: Path) -> None:
    """Restore the states that `save_generators` wrote; those of CUDA devices only if their number is the same."""
    state = read_state_file(path)
    random.setstate(state["python"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
