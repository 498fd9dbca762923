"""Versions that stay on the learner's CUDA device: what an actor fetches is the record that says how to take one.

`weights.transport=ipc` and `nccl`. Waiting for a version is as in `actors/weights/client.py`; nothing is pulled, and
nothing is checked here, because no byte passes the host. A record is held like a file: while it is, the learner does
not write another version over the one it describes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from actors.weights.client import WeightClient
from actors.weights.local import LocalWeights, check_manifest
from buffer.transport.connection import Connection, RequestRefused
from buffer.transport.messages import Manifest
from buffer.weights.device_handle import DeviceHandle, Record, Rendezvous, unpack_record
from buffer.weights.shared_memory import hold, let_go


@dataclass(frozen=True, slots=True)
class DeviceWeights(LocalWeights):
    """A version on the learner's device, held until `release`."""

    record: Record | None = None
    rank_offset: int = 0
    """nccl: the rank of this actor's first worker."""

    def update_info(self) -> dict[str, Any]:
        """ipc: for `IpcTransferEngine`. nccl: for vLLM's own engine."""
        tensors = self.manifest.tensors
        told = {
            "names": [entry.name for entry in tensors],
            "dtype_names": [entry.dtype for entry in tensors],
            "shapes": [list(entry.shape) for entry in tensors],
        }
        if isinstance(self.record, DeviceHandle):
            return told | {"offsets": [entry.offset for entry in tensors], "handle": asdict(self.record)}
        return told

    def init_info(self) -> dict[str, Any] | None:
        """nccl: the group to join, another one after every start of the learner."""
        if not isinstance(self.record, Rendezvous):
            return None
        return asdict(self.record) | {"rank_offset": self.rank_offset, "packed": False}

    @property
    def on_host(self) -> bool:
        """No."""
        return False


class DeviceClient(WeightClient):
    """Takes records of versions from the learner's weight store.

    Args:
        connection: to the store; not closed here.
        host_id: this host's kernel.
        published: the folder of the learner's files.
        rank_offset: nccl: the rank of this actor's first worker.
    """

    def __init__(self, connection: Connection, *, host_id: str, published: Path, rank_offset: int = 0) -> None:
        super().__init__(connection, host_id=host_id, published=published, chunk_bytes=1, deltas=False)
        self._rank_offset = rank_offset

    async def fetch(self, manifest: Manifest) -> DeviceWeights:
        """The record of a version.

        Raises:
            RuntimeError: the learner is on another host, or the manifest contradicts itself.
            RequestRefused: the version is gone; ask for the newest manifest.
        """
        check_manifest(manifest)
        path = Path(manifest.path)
        if manifest.host_id != self._host_id or not path.resolve().is_relative_to(self._published.resolve()):
            raise RuntimeError(
                f"policy {manifest.policy_version} is on a device of another host than this actor's; weights=file"
                " reaches actors there"
            )
        try:
            held = hold(path)
        except FileNotFoundError as error:
            raise RequestRefused(f"policy {manifest.policy_version} is not kept any more") from error
        try:
            return DeviceWeights(manifest, path, held, unpack_record(held.read()), self._rank_offset)
        except BaseException:
            let_go(held)
            raise


def rank_offset(name: str, workers_per_actor: int, group_size: int) -> int:
    """The rank of an actor's first worker in the group; the learner is rank 0, actor-0 comes next.

    Raises:
        ValueError: the group has no place for an actor of this name.
    """
    number = name.removeprefix("actor-")
    num_actors = (group_size - 1) // workers_per_actor
    if not number.isdecimal() or int(number) >= num_actors:
        raise ValueError(
            f"weights.transport=nccl admits the run's own actors only, actor-0 to actor-{num_actors - 1}, and {name} is"
            " none of them; with weights=file actors join at any time"
        )
    return 1 + int(number) * workers_per_actor
