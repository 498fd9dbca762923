"""The weight store: immutable policy versions, whole before they are announced, taken by whoever wants them.

The learner calls `publish`, which copies its parameters into memory that actors map, and goes on; checksums, names and
the announcement follow behind the next step. A slow or dead actor costs the learner nothing.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

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


class WeightStore:
    """Keeps the newest versions in `directory` and serves them.

    Args:
        directory: what actors know as the folder of versions, emptied of older runs' versions at the start.
        config: address, and how many versions are kept.
        credentials: the run's id and the server's keys.
        memory: a folder in shared memory, to which `directory` then leads; None: `directory` itself holds the files.

    Raises:
        ValueError: when the address is in use or is none, or is not local and the credentials have no keys.
    """

    def __init__(
        self, directory: Path, config: WeightsConfig, credentials: Credentials, memory: Path | None = None
    ) -> None:
        self._directory = directory
        self._slots = SegmentPool(link_folder(directory, memory))
        self._store_id = uuid.uuid4().hex[:8]
        self._host_id = host_id()
        self._entries: tuple[TensorEntry, ...] = ()
        """The layout, the same in every version."""
        self._num_bytes = 0
        self._spare: Segment | None = None
        self._server = WeightServer(
            config.address,
            credentials,
            keep_versions=config.keep_versions,
            bytes_per_second=config.bytes_per_second,
            relay_fanout=config.relay_fanout,
        )
        self._background = ThreadPoolExecutor(1, thread_name_prefix="publish")

    def publish(self, policy_version: int, tensors: NamedTensors, dtype: torch.dtype | None = None) -> Future[Manifest]:
        """Copy a version; announce it in the background. One at a time: wait for the future before the next call.

        Args:
            policy_version: completed optimizer steps behind these weights.
            tensors: (Hugging Face name, tensor on any device), each read before the next one is asked for.
            dtype: what floating-point tensors are published in; None: as they are.

        Raises:
            OSError: there is no room; also through the future.
            ValueError: the tensors are not those of the version before.
        """
        started = time.monotonic()
        try:
            slot = self._fill(tensors, dtype)
        except OSError as error:
            raise self._explained(policy_version, error) from error
        return self._background.submit(self._announce, policy_version, slot, started)

    def _fill(self, tensors: NamedTensors, dtype: torch.dtype | None) -> Segment:
        if not self._entries:
            # Only when all have been seen is it known how much room they need.
            tensors = [(name, tensor.detach().to("cpu", dtype, copy=True)) for name, tensor in tensors]
            self._entries = _lay_out(tensors)
            self._num_bytes = self._entries[-1].offset + self._entries[-1].num_bytes
        slot, self._spare = self._spare or self._take(), None
        expected = iter(self._entries)
        for name, tensor in tensors:
            entry = next(expected, None)
            if entry is None or (entry.name, entry.shape) != (name, tuple(tensor.shape)):
                raise ValueError(f"tensor {name} of shape {tuple(tensor.shape)} is not what was published before")
            self._tensor(slot, entry).copy_(tensor.detach())
        if (missing := next(expected, None)) is not None:
            raise ValueError(f"tensor {missing.name} was published before and is missing now")
        return slot

    def _announce(self, policy_version: int, slot: Segment, started: float) -> Manifest:
        entries = self._seal(slot)
        try:
            path = slot.publish(f"v{policy_version:08d}-{self._store_id}.weights")
        except OSError as error:
            raise self._explained(policy_version, error) from error
        publication = f"{self._store_id}:{policy_version}"
        manifest = Manifest(policy_version, publication, str(path.resolve()), self._host_id, self._num_bytes, entries)
        retired = self._server.announce(manifest, slot)
        self._deliver(policy_version, slot)
        seconds = time.monotonic() - started
        logger.info("policy %d published in %.3f s (%.1f MB)", policy_version, seconds, self._num_bytes / 1e6)
        self._prepare_next(retired)
        return manifest

    # --- where the bytes lie: what `learner/weights/device_store.py` does otherwise ---

    def _take(self) -> Segment:
        """A slot with room for a version.

        Raises:
            OSError: there is none.
        """
        return self._slots.take(self._num_bytes)

    def _tensor(self, slot: Segment, entry: TensorEntry) -> Tensor:
        """The place of a tensor in a slot's version."""
        return torch.from_numpy(_place(slot, entry)).view(getattr(torch, entry.dtype)).view(entry.shape)

    def _seal(self, slot: Segment) -> tuple[TensorEntry, ...]:
        """The layout with checksums, once every byte is there."""
        return tuple(replace(entry, checksum=checksum(_place(slot, entry))) for entry in self._entries)

    def _deliver(self, policy_version: int, slot: Segment) -> None:
        """After the announcement: nothing, readers come by themselves."""

    def _prepare_next(self, retired: list[Segment]) -> None:
        """Have memory ready for the next version, so that the learner never waits for it."""
        for slot in retired:
            self._slots.retire(slot)
        try:
            self._spare = self._take()
        except OSError as error:
            # There may be room again by then; if not, that publication says so.
            logger.warning("no room for the next version in %s yet: %s", self._directory, error)

    def _explained(self, policy_version: int, error: OSError) -> OSError:
        return OSError(
            f"policy {policy_version} cannot be published to {self._directory}: {error.strerror or error}; make room or"
            " restore the folder (weights.keep_versions versions and one more are held; weights.shared_memory=false"
            " uses the run directory instead of memory), a restarted learner goes on from its newest checkpoint"
        )

    def close(self) -> None:
        """Finish the publication under way, stop serving, and remove the versions."""
        self._background.shutdown(wait=True)
        for slot in [*self._server.close(), *([self._spare] if self._spare else [])]:
            slot.remove()
        self._slots.close()
        if self._directory.is_symlink():
            self._directory.unlink()


def _lay_out(tensors: list[tuple[str, Tensor]]) -> tuple[TensorEntry, ...]:
    """Where each tensor lies in a version; checksums are not known yet."""
    entries, offset = [], 0
    for name, tensor in tensors:
        offset += -offset % ALIGNMENT_BYTES
        entries.append(
            TensorEntry(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), offset, tensor.nbytes, "")
        )
        offset += tensor.nbytes
    return tuple(entries)


def _place(slot: Segment, entry: TensorEntry) -> NDArray[np.uint8]:
    """[num_bytes] uint8: where the tensor's bytes lie."""
    return slot.array[entry.offset : entry.offset + entry.num_bytes]
