"""The format of a version's file, shared by its writer and its readers: alignment, checksums, names, layout."""

from __future__ import annotations

import math

import numpy as np
import xxhash
from numpy.typing import NDArray

from buffer.transport.messages import TensorEntry
from buffer.weights.delta import Layout

ALIGNMENT_BYTES = 64
"""Alignment of every tensor's offset in a version's file."""
LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"
"""Suffixes of the names of a LoRA adapter's two matrices, which are published instead of a layer's weight."""


def checksum(data: bytes | memoryview | NDArray[np.uint8]) -> str:
    """Return the XXH3 of the bytes, 16 hexadecimal digits. As fast as memory; detects damage, not forgery."""
    return xxhash.xxh3_64_hexdigest(data.data if isinstance(data, np.ndarray) else data)


def layout_of(tensors: tuple[TensorEntry, ...]) -> Layout:
    """Return the ranges of a version's file that hold numbers of one size, with the padding between the tensors."""
    runs: list[tuple[int, int, int]] = []
    for entry in tensors:
        number_bytes = entry.num_bytes // max(1, math.prod(entry.shape))
        if runs and runs[-1][2] == number_bytes:
            runs[-1] = (runs[-1][0], entry.offset + entry.num_bytes - runs[-1][0], number_bytes)
        elif number_bytes:
            runs.append((entry.offset, entry.num_bytes, number_bytes))
    return runs
