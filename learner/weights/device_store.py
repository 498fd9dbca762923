"""Versions that stay on the learner's CUDA device, for `weights.transport=ipc` and `nccl`.

`ipc`: actors on the same host and device map the learner's buffers. `nccl`: the learner's rank 0 broadcasts every
version to a fixed NCCL group of actors. Announcements and locks are those of the weight store, but the file of a
version holds a record instead of weights: a `DeviceHandle` to map the buffer, or the `Rendezvous` of the group.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from buffer.transport.credentials import Credentials
from buffer.transport.messages import TensorEntry
from buffer.weights.config import WeightsConfig
from buffer.weights.device_handle import RECORD_BYTES, DeviceHandle, Record, Rendezvous, pack_record
from buffer.weights.shared_memory import Segment, SegmentPool, link_folder
from learner.weights.store import HostMemory, Version, WeightStore

Send = Callable[[Version], None]
Join = Callable[[Rendezvous, torch.device, Version], Send]


def export_handle(buffer: Tensor) -> DeviceHandle:
    """Describe `buffer`, a whole tensor [num_bytes] uint8 on a CUDA device, so that another process can map it.

    Call it once per buffer: torch adds a reader count to the storage with every export.
    """
    _, arguments = reduce_tensor(buffer)  # type: ignore[no-untyped-call]
    # The arguments of torch's `rebuild_cuda_tensor`, in order; the reader knows the other arguments already.
    storage_handle, storage_bytes, storage_offset, _, counter, counter_offset, event, waits = arguments[7:15]
    return DeviceHandle(
        device_uuid=str(torch.cuda.get_device_properties(buffer.device).uuid),
        storage_handle=storage_handle.hex(),
        storage_bytes=storage_bytes,
        storage_offset=storage_offset,
        ref_counter_handle=counter.hex(),
        ref_counter_offset=counter_offset,
        event_handle=event.hex(),
        waits_for_event=waits,
    )


class DeviceMemory:
    """Buffers on a device, each with a segment: a file that holds a record.

    Args:
        directory: as in `HostMemory`, like `shared_memory`.
        device: where the buffers are.
        describe: makes the record of a buffer.
    """

    def __init__(
        self,
        directory: Path,
        shared_memory: Path | None,
        device: torch.device,
        describe: Callable[[Tensor], Record] = export_handle,
    ) -> None:
        self._segments = SegmentPool(link_folder(directory, shared_memory))
        self._device, self._describe = device, describe
        self._buffers: dict[Segment, Tensor] = {}
        """Never freed: a slow actor may still read the buffer of a segment that was removed."""
        self._event: torch.cuda.Event | None = None
        """Recorded after the copies of a version."""
        if device.type == "cuda":
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def take(self, num_bytes: int) -> Segment:
        """Return a segment with its buffer of `num_bytes`.

        Raises:
            OSError: when there is no room for the record.
        """
        segment = self._segments.take(RECORD_BYTES)
        if segment not in self._buffers:
            self._buffers[segment] = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
            segment.array[:] = bytearray(pack_record(self._describe(self._buffers[segment])))
        return segment

    def tensor(self, segment: Segment, entry: TensorEntry) -> Tensor:
        """Return a view of one tensor in the buffer of `segment`."""
        flat = self._buffers[segment][entry.offset : entry.offset + entry.num_bytes]
        return flat.view(getattr(torch, entry.dtype)).view(entry.shape)

    def copied(self) -> None:
        """Mark the end of the copies on the current stream."""
        if self._event is not None:
            self._event.record()

    def seal(self, segment: Segment, layout: tuple[TensorEntry, ...]) -> tuple[TensorEntry, ...]:
        """Return `layout` unchanged: the bytes never reach the host, so there are no checksums.

        Waits for: the device's copies, but not for the next optimizer step.
        """
        if self._event is not None:
            self._event.synchronize()
        return layout

    def retire(self, segment: Segment) -> None:
        """Free `segment` and its buffer for a later version, once its readers have finished."""
        self._segments.retire(segment)

    def close(self) -> None:
        """Remove the retired records."""
        self._segments.close()


class GroupBroadcast:
    """`nccl`: broadcasts every version to the actors' workers, in the background of the learner's next step.

    A late worker delays the learner's following publication. A missing one ends the learner: the supervisor restarts
    it, and a new NCCL group forms at a new port.

    Args:
        config: `group_size` members, which wait for each other for up to `rendezvous_seconds`.
        device: where the versions are.
        join: opens the group as rank 0 once all members are there, and returns the function that broadcasts a version.
    """

    def __init__(self, config: WeightsConfig, device: torch.device, join: Join) -> None:
        host = config.address.partition("://")[2].rpartition(":")[0] or "127.0.0.1"
        self._rendezvous = Rendezvous(host, _free_port(host), config.group_size)
        self._device, self._join, self._seconds = device, join, config.rendezvous_seconds
        self._send: Send | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="broadcast")
        """NCCL cannot be told to give up, so it runs in a thread that can be abandoned."""

    def describe(self, buffer: Tensor) -> Rendezvous:
        """Return the record of every version: the rendezvous of the group."""
        return self._rendezvous

    def send(self, policy_version: int, version: Version) -> None:
        """Broadcast a version. Waits for: every member to take part. Gives up after: `rendezvous_seconds`.

        Raises:
            OSError: when it gave up.
        """
        broadcast = self._thread.submit(self._join_and_send, version)
        try:
            broadcast.result(self._seconds)
        except TimeoutError as error:
            raise OSError(
                f"policy {policy_version}: not all {self._rendezvous.world_size - 1} workers of the actors took part in"
                f" the broadcast within weights.rendezvous_seconds={self._seconds:.0f}; an actor died or hangs, its log"
                " says why, and weights=file needs no group"
            ) from error

    def _join_and_send(self, version: Version) -> None:
        if self._send is None:
            self._send = self._join(self._rendezvous, self._device, version)
        self._send(version)

    def close(self) -> None:
        """Abandon a broadcast that never ends."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def open_store(
    directory: Path, config: WeightsConfig, credentials: Credentials, shared_memory: Path | None, device: torch.device
) -> WeightStore:
    """Open the store for `config.transport`; the other arguments are those of `HostMemory` and `WeightStore`.

    Raises:
        ValueError: as `WeightStore` does.
    """
    if config.transport == "file":
        return WeightStore(directory, config, credentials, HostMemory(directory, shared_memory))
    if config.transport == "ipc":
        return WeightStore(directory, config, credentials, DeviceMemory(directory, shared_memory, device))
    from learner.weights.nccl_group import join

    group = GroupBroadcast(config, device, join)
    memory = DeviceMemory(directory, shared_memory, device, group.describe)
    return WeightStore(directory, config, credentials, memory, group)
