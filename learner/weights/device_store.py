"""Versions that stay on the learner's CUDA device: copied there, and taken from there by actors.

`weights.transport=ipc`: actors on the same host and device map the learner's buffer. `weights.transport=nccl`: the
learner's rank 0 and a fixed set of actors meet at every version and the learner broadcasts it. Announcement, names and
locks are those of the weight store; a version's file holds a record in the place of its bytes.
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
from buffer.weights.shared_memory import Segment
from learner.weights.store import NamedTensors, WeightStore

Version = list[tuple[str, Tensor]]
Send = Callable[[Version], None]
Join = Callable[[Rendezvous, torch.device, Version], Send]


def export_handle(buffer: Tensor) -> DeviceHandle:
    """What another process needs to map `buffer`, a whole tensor [num_bytes] uint8 on a CUDA device.

    Every export wraps the storage in another count of readers, so one of a buffer is made once.
    """
    _, arguments = reduce_tensor(buffer)  # type: ignore[no-untyped-call]
    # In the order of torch's `rebuild_cuda_tensor`; the others are what the reader knows anyway.
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


class DeviceStore(WeightStore):
    """`ipc`: each slot is a buffer on `device`, and its file the handle of it.

    Args:
        directory: as in `WeightStore`, like `config`, `credentials` and `memory`.
        device: where versions lie.
        describe: what the file of a buffer holds.
    """

    def __init__(
        self,
        directory: Path,
        config: WeightsConfig,
        credentials: Credentials,
        memory: Path | None,
        device: torch.device,
        describe: Callable[[Tensor], Record] = export_handle,
    ) -> None:
        super().__init__(directory, config, credentials, memory)
        self._device, self._describe = device, describe
        self._buffers: dict[Segment, Tensor] = {}
        """Never given back: an actor that is slow for ever may still read one whose slot was removed."""
        self._copied: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def _fill(self, tensors: NamedTensors, dtype: torch.dtype | None) -> Segment:
        slot = super()._fill(tensors, dtype)
        if self._copied is not None:
            self._copied.record()
        return slot

    def _take(self) -> Segment:
        slot = self._slots.take(RECORD_BYTES)
        if slot not in self._buffers:
            self._buffers[slot] = torch.empty(self._num_bytes, dtype=torch.uint8, device=self._device)
            slot.array[:] = bytearray(pack_record(self._describe(self._buffers[slot])))
        return slot

    def _tensor(self, slot: Segment, entry: TensorEntry) -> Tensor:
        flat = self._buffers[slot][entry.offset : entry.offset + entry.num_bytes]
        return flat.view(getattr(torch, entry.dtype)).view(entry.shape)

    def _seal(self, slot: Segment) -> tuple[TensorEntry, ...]:
        """Without checksums: the bytes never pass the host. Waits for: the device's copies, not for the next step."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._entries


class GroupStore(DeviceStore):
    """`nccl`: every version is broadcast to the group once it is announced, behind the learner's next step.

    A member that is late makes the learner wait at its following publication, one that does not come ends it: the
    supervisor starts the learner again, and a new group meets at a new port.

    Args:
        directory: as in `DeviceStore`, like `credentials`, `memory` and `device`.
        config: `group_size` members meet within `meeting_seconds`.
        join: opens the group for rank 0, waiting for all members, and returns what broadcasts a version.
    """

    def __init__(
        self,
        directory: Path,
        config: WeightsConfig,
        credentials: Credentials,
        memory: Path | None,
        device: torch.device,
        join: Join,
    ) -> None:
        host = config.address.partition("://")[2].rpartition(":")[0] or "127.0.0.1"
        rendezvous = Rendezvous(host, _free_port(host), config.group_size)
        super().__init__(directory, config, credentials, memory, device, lambda _: rendezvous)
        self._rendezvous, self._join, self._seconds = rendezvous, join, config.meeting_seconds
        self._send: Send | None = None
        self._meetings = ThreadPoolExecutor(1, thread_name_prefix="meeting")
        """NCCL cannot be told to give up, so it waits in a thread that can be left behind."""

    def _deliver(self, policy_version: int, slot: Segment) -> None:
        """Waits for: every member to take part. Gives up after: `meeting_seconds`, with an OSError."""
        version = [(entry.name, self._tensor(slot, entry)) for entry in self._entries]
        meeting = self._meetings.submit(self._meet, version)
        try:
            meeting.result(self._seconds)
        except TimeoutError as error:
            raise OSError(
                f"policy {policy_version}: not all {self._rendezvous.world_size - 1} workers of the actors took part in"
                f" the broadcast within weights.meeting_seconds={self._seconds:.0f}; an actor died or hangs, its log"
                " says why, and weights=file needs no group"
            ) from error

    def _meet(self, version: Version) -> None:
        if self._send is None:
            self._send = self._join(self._rendezvous, self._device, version)
        self._send(version)

    def close(self) -> None:
        """As a store does; a meeting that never ends is left behind."""
        super().close()
        self._meetings.shutdown(wait=False, cancel_futures=True)


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def open_store(
    directory: Path, config: WeightsConfig, credentials: Credentials, memory: Path | None, device: torch.device
) -> WeightStore:
    """The store that `config.transport` names.

    Raises:
        ValueError: as `WeightStore` does.
    """
    if config.transport == "file":
        return WeightStore(directory, config, credentials, memory)
    if config.transport == "ipc":
        return DeviceStore(directory, config, credentials, memory, device)
    from learner.weights.nccl_group import join

    return GroupStore(directory, config, credentials, memory, device, join)
