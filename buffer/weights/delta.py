"""Lossless deltas between two versions of the same layout, in a fraction of the version's bytes.

```
block     2^20 neighboring numbers of one size; a file is cut into blocks by `Layout`
changed   positions in the block whose bits differ, encoded as gaps between them
step      new bits minus old bits, modulo 2^bits, zigzag encoded: small for a small change of either sign
plane     the same byte of every gap, or of every step; planes are compressed one by one, and high ones are nearly all 0
```

A number is treated as its bits, so nothing is rounded and NaN is no special case. At the learning rates of
reinforcement learning one optimizer step leaves most numbers of a bfloat16 model unchanged, and moves the others by one
or two units in the last place.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

BLOCK_NUMBERS = 1 << 20
SAMPLE_EVERY = 32
"""Every 32nd block is encoded first, to estimate the delta's size."""
HEAD = struct.Struct("<IBB")
"""Number of changed numbers in the block, number of planes of their gaps, number of planes of their steps."""
LENGTH = struct.Struct("<I")
"""Compressed size of a plane in bytes."""
UNSIGNED: dict[int, type[np.unsignedinteger[Any]]] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
Bytes = NDArray[np.uint8]
Layout = Sequence[tuple[int, int, int]]
"""Ranges of a file: (offset in bytes, length in bytes, size of one number in bytes), aligned to the number's size."""


class DeltaError(ValueError):
    """The bytes are not a delta for this layout."""


def encode(old: Bytes, new: Bytes, layout: Layout, limit: int) -> bytes:
    """Compute the delta that turns `old` into `new`; empty when the delta would be larger than `limit` bytes.

    Args:
        old: [num_bytes] uint8, the base.
        new: [num_bytes] uint8.
        layout: the ranges that are compared.
        limit: size in bytes above which the whole version is sent instead.
    """
    blocks = list(zip(_blocks(old, layout), _blocks(new, layout), strict=True))
    # Encoding takes long when most numbers have changed; a sample of the blocks predicts that.
    sample = blocks[SAMPLE_EVERY // 2 :: SAMPLE_EVERY]
    if sum(len(_encode_block(*pair)) for pair in sample) * len(blocks) > limit * max(1, len(sample)):
        return b""
    parts: list[bytes] = []
    size = 0
    for before, after in blocks:
        part = _encode_block(before, after)
        parts.append(part)
        size += len(part)
        if size > limit:
            return b""
    return b"".join(parts)


def apply(array: Bytes, delta: bytes | memoryview, layout: Layout) -> None:
    """Turn the base in `array` into the new version, in place.

    Raises:
        DeltaError: when the bytes are not a delta for this layout. The array then holds neither version.
    """
    rest = memoryview(delta)
    try:
        for block in _blocks(array, layout):
            rest = _apply_block(block, rest)
    except (struct.error, zstandard.ZstdError) as error:
        raise DeltaError(f"a delta that cannot be read: {error}") from error
    if len(rest):
        raise DeltaError(f"a delta with {len(rest)} bytes too many")


def _blocks(array: Bytes, layout: Layout) -> Iterator[NDArray[np.unsignedinteger[Any]]]:
    for offset, num_bytes, number_bytes in layout:
        numbers = array[offset : offset + num_bytes].view(UNSIGNED[number_bytes])
        for start in range(0, len(numbers), BLOCK_NUMBERS):
            yield numbers[start : start + BLOCK_NUMBERS]


def _encode_block(old: NDArray[np.unsignedinteger[Any]], new: NDArray[np.unsignedinteger[Any]]) -> bytes:
    changed = np.flatnonzero(old != new)
    if not len(changed):
        return HEAD.pack(0, 0, 0)
    gaps = np.diff(changed, prepend=-1).astype(np.uint32) - 1
    signed = (new[changed] - old[changed]).view(f"i{old.itemsize}")
    steps = ((signed << 1) ^ (signed >> (8 * old.itemsize - 1))).view(old.dtype)
    gap_planes, step_planes = _planes(gaps), _planes(steps)
    parts = [HEAD.pack(len(changed), len(gap_planes), len(step_planes))]
    packer = zstandard.ZstdCompressor(level=1, write_checksum=False)
    for plane in (*gap_planes, *step_planes):
        packed = packer.compress(plane)
        parts += [LENGTH.pack(len(packed)), packed]
    return b"".join(parts)


def _planes(numbers: NDArray[np.unsignedinteger[Any]]) -> list[bytes]:
    """Return the lowest byte of every number, then the next byte of every number, up to the highest byte in use."""
    used = max(1, (int(numbers.max()).bit_length() + 7) // 8)
    columns = numbers.view(np.uint8).reshape(len(numbers), -1)
    return [columns[:, index].tobytes() for index in range(used)]


def _apply_block(block: NDArray[np.unsignedinteger[Any]], rest: memoryview) -> memoryview:
    """Apply the first block of the delta `rest`. Returns what follows that block."""
    count, num_gaps, num_steps = HEAD.unpack_from(rest)
    rest = rest[HEAD.size :]
    if not count:
        return rest
    if count > len(block) or num_gaps > 4 or num_steps > block.itemsize:
        raise DeltaError(f"a delta for {count} numbers in a block of {len(block)}")
    gaps, rest = _numbers(rest, count, num_gaps, np.dtype(np.uint32))
    steps, rest = _numbers(rest, count, num_steps, block.dtype)
    changed = np.cumsum(gaps.astype(np.int64) + 1) - 1
    if changed[-1] >= len(block):
        raise DeltaError(f"a delta for number {changed[-1]} in a block of {len(block)}")
    block[changed] += (steps >> 1) ^ (-(steps & 1)).astype(block.dtype)
    return rest


def _numbers(
    rest: memoryview, count: int, num_planes: int, dtype: np.dtype[Any]
) -> tuple[NDArray[np.unsignedinteger[Any]], memoryview]:
    """Decode `count` numbers from their planes. Returns the numbers and what follows the planes."""
    columns = np.zeros((count, dtype.itemsize), np.uint8)
    unpacker = zstandard.ZstdDecompressor()
    for index in range(num_planes):
        [length] = LENGTH.unpack_from(rest)
        packed = rest[LENGTH.size : LENGTH.size + length]
        # Checked first, because decompression allocates the size that the frame claims.
        if zstandard.frame_content_size(packed) != count:
            raise DeltaError(f"a plane that does not hold {count} numbers")
        plane = unpacker.decompress(packed)
        columns[:, index] = np.frombuffer(plane, np.uint8)
        rest = rest[LENGTH.size + length :]
    return columns.view(dtype)[:, 0], rest
