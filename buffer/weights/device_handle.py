"""What an actor must know to take a version from a CUDA device, in plain types, as it lies in the version's file.

With `weights.transport=ipc` and `nccl` the bytes of a version stay on the learner's device. Its file in the folder of
versions then holds one of these records in their place, and is announced, locked and reused like any other.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

RECORD_BYTES = 4096


@dataclass(frozen=True, slots=True)
class DeviceHandle:
    """A buffer of a device, for another process on the same host. Handles are in hexadecimal digits."""

    device_uuid: str
    storage_handle: str
    """CUDA's name of the allocation that the buffer lies in."""
    storage_bytes: int
    storage_offset: int
    """Bytes from the start of the allocation."""
    ref_counter_handle: str
    """torch's count of readers, in shared memory."""
    ref_counter_offset: int
    event_handle: str
    waits_for_event: bool


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Where the members of an NCCL group meet for the first time."""

    master_address: str
    master_port: int
    world_size: int
    """The learner's rank 0 and every worker of every actor."""


Record = DeviceHandle | Rendezvous
KINDS = {kind.__name__: kind for kind in (DeviceHandle, Rendezvous)}


def pack_record(record: Record) -> bytes:
    """[RECORD_BYTES] as they are written to a version's file."""
    return json.dumps({"kind": type(record).__name__, **asdict(record)}).encode().ljust(RECORD_BYTES)


def unpack_record(data: bytes) -> Record:
    """What `pack_record` packed.

    Raises:
        RuntimeError: it is no record; the learner has another `weights.transport` than its reader.
    """
    try:
        fields = json.loads(data)
        kind: type[DeviceHandle] | type[Rendezvous] = KINDS[fields.pop("kind")]
        return kind(**fields)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RuntimeError("a version's file holds no record of a device; are all processes of one run?") from error
