"""A version on this host: in the learner's slot or pulled, checked against its manifest before it is handed on."""

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

MAX_MAPPINGS = 8
"""Slots that are kept mapped; then all are let go, those that the learner gave up among them."""


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
        """What `FileTransferEngine` needs, in types that cross to the worker process."""
        tensors = self.manifest.tensors
        return {
            "path": str(self.path),
            "names": [entry.name for entry in tensors],
            "dtypes": [entry.dtype for entry in tensors],
            "shapes": [list(entry.shape) for entry in tensors],
            "offsets": [entry.offset for entry in tensors],
        }

    def init_info(self) -> dict[str, Any] | None:
        """What vLLM's engine must be told before its first load; None: nothing."""
        return None

    @property
    def on_host(self) -> bool:
        """Whether the bytes can be read here, and not only by the engine's workers."""
        return True

    def release(self) -> None:
        """The version is loaded, or not wanted any more; the learner may reuse its memory."""
        if self.held is not None:
            let_go(self.held)


class HostCopy:
    """The pulled version: anonymous memory of this process, which the engine's workers open by its path.

    The kernel frees it when the last of them ends. A later version is written over it.
    """

    def __init__(self, num_bytes: int) -> None:
        self._descriptor = os.memfd_create("slipstream-weights")
        self.path = Path(f"/proc/{os.getpid()}/fd/{self._descriptor}")
        os.posix_fallocate(self._descriptor, 0, num_bytes)
        self.array: NDArray[np.uint8] = np.frombuffer(mmap.mmap(self._descriptor, num_bytes), np.uint8)
        """[num_bytes] uint8."""
        self.manifest: Manifest | None = None
        """What it holds, checked; None while it is being written."""
        self.arriving: TensorCheck | None = None
        """Of the version that is being pulled; a pull that breaks off is resumed where it stands."""

    def __del__(self) -> None:
        os.close(self._descriptor)


class Mappings:
    """The learner's slots as this process sees them, kept: mapping one anew costs more than reading all of it."""

    def __init__(self) -> None:
        self._arrays: dict[int, NDArray[np.uint8]] = {}
        """By the file's inode: a slot keeps it while versions come and go."""
        self._store = ""

    def of(self, file: BinaryIO, manifest: Manifest) -> NDArray[np.uint8]:
        """[num_bytes] uint8: the contents of a held file."""
        store, inode = manifest.publication.partition(":")[0], os.fstat(file.fileno()).st_ino
        if store != self._store or len(self._arrays) >= MAX_MAPPINGS:
            self._arrays, self._store = {}, store
        if inode not in self._arrays:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._arrays[inode] = np.frombuffer(mapped, np.uint8)
        return self._arrays[inode]


class TensorCheck:
    """Takes every tensor's checksum while a version arrives, so that each byte is read while it is in the cache.

    Args:
        manifest: what the tensors must be.
        array: [num_bytes] uint8, where they arrive.
    """

    def __init__(self, manifest: Manifest, array: NDArray[np.uint8]) -> None:
        self.manifest, self._array = manifest, array
        self.num_bytes = 0
        """That arrived, from the first on."""
        self._unread = deque(sorted(manifest.tensors, key=lambda entry: entry.offset))
        self._begun = xxhash.xxh3_64()
        """Over what was read of the first tensor in `_unread`."""
        self._num_read = 0
        """Bytes of it."""
        self._wrong: list[str] = []

    def advance(self, num_bytes: int) -> None:
        """Read on: the first `num_bytes` are there and stay as they are."""
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
        """Read the rest and compare.

        Raises:
            RuntimeError: naming the first tensor that is not what it must be.
        """
        self.advance(self.manifest.num_bytes)
        if self._wrong:
            raise RuntimeError(f"policy {self.manifest.policy_version}: {self._wrong[0]}")


def check_tensors(manifest: Manifest, array: NDArray[np.uint8]) -> None:
    """Compare the checksum of every tensor.

    Raises:
        RuntimeError: naming the tensor.
    """
    TensorCheck(manifest, array).finish()
