"""Pulls a version over the network into this host's copy: a delta when a delta is smaller, else all chunks.

A publication has the same bytes in the learner's store and in every relay. A pull that was interrupted at one of them
is therefore resumed at another.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from actors.weights.local import HostCopy, LocalWeights, TensorCheck, check_tensors
from actors.weights.manifests import unexpected
from buffer.transport.connection import Connection
from buffer.transport.messages import Chunk, ChunkRequest, DeltaReply, DeltaRequest, Manifest, Message
from buffer.transport.schema import Frame
from buffer.weights.delta import DeltaError, apply
from buffer.weights.layout import checksum, layout_of

logger = logging.getLogger(__name__)

CHUNKS_IN_FLIGHT = 4
CHUNK_TIMEOUT_SECONDS = 60.0
MAX_ATTEMPTS = 3
"""Number of requests for a chunk that arrives damaged."""
REUSED_BYTES = 31 << 20
"""Largest block that raises glibc's threshold for returning memory to the system."""


@dataclass(frozen=True, slots=True)
class Source:
    """A server that has the bytes of a publication, or with `base` the delta from `base` to the publication."""

    connection: Connection
    publication: str
    base: str = ""

    def ask(self, offset: int, num_bytes: int) -> asyncio.Future[Message]:
        """Request a chunk. The future gets the answer."""
        request = ChunkRequest(self.publication, self.base, offset, num_bytes)
        return asyncio.wrap_future(self.connection.request(request, timeout_seconds=CHUNK_TIMEOUT_SECONDS))


class Puller:
    """Owns this process's copy of the weights and pulls versions into it.

    Args:
        chunk_bytes: size of one chunk.
        deltas: whether to ask for the difference to the version that was pulled before.
    """

    def __init__(self, chunk_bytes: int, deltas: bool) -> None:
        # glibc returns freed memory to the system above twice the size of the largest block that was ever freed. Fresh
        # memory for every chunk would cost more than receiving the chunk, so this frees one large block.
        bytes(REUSED_BYTES)
        self._chunk_bytes = chunk_bytes
        self._deltas = deltas
        self._copy: HostCopy | None = None
        self.pulled_bytes = 0
        """Bytes received over the network so far."""

    async def pull(self, manifest: Manifest, connection: Connection) -> LocalWeights:
        """Pull `manifest` into the copy. Raises the errors of `WeightClient.fetch`."""
        copy = self._copy
        if copy is None or len(copy.array) != manifest.num_bytes:
            copy = self._copy = HostCopy(manifest.num_bytes)
        if not await self._pull_delta(manifest, copy, connection):
            await self._pull_whole(manifest, copy, connection)
        copy.manifest = manifest
        return LocalWeights(manifest, copy.path)

    async def _pull_delta(self, manifest: Manifest, copy: HostCopy, connection: Connection) -> bool:
        """Update the copy's version to `manifest` with a delta. Returns False when the whole version must be pulled."""
        base = copy.manifest
        if not self._deltas or base is None or layout_of(base.tensors) != layout_of(manifest.tensors):
            return False
        request = DeltaRequest(manifest.publication, base.publication)
        offer = await asyncio.wrap_future(connection.request(request, timeout_seconds=CHUNK_TIMEOUT_SECONDS))
        if not isinstance(offer, DeltaReply):
            raise unexpected(offer, "a delta")
        if not 0 < offer.num_bytes < manifest.num_bytes:
            return False
        delta = np.empty(offer.num_bytes, np.uint8)
        await self._pull_into(delta, Source(connection, manifest.publication, base.publication))
        copy.manifest, copy.arriving = None, None
        try:
            if checksum(delta) != offer.checksum:
                raise DeltaError("a delta with another checksum than was announced")
            await asyncio.to_thread(apply, copy.array, delta.data, layout_of(manifest.tensors))
            await asyncio.to_thread(check_tensors, manifest, copy.array)
        except (DeltaError, RuntimeError) as error:
            logger.warning("policy %d is pulled whole: %s", manifest.policy_version, error)
            return False
        return True

    async def _pull_whole(self, manifest: Manifest, copy: HostCopy, connection: Connection) -> None:
        copy.manifest = None
        check = copy.arriving
        if check is None or check.manifest.publication != manifest.publication:
            check = copy.arriving = TensorCheck(manifest, copy.array)
        await self._pull_into(copy.array, Source(connection, manifest.publication), check)
        copy.arriving = None
        check.finish()

    async def _pull_into(self, target: NDArray[np.uint8], source: Source, check: TensorCheck | None = None) -> None:
        """Pull all chunks in order, a few at a time. With `check`, start after the bytes that it has read."""
        waiting: deque[tuple[int, int, asyncio.Future[Message]]] = deque()

        async def take_first() -> None:
            offset, size, answer = waiting.popleft()
            data = await self._chunk(source, offset, size, answer)
            target[offset : offset + size] = np.frombuffer(data, np.uint8)
            if check is not None:
                check.advance(offset + size)

        try:
            for offset in range(check.num_bytes if check else 0, len(target), self._chunk_bytes):
                size = min(self._chunk_bytes, len(target) - offset)
                waiting.append((offset, size, source.ask(offset, size)))
                if len(waiting) == CHUNKS_IN_FLIGHT:
                    await take_first()
            while waiting:
                await take_first()
        finally:
            for *_, answer in waiting:
                answer.cancel()

    async def _chunk(self, source: Source, offset: int, size: int, answer: asyncio.Future[Message]) -> Frame:
        """Return the bytes of one chunk. Damaged bytes are requested again, `MAX_ATTEMPTS` times in all.

        Raises:
            RuntimeError: every attempt arrived damaged.
        """
        for attempt in range(MAX_ATTEMPTS):
            reply = await (answer if not attempt else source.ask(offset, size))
            if not isinstance(reply, Chunk):
                raise unexpected(reply, "a chunk")
            self.pulled_bytes += len(reply.data)
            if (reply.offset, len(reply.data), reply.checksum) == (offset, size, checksum(reply.data)):
                return reply.data
            logger.warning("bytes %d+%d arrived damaged", offset, size)
        raise RuntimeError(
            f"bytes {offset}+{size} of publication {source.publication} arrived damaged {MAX_ATTEMPTS} times"
        )
