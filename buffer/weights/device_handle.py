"""Records that tell an actor how to get a version from the learner's CUDA device.

With `weights.transport=ipc` or `nccl` the bytes of a version stay on the learner's device. The version's file holds one
of these records instead of the bytes. The file is announced, locked and reused like the file of any other version.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

RECORD_BYTES = 4096


@dataclass(frozen=True, slots=True)
class DeviceHandle:
    """ipc: a buffer on a device, to be opened by another process on the same host. Handles are hexadecimal."""

    device_uuid: str
    storage_handle: str
    """CUDA IPC handle of the allocation that contains the buffer."""
    storage_bytes: int
    storage_offset: int
    """Bytes from the start of the allocation to the buffer."""
    ref_counter_handle: str
    """torch's reference count of the buffer, in shared memory."""
    ref_counter_offset: int
    event_handle: str
    """CUDA IPC handle of an event."""
    waits_for_event: bool
    """Whether the reader must wait for the event before it reads the buffer."""


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """nccl: the rendezvous of the NCCL group."""

    master_address: str
    master_port: int
    world_size: int
    """Members of the group: the learner's rank 0 and every worker of every actor."""


Record = DeviceHandle | Rendezvous
KINDS = {kind.__name__: kind for kind in (DeviceHandle, Rendezvous)}


def pack_record(record: Record) -> bytes:
    """Encode the record as the contents of a version's file, RECORD_BYTES bytes."""
    return json.dumps({"kind": type(record).__name__, **asdict(record)}).encode().ljust(RECORD_BYTES)


def unpack_record(data: bytes) -> Record:
    """Decode the record in the contents of a version's file.

    Raises:
        RuntimeError: when the bytes are not a record, as when learner and actor differ in `weights.transport`.
    """
    try:
        fields = json.loads(data)
        kind: type[DeviceHandle] | type[Rendezvous] = KINDS[fields.pop("kind")]
        return kind(**fields)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RuntimeError("a version's file holds no record of a device; are all processes of one run?") from error
