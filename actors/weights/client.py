"""Brings a published version to this host before generation pauses, by the cheapest way there is.

Mapped where the learner's file, or that of a relay on this host, can be reached; pulled where not. Waits, fetches and
checks; loading is `actors/weights/vllm_loader.py`. What arrived is compared with the checksum of every tensor.
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

RELAY_SECONDS = 30.0
"""How long a relay may take to have a version; then the learner's store is asked."""


class WeightClient:
    """Takes versions from the learner's weight store.

    Args:
        connection: to the store; not closed here.
        host_id: this host's kernel; files of processes with the same one can be mapped. Empty: nothing is.
        published: the folder of the learner's files; no others are mapped, whatever path a manifest names.
        chunk_bytes: size of one pulled piece.
        deltas: whether to ask for the difference to the version that was pulled before.
        relays: the folder whose folders hold relays' files, which may be mapped too.
        connect: opens a connection to a relay's address; None: relays are not used.
        whole: what a version becomes once it is here, in a thread (`actors/weights/adapters.py`); None: it stays as it
            is.
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

    @property
    def pulled_bytes(self) -> int:
        """Over the network, in all."""
        return self._puller.pulled_bytes

    async def wait_for_new(self, known_publication: str, wait_seconds: float) -> Manifest | None:
        """The newest manifest unless it is `known_publication`.

        Waits for: the learner's next publication. Unblocked by: the learner. Gives up after: `wait_seconds`, with a
        TimeoutError when the store has not answered in that time and a minute more.
        """
        host_id = self._host_id if self._connect is not None else ""
        return await wait_for_manifest(self._connection, known_publication, wait_seconds, host_id=host_id)

    async def fetch(self, manifest: Manifest) -> LocalWeights:
        """Bring a version to this host, compare every tensor's checksum, and make whole weights of it.

        Waits for: the relay, for `RELAY_SECONDS` and a minute per chunk, or the store, a minute per chunk.

        Raises:
            RuntimeError: bytes that are not what the learner published, or a manifest that contradicts itself, naming
                the tensor.
            RequestRefused: the version is gone; ask for the newest manifest.
            TimeoutError: a chunk did not come; the next call for the same version goes on where this one ended.
            OSError: there is no room.
        """
        check_manifest(manifest)
        local = await self._bring(manifest)
        return local if self._whole is None else await asyncio.to_thread(self._whole, local)

    async def _bring(self, manifest: Manifest) -> LocalWeights:
        mapped = await self._mapped_file(manifest)
        if mapped is not None:
            return mapped
        if manifest.relay and self._connect is not None:
            try:
                return await self._from_relay(manifest, self._connect)
            # It may have died, or be behind; the learner has what it announced.
            except (TimeoutError, RequestRefused, ConnectionError, RuntimeError) as error:
                logger.warning("policy %d does not come from %s: %s", manifest.policy_version, manifest.relay, error)
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
        # Only where the file lies is the relay's word; its contents must be what the learner's checksums say.
        mapped = await self._mapped_file(replace(manifest, path=theirs.path, host_id=theirs.host_id))
        return mapped or await self._puller.pull(manifest, self._relay)

    async def _mapped_file(self, manifest: Manifest) -> LocalWeights | None:
        """The file that a manifest names, where it is on this host, may be mapped and is not gone."""
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
            check_tensors(manifest, self._mapped.of(file, manifest))
        except BaseException:
            let_go(file)
            raise
        return LocalWeights(manifest, path, file)

    def close(self) -> None:
        """End the connection to a relay."""
        if self._relay is not None:
            self._relay.close()
            self._relay = None
