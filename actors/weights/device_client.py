"""Weights that stay on the learner's CUDA device (`weights.transport=ipc` and `nccl`).

A version's file holds only a record that says how to reach the weights on the device. `DeviceClient` reads the record;
no weights pass through this process, so nothing is pulled and no checksum is compared. While the actor holds the
record's file, the learner does not overwrite the weights.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from actors.weights.manifests import check_manifest, wait_for_manifest
from buffer.transport.connection import Connection, RequestRefused
from buffer.transport.messages import Manifest
from buffer.weights.device_handle import DeviceHandle, Record, Rendezvous, unpack_record
from buffer.weights.shared_memory import hold, let_go


@dataclass(frozen=True, slots=True)
class DeviceWeights:
    """A version on the learner's device; a `FetchedVersion`."""

    manifest: Manifest
    record: Record
    """ipc: a `DeviceHandle`. nccl: a `Rendezvous`."""
    held: BinaryIO
    """The record's file, locked against reuse until `release`."""
    rank_offset: int
    """nccl: the rank of this actor's first worker."""

    @property
    def policy_version(self) -> int:
        """Completed optimizer steps behind these weights."""
        return self.manifest.policy_version

    @property
    def on_host(self) -> bool:
        """False: only vLLM's workers can read the weights."""
        return False

    def update_info(self) -> dict[str, Any]:
        """Return, for ipc, the argument of `IpcTransferEngine`; for nccl, the argument of vLLM's own engine."""
        tensors = self.manifest.tensors
        info = {
            "names": [entry.name for entry in tensors],
            "dtype_names": [entry.dtype for entry in tensors],
            "shapes": [list(entry.shape) for entry in tensors],
        }
        if isinstance(self.record, DeviceHandle):
            return info | {"offsets": [entry.offset for entry in tensors], "handle": asdict(self.record)}
        return info

    def init_info(self) -> dict[str, Any] | None:
        """Return, for nccl, the group to join, which every start of the learner opens anew; for ipc, None."""
        if not isinstance(self.record, Rendezvous):
            return None
        return asdict(self.record) | {"rank_offset": self.rank_offset, "packed": False}

    def release(self) -> None:
        """Allow the learner to overwrite the weights."""
        let_go(self.held)


class DeviceClient:
    """Fetches the records of versions from the learner's weight store; a `VersionClient`.

    Args:
        connection: to the store; stays open after `close`.
        host_id: id of this host's kernel.
        published: the folder of the learner's files.
        rank_offset: nccl: the rank of this actor's first worker.
    """

    def __init__(self, connection: Connection, *, host_id: str, published: Path, rank_offset: int = 0) -> None:
        self._connection, self._host_id, self._published = connection, host_id, published
        self._rank_offset = rank_offset

    @property
    def pulled_bytes(self) -> int:
        """0: the weights never pass through this process."""
        return 0

    async def wait_for_new(self, known_publication: str, wait_seconds: float) -> Manifest | None:
        """Wait for a manifest other than `known_publication`; None when there is none after `wait_seconds`.

        Waits for: the learner's next publication. Unblocked by: the learner. Gives up after: `wait_seconds`, with a
        TimeoutError when the store has not answered in that time and a minute more.
        """
        return await wait_for_manifest(self._connection, known_publication, wait_seconds)

    async def fetch(self, manifest: Manifest) -> DeviceWeights:
        """Read the record of a version and hold its file.

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
            return DeviceWeights(manifest, unpack_record(held.read()), held, self._rank_offset)
        except BaseException:
            let_go(held)
            raise

    def close(self) -> None:
        """Do nothing: the connection belongs to the caller."""


def rank_offset(name: str, workers_per_actor: int, group_size: int) -> int:
    """Return the rank of an actor's first worker in the NCCL group.

    The learner has rank 0, and the workers of actor-0 follow.

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
