"""Waits for the learner's next manifest and checks what it says about its tensors."""

from __future__ import annotations

import asyncio
import math

from buffer.transport.connection import Connection
from buffer.transport.messages import Manifest, ManifestRequest, Message, NoNewVersion

LONGEST_PARK_SECONDS = 10.0
"""Longest time that one `ManifestRequest` waits in the store; longer waits repeat the request."""
NUMBER_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
"""Bytes per number of each published dtype."""


async def wait_for_manifest(
    connection: Connection, known_publication: str, wait_seconds: float, *, host_id: str = ""
) -> Manifest | None:
    """Wait for a manifest other than `known_publication` from a store or relay; None when there is none in time.

    Waits for: the next publication. Unblocked by: the learner. Gives up after: `wait_seconds`, with a TimeoutError
    when the store has not answered in that time and a minute more.

    Args:
        connection: to the store or the relay.
        known_publication: the publication that the caller has.
        wait_seconds: longest wait for a newer one.
        host_id: makes the store name a relay on the host with this id; empty: no relay.
    """
    deadline = asyncio.get_running_loop().time() + wait_seconds
    while True:
        remaining = max(deadline - asyncio.get_running_loop().time(), 0.0)
        request = ManifestRequest(known_publication, min(remaining, LONGEST_PARK_SECONDS), host_id)
        reply = await asyncio.wrap_future(connection.request(request, timeout_seconds=remaining + 60.0))
        if isinstance(reply, Manifest):
            return reply
        if not isinstance(reply, NoNewVersion):
            raise unexpected(reply, "a manifest")
        if not remaining:
            return None


def unexpected(reply: Message, wanted: str) -> RuntimeError:
    """Make the error for a store or relay that answers with another type of message than was asked for."""
    return RuntimeError(f"the weight store answered {type(reply).__name__} to a request for {wanted}")


def check_manifest(manifest: Manifest) -> None:
    """Check that every tensor has a published dtype, the number of bytes of its shape, and a place inside the file.

    Raises:
        RuntimeError: naming the tensor.
    """
    for entry in manifest.tensors:
        number_bytes = NUMBER_BYTES.get(entry.dtype, 0)
        if not number_bytes or math.prod(entry.shape) * number_bytes != entry.num_bytes:
            raise RuntimeError(
                f"policy {manifest.policy_version}: tensor {entry.name} of type {entry.dtype} and shape {entry.shape}"
                f" cannot have {entry.num_bytes} bytes"
            )
        if entry.offset % number_bytes or entry.offset + entry.num_bytes > manifest.num_bytes:
            raise RuntimeError(
                f"policy {manifest.policy_version}: tensor {entry.name} ends at byte {entry.offset + entry.num_bytes}"
                f" of a file of {manifest.num_bytes}"
            )
