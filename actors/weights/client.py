"""Fetches published weights to this host while generation goes on (`weights.transport=file`).

The file of the learner, or of a relay, is memory-mapped when it is on this host; otherwise the weights are pulled over
the network. The checksum of every tensor is checked in both cases. `actors/weights/vllm_loader.py` loads the result.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from actors.weights.local import LocalWeights, Mappings, check_tensors
from actors.weights.manifests import check_manifest, wait_for_manifest
from actors.weights.pull import Puller
from buffer.transport.connection import Connection, RequestRefused
from buffer.transport.messages import Manifest
from buffer.weights.shared_memory import hold, let_go

logger = logging.getLogger(__name__)

RELAY_RETRY_SECONDS = 300.0
"""Time for which a relay that failed is not asked again."""
RELAY_SECONDS = 30.0
"""Longest wait until a relay has a version, in seconds. After that the actor asks the learner's store."""


class WeightClient:
    """Fetches versions from the learner's weight store; a `VersionClient`.

    Args:
        connection: to the store; stays open after `close`.
        host_id: id of this host's kernel; only files of processes with the same id are mapped. Empty: none are.
        published: the folder of the learner's files. A file outside it is not mapped, whatever path a manifest names.
        chunk_bytes: size of one pulled chunk.
        deltas: whether to ask for the difference to the version that was pulled before.
        relays: a folder with one folder per relay, whose files may be mapped too.
        connect: opens a connection to a relay's address; None: use no relays.
        whole: converts a fetched version, in a thread (`Merger.whole` in `actors/weights/adapters.py`); None: no
            conversion.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        host_id: str,
        published: Path,
        chunk_bytes: int,
        deltas: bool = True,
        relays: Path | None = None,
        connect: Callable[[str], Connection] | None = None,
        whole: Callable[[LocalWeights], LocalWeights] | None = None,
    ) -> None:
        self._connection, self._connect, self._whole = connection, connect, whole
        self._host_id, self._published, self._relays = host_id, published, relays
        self._puller = Puller(chunk_bytes, deltas)
        self._mapped = Mappings()
        self._relay: Connection | None = None
        self._failed_relays: dict[str, float] = {}
        """Event loop's time of the last failure, by address."""

    @property
    def pulled_bytes(self) -> int:
        """Bytes received over the network so far."""
        return self._puller.pulled_bytes

    async def wait_for_new(self, known_publication: str, wait_seconds: float) -> Manifest | None:
        """Wait for a manifest other than `known_publication`; None when there is none after `wait_seconds`.

        Waits for: the learner's next publication. Unblocked by: the learner. Gives up after: `wait_seconds`, with a
        TimeoutError when the store has not answered in that time and a minute more.
        """
        host_id = self._host_id if self._connect is not None else ""
        return await wait_for_manifest(self._connection, known_publication, wait_seconds, host_id=host_id)

    async def fetch(self, manifest: Manifest) -> LocalWeights:
        """Fetch a version to this host, compare every tensor's checksum, and merge adapters.

        Waits for: a relay or the store. Gives up after: a minute per chunk, and `RELAY_SECONDS` until the relay has the
        version.

        Raises:
            RuntimeError: a tensor is not what the learner published, or the manifest contradicts itself; the message
                names the tensor.
            RequestRefused: the version is gone; ask for the newest manifest.
            TimeoutError: a chunk did not arrive. The next call for the same version continues there.
            OSError: there is no room.
        """
        check_manifest(manifest)
        local = await self._fetch(manifest)
        return local if self._whole is None else await asyncio.to_thread(self._whole, local)

    async def _fetch(self, manifest: Manifest) -> LocalWeights:
        mapped = await self._mapped_file(manifest)
        if mapped is not None:
            return mapped
        now = asyncio.get_running_loop().time()
        failed_at = self._failed_relays.get(manifest.relay, -RELAY_RETRY_SECONDS)
        if manifest.relay and self._connect is not None and now - failed_at >= RELAY_RETRY_SECONDS:
            try:
                return await self._from_relay(manifest, self._connect)
            # It has a newer version by now; so will the next manifest.
            except RequestRefused as error:
                logger.info("policy %d does not come from %s: %s", manifest.policy_version, manifest.relay, error)
            # The relay may have ended, or be out of this actor's reach. The learner has every version it announces.
            except (TimeoutError, ConnectionError, RuntimeError) as error:
                reason = str(error) or f"it did not have the version within {RELAY_SECONDS:.0f} s"
                logger.warning(
                    "policy %d does not come from %s: %s; the relay is not asked again for %.0f s",
                    *(manifest.policy_version, manifest.relay, reason, RELAY_RETRY_SECONDS),
                )
                self._failed_relays = {manifest.relay: asyncio.get_running_loop().time()}
        return await self._puller.pull(manifest, self._connection)

    async def _from_relay(self, manifest: Manifest, connect: Callable[[str], Connection]) -> LocalWeights:
        if self._relay is None or self._relay.address != manifest.relay:
            self.close()
            self._relay = connect(manifest.relay)
        async with asyncio.timeout(RELAY_SECONDS):
            theirs: Manifest | None = None
            while theirs is None or theirs.policy_version < manifest.policy_version:
                known = theirs.publication if theirs else ""
                theirs = await wait_for_manifest(self._relay, known, RELAY_SECONDS, host_id=self._host_id)
        if theirs.publication != manifest.publication:
            raise RequestRefused(f"it has publication {theirs.publication} by now")
        # The relay only says where its file is. The contents are checked against the learner's checksums.
        mapped = await self._mapped_file(replace(manifest, path=theirs.path, host_id=theirs.host_id))
        return mapped or await self._puller.pull(manifest, self._relay)

    async def _mapped_file(self, manifest: Manifest) -> LocalWeights | None:
        """Map the manifest's file. None when the file is on another host, outside the allowed folders, or gone."""
        folders = [self._published, *(self._relays.iterdir() if self._relays and self._relays.is_dir() else ())]
        path = Path(manifest.path).resolve()
        if manifest.host_id != self._host_id or not any(path.is_relative_to(folder.resolve()) for folder in folders):
            return None
        try:
            return await asyncio.to_thread(self._map, manifest)
        except FileNotFoundError:
            return None

    def _map(self, manifest: Manifest) -> LocalWeights:
        path = Path(manifest.path)
        file = hold(path)
        try:
            size = os.fstat(file.fileno()).st_size
            if size != manifest.num_bytes:
                raise RuntimeError(
                    f"policy {manifest.policy_version}: {path} has {size} bytes, the learner published"
                    f" {manifest.num_bytes}"
                )
            check_tensors(manifest, self._mapped.of(file))
        except BaseException:
            let_go(file)
            raise
        return LocalWeights(manifest, path, file)

    def close(self) -> None:
        """Close the connection to a relay."""
        if self._relay is not None:
            self._relay.close()
            self._relay = None
