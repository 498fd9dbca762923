"""The weight store: publishes immutable policy versions, which actors map or pull.

`publish` copies the learner's parameters into memory and returns. Checksums, the file name and the announcement follow
in the background, during the next optimizer step. A version is announced only when it is complete. A slow or dead
actor never delays the learner, except under `weights.transport=nccl`.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from buffer.transport.connection import host_id
from buffer.transport.credentials import Credentials
from buffer.transport.messages import Manifest, TensorEntry
from buffer.weights.config import WeightsConfig
from buffer.weights.layout import ALIGNMENT_BYTES, checksum
from buffer.weights.server import WeightServer
from buffer.weights.shared_memory import Segment, SegmentPool, link_folder

logger = logging.getLogger(__name__)

NamedTensors = Iterable[tuple[str, Tensor]]
Version = list[tuple[str, Tensor]]
"""The tensors of one version by name, in the order of its layout."""


class Publisher(Protocol):
    """What the training loop calls."""

    def publish(self, policy_version: int, tensors: NamedTensors, dtype: torch.dtype | None = None) -> Future[Manifest]:
        """Publish a version, as `WeightStore.publish` does."""


class VersionMemory(Protocol):
    """The memory that versions are written to: one segment each."""

    def take(self, num_bytes: int) -> Segment:
        """Return a segment for a version of `num_bytes`.

        Raises:
            OSError: when there is no room.
        """

    def tensor(self, segment: Segment, entry: TensorEntry) -> Tensor:
        """Return a view of one tensor of the version in `segment`."""

    def copied(self) -> None:
        """Note that all copies of a version are issued; called by the training thread."""

    def seal(self, segment: Segment, layout: tuple[TensorEntry, ...]) -> tuple[TensorEntry, ...]:
        """Return `layout` with checksums, if this memory has any. Waits for: the copies, but not for later work."""

    def retire(self, segment: Segment) -> None:
        """Free `segment` for a later version, once its readers have finished."""

    def close(self) -> None:
        """Remove the retired segments."""


class Broadcast(Protocol):
    """Sends versions to actors that do not read versions by themselves."""

    def send(self, policy_version: int, version: Version) -> None:
        """Send an announced version.

        Raises:
            OSError: when a receiver does not take part.
        """

    def close(self) -> None:
        """End the broadcast."""


class HostMemory:
    """Files that actors map.

    Args:
        directory: the folder that actors know. Versions of earlier runs are removed from it.
        shared_memory: a folder in shared memory that holds the files, with `directory` a link to it; None: the files
            are in `directory` itself.
    """

    def __init__(self, directory: Path, shared_memory: Path | None = None) -> None:
        self._segments = SegmentPool(link_folder(directory, shared_memory))

    def take(self, num_bytes: int) -> Segment:
        """Return a file of `num_bytes`.

        Raises:
            OSError: when there is no room.
        """
        return self._segments.take(num_bytes)

    def tensor(self, segment: Segment, entry: TensorEntry) -> Tensor:
        """Return a view of one tensor in the mapped file."""
        return torch.from_numpy(_bytes_of(segment, entry)).view(getattr(torch, entry.dtype)).view(entry.shape)

    def copied(self) -> None:
        """Do nothing: a copy to the host has finished when it returns."""

    def seal(self, segment: Segment, layout: tuple[TensorEntry, ...]) -> tuple[TensorEntry, ...]:
        """Return `layout` with a checksum for every tensor."""
        return tuple(replace(entry, checksum=checksum(_bytes_of(segment, entry))) for entry in layout)

    def retire(self, segment: Segment) -> None:
        """Free `segment` for a later version, once its readers have finished."""
        self._segments.retire(segment)

    def close(self) -> None:
        """Remove the retired files."""
        self._segments.close()


class WeightStore:
    """Keeps the newest versions and serves them to actors.

    Args:
        directory: the folder that actors know.
        config: address, and how many versions are kept.
        credentials: the run's id and the server's keys.
        memory: where the versions are written; None: to files in `directory`.
        broadcast: sends each version after its announcement; None: actors read versions by themselves.

    Raises:
        ValueError: when the address is invalid or in use, or is not local and the credentials have no keys.
    """

    def __init__(
        self,
        directory: Path,
        config: WeightsConfig,
        credentials: Credentials,
        memory: VersionMemory | None = None,
        broadcast: Broadcast | None = None,
    ) -> None:
        self._directory = directory
        self._memory = HostMemory(directory) if memory is None else memory
        self._broadcast = broadcast
        self._store_id = uuid.uuid4().hex[:8]
        self._host_id = host_id()
        self._layout: tuple[TensorEntry, ...] = ()
        """The same for every version; empty before the first."""
        self._num_bytes = 0
        self._spare: Segment | None = None
        """Memory for the next version."""
        self._server = WeightServer(
            config.address,
            credentials,
            keep_versions=config.keep_versions,
            bytes_per_second=config.bytes_per_second,
            relay_fanout=config.relay_fanout,
            concurrent_pulls=config.concurrent_pulls,
        )
        self._background = ThreadPoolExecutor(1, thread_name_prefix="publish")

    def publish(self, policy_version: int, tensors: NamedTensors, dtype: torch.dtype | None = None) -> Future[Manifest]:
        """Copy a version now and announce it in the background.

        One version at a time: wait for the future before the next call.

        Args:
            policy_version: completed optimizer steps behind these weights.
            tensors: (Hugging Face name, tensor on any device). Each is read before the next is asked for.
            dtype: of the published floating-point tensors; None: unchanged.

        Raises:
            OSError: when there is no room; also through the future.
            ValueError: when names or shapes differ from those of the version before.
        """
        started = time.monotonic()
        try:
            segment = self._fill(tensors, dtype)
        except OSError as error:
            raise self._explained(policy_version, error) from error
        return self._background.submit(self._announce, policy_version, segment, started)

    def _fill(self, tensors: NamedTensors, dtype: torch.dtype | None) -> Segment:
        if not self._layout:
            # The size of a version is known only after all of its tensors were seen.
            tensors = [(name, tensor.detach().to("cpu", dtype, copy=True)) for name, tensor in tensors]
            self._layout = _lay_out(tensors)
            self._num_bytes = self._layout[-1].offset + self._layout[-1].num_bytes
        segment, self._spare = self._spare or self._memory.take(self._num_bytes), None
        expected = iter(self._layout)
        for name, tensor in tensors:
            entry = next(expected, None)
            if entry is None or (entry.name, entry.shape) != (name, tuple(tensor.shape)):
                raise ValueError(f"tensor {name} of shape {tuple(tensor.shape)} is not what was published before")
            self._memory.tensor(segment, entry).copy_(tensor.detach())
        if (missing := next(expected, None)) is not None:
            raise ValueError(f"tensor {missing.name} was published before and is missing now")
        self._memory.copied()
        return segment

    def _announce(self, policy_version: int, segment: Segment, started: float) -> Manifest:
        layout = self._memory.seal(segment, self._layout)
        try:
            path = segment.publish(f"v{policy_version:08d}-{self._store_id}.weights")
        except OSError as error:
            raise self._explained(policy_version, error) from error
        publication = f"{self._store_id}:{policy_version}"
        manifest = Manifest(policy_version, publication, str(path.resolve()), self._host_id, self._num_bytes, layout)
        retired = self._server.announce(manifest, segment)
        if self._broadcast is not None:
            version = [(entry.name, self._memory.tensor(segment, entry)) for entry in self._layout]
            self._broadcast.send(policy_version, version)
        seconds = time.monotonic() - started
        logger.info("policy %d published in %.3f s (%.1f MB)", policy_version, seconds, self._num_bytes / 1e6)
        self._prepare_next(retired)
        return manifest

    def _prepare_next(self, retired: list[Segment]) -> None:
        """Take memory for the next version in advance, so that the learner never waits for it."""
        for segment in retired:
            self._memory.retire(segment)
        try:
            self._spare = self._memory.take(self._num_bytes)
        except OSError as error:
            # There may be room again when the next version comes; otherwise its publication raises the error.
            logger.warning("no room for the next version in %s yet: %s", self._directory, error)

    def _explained(self, policy_version: int, error: OSError) -> OSError:
        return OSError(
            f"policy {policy_version} cannot be published to {self._directory}: {error.strerror or error}; make room or"
            " restore the folder (weights.keep_versions versions and one more are held; weights.shared_memory=false"
            " uses the run directory instead of memory), a restarted learner goes on from its newest checkpoint"
        )

    def close(self) -> None:
        """Finish the publication under way, stop serving, and remove all versions."""
        self._background.shutdown(wait=True)
        for segment in [*self._server.close(), *([self._spare] if self._spare else [])]:
            segment.remove()
        self._memory.close()
        if self._directory.is_symlink():
            self._directory.unlink()
        if self._broadcast is not None:
            self._broadcast.close()


def _lay_out(tensors: Version) -> tuple[TensorEntry, ...]:
    """Compute the offset of each tensor in a version; without checksums."""
    entries, offset = [], 0
    for name, tensor in tensors:
        offset += -offset % ALIGNMENT_BYTES
        entries.append(
            TensorEntry(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), offset, tensor.nbytes, "")
        )
        offset += tensor.nbytes
    return tuple(entries)


def _bytes_of(segment: Segment, entry: TensorEntry) -> NDArray[np.uint8]:
    """Return a view of one tensor in `segment`, [num_bytes] uint8."""
    return segment.array[entry.offset : entry.offset + entry.num_bytes]
