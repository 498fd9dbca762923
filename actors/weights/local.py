"""Weights on this host, in the learner's shared memory or in this process's copy, and the check of their checksums."""

from __future__ import annotations

import mmap
import os
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash
from numpy.typing import NDArray

from buffer.transport.messages import Manifest
from buffer.weights.shared_memory import let_go


@dataclass(frozen=True, slots=True)
class LocalWeights:
    """A version whose bytes are on this host, checked against its manifest; a `FetchedVersion`."""

    manifest: Manifest
    path: Path
    held: BinaryIO | None = None
    """The learner's file, locked against reuse."""

    @property
    def policy_version(self) -> int:
        """Completed optimizer steps behind these weights."""
        return self.manifest.policy_version

    def update_info(self) -> dict[str, Any]:
        """Return the fields of `FileUpdateInfo` in `actors/weights/vllm_loader.py`, in plain types."""
        tensors = self.manifest.tensors
        return {
            "path": str(self.path),
            "names": [entry.name for entry in tensors],
            "dtypes": [entry.dtype for entry in tensors],
            "shapes": [list(entry.shape) for entry in tensors],
            "offsets": [entry.offset for entry in tensors],
        }

    def init_info(self) -> dict[str, Any] | None:
        """Return None: a file needs no group."""
        return None

    @property
    def on_host(self) -> bool:
        """True: this process can read the bytes."""
        return True

    def release(self) -> None:
        """Allow the learner to reuse the memory."""
        if self.held is not None:
            let_go(self.held)


class HostCopy:
    """Anonymous memory of this process for one version, which later versions overwrite.

    vLLM's workers open the memory by its path. The kernel frees it when the last process that has it open ends.

    Args:
        num_bytes: size of the memory.

    Raises:
        OSError: there is no room.
    """

    def __init__(self, num_bytes: int) -> None:
        self._descriptor = os.memfd_create("slipstream-weights")
        self.path = Path(f"/proc/{os.getpid()}/fd/{self._descriptor}")
        os.posix_fallocate(self._descriptor, 0, num_bytes)
        self.array: NDArray[np.uint8] = np.frombuffer(mmap.mmap(self._descriptor, num_bytes), np.uint8)
        """[num_bytes] uint8."""
        self.manifest: Manifest | None = None
        """The version in the memory, after its check; None while the memory is being written."""
        self.arriving: TensorCheck | None = None
        """Progress of the version that is being pulled, so that an interrupted pull can be resumed."""

    def __del__(self) -> None:
        os.close(self._descriptor)


class _Mapping:
    """A mapped file."""

    def __init__(self, file: BinaryIO) -> None:
        self.array: NDArray[np.uint8] = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        """[num_bytes] uint8."""
        # Opened anew: a copy of the caller's descriptor would share its lock.
        self._descriptor = os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDONLY | os.O_CLOEXEC)

    @property
    def is_deleted(self) -> bool:
        """Whether the file has no name any more, so that no later version comes in it."""
        return not os.fstat(self._descriptor).st_nlink

    def __del__(self) -> None:
        os.close(self._descriptor)


class Mappings:
    """Keeps the learner's files mapped, because mapping one again costs more than reading all of it.

    Files that were deleted are unmapped, because a mapping keeps a whole version in memory.
    """

    def __init__(self) -> None:
        self._mapped: dict[int, _Mapping] = {}
        """By inode. The learner reuses a file for later versions, and its inode stays the same."""

    def of(self, file: BinaryIO) -> NDArray[np.uint8]:
        """Return the contents of `file`, which the caller holds locked, as [num_bytes] uint8."""
        inode = os.fstat(file.fileno()).st_ino
        self._mapped = {other: mapping for other, mapping in self._mapped.items() if not mapping.is_deleted}
        if inode not in self._mapped:
            self._mapped[inode] = _Mapping(file)
        return self._mapped[inode].array


class TensorCheck:
    """Computes every tensor's checksum while a version arrives, when its bytes are still in the processor's cache.

    Args:
        manifest: holds the expected checksums.
        array: [num_bytes] uint8: the memory that the version arrives in.
    """

    def __init__(self, manifest: Manifest, array: NDArray[np.uint8]) -> None:
        self.manifest, self._array = manifest, array
        self.num_bytes = 0
        """Number of bytes that have arrived, counted from the start."""
        self._unread = deque(sorted(manifest.tensors, key=lambda entry: entry.offset))
        self._begun = xxhash.xxh3_64()
        """Hash of the bytes read so far of the first tensor in `_unread`."""
        self._num_read = 0
        """Number of those bytes."""
        self._wrong: list[str] = []

    def advance(self, num_bytes: int) -> None:
        """Hash the bytes before `num_bytes`, which have arrived and do not change."""
        self.num_bytes = num_bytes
        while self._unread:
            entry = self._unread[0]
            until = min(num_bytes - entry.offset, entry.num_bytes)
            if until > self._num_read:
                self._begun.update(self._array[entry.offset + self._num_read : entry.offset + until].data)
                self._num_read = until
            if until < entry.num_bytes:
                return
            found = self._begun.hexdigest()
            if found != entry.checksum:
                self._wrong.append(
                    f"tensor {entry.name} arrived with checksum {found}, the learner published {entry.checksum}"
                )
            self._unread.popleft()
            self._begun.reset()
            self._num_read = 0

    def finish(self) -> None:
        """Read the remaining bytes and compare all checksums.

        Raises:
            RuntimeError: a checksum differs; the message names the tensor.
        """
        self.advance(self.manifest.num_bytes)
        if self._wrong:
            raise RuntimeError(f"policy {self.manifest.policy_version}: {self._wrong[0]}")


def check_tensors(manifest: Manifest, array: NDArray[np.uint8]) -> None:
    """Compare the checksum of every tensor in `array`.

    Raises:
        RuntimeError: a checksum differs; the message names the tensor.
    """
    TensorCheck(manifest, array).finish()
