"""The weight server: sends the newest manifest to actors that wait for it, and chunks to those that cannot map files.

Runs in learner rank 0 and in every relay. One thread answers requests from `buffer/weights/versions.py`. The publisher
calls `announce` and continues at once. A slow or dead reader costs the publisher no time; it can hold back the memory
of one version beyond those kept, for half a minute at most.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import Future
from dataclasses import dataclass, replace

import zmq

from buffer.process import start_thread
from buffer.transport.credentials import Credentials
from buffer.transport.messages import (
    Chunk,
    ChunkRequest,
    DeltaReply,
    DeltaRequest,
    Manifest,
    ManifestRequest,
    Message,
    NoNewVersion,
    Refused,
    RelayHello,
    RelayPlace,
)
from buffer.transport.roles import refusal
from buffer.transport.router import Router
from buffer.weights.layout import checksum
from buffer.weights.pulls import PullQueue
from buffer.weights.relay_tree import RelayTree
from buffer.weights.shared_memory import Segment
from buffer.weights.versions import KeptVersions, Requester

MESSAGES_PER_TURN = 16
TICK_SECONDS = 0.2
"""Largest delay until the server notices a parked request's timeout or its own `close`."""
LONGEST_PARK_SECONDS = 60.0
"""Longest time that a `ManifestRequest` may wait."""


@dataclass
class Throttle:
    """Limits the bytes sent to `bytes_per_second` on average; 0: no limit."""

    bytes_per_second: float
    free_at: float = 0.0
    """Monotonic time at which more bytes may be sent."""

    def take(self, num_bytes: int, now: float) -> None:
        """Account for bytes that are sent now."""
        if self.bytes_per_second:
            self.free_at = max(self.free_at, now) + num_bytes / self.bytes_per_second


class WeightServer:
    """Serves versions at `address` until `close`.

    Args:
        address: ZeroMQ endpoint to bind, such as tcp://127.0.0.1:5556.
        credentials: the run's id and the server's keys.
        keep_versions: number of versions served. A request for an older one is refused.
        bytes_per_second: limit for chunks, to all readers together; 0: no limit.
        relay_fanout: as in `RelayTree`.
        concurrent_pulls: largest number of pulls that are served at the same time (`buffer/weights/pulls.py`).

    Raises:
        ValueError: when the address is in use or invalid, or is not local and the credentials have no keys.
    """

    def __init__(
        self,
        address: str,
        credentials: Credentials,
        *,
        keep_versions: int,
        bytes_per_second: float = 0.0,
        relay_fanout: int = 0,
        concurrent_pulls: int = 4,
    ) -> None:
        self._throttle = Throttle(bytes_per_second)
        self._relays = RelayTree(relay_fanout)
        self._parked: dict[bytes, tuple[int, ManifestRequest, float]] = {}
        self._pulls = PullQueue(concurrent_pulls)
        self._chunks_left = False
        """Whether requests for chunks were left over that can be answered as soon as the rate limit allows it."""
        self._wanted_deltas: dict[Requester, Future[bytes]] = {}
        self._router = Router(address, credentials)
        self.address = self._router.address
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._kept = KeptVersions(keep_versions, self._wake_up)
        self._closing = False
        self._thread = start_thread("weight-server", self._serve)

    def announce(self, manifest: Manifest, segment: Segment) -> list[Segment]:
        """Serve a complete version as the newest. Returns the segments that are free for reuse."""
        retired = self._kept.add(manifest, segment)
        self._wake_up()
        return retired

    def _wake_up(self) -> None:
        os.eventfd_write(self._wake, 1)

    def close(self) -> list[Segment]:
        """Stop serving. Returns the segments that were served; none when called again."""
        if self._closing:
            return []
        self._closing = True
        self._wake_up()
        # Without a time limit: the thread never blocks, and must not find its socket closed.
        self._thread.join()
        segments = self._kept.close()
        self._router.close()
        os.close(self._wake)
        return segments

    # The methods below run in the server's thread.

    def _serve(self) -> None:
        """Serve until `close`.

        Waits for: a message, a publication, a finished delta, a parked request's timeout, or the rate limit.
        """
        poller = zmq.Poller()
        poller.register(self._router.socket, zmq.POLLIN)
        poller.register(self._wake, zmq.POLLIN)
        while not self._closing:
            ready = dict(poller.poll(self._patience_milliseconds()))
            if self._wake in ready:
                os.eventfd_read(self._wake)
            if self._router.socket in ready:
                self._receive()
            self._answer_parked()
            self._answer_deltas()
            self._answer_chunks()

    def _patience_milliseconds(self) -> int:
        if not self._chunks_left:
            return int(TICK_SECONDS * 1000)
        return int(1000 * min(max(self._throttle.free_at - time.monotonic() + 0.001, 0.0), TICK_SECONDS))

    def _receive(self) -> None:
        now = time.monotonic()
        messages, _ = self._router.receive(MESSAGES_PER_TURN, now)
        for incoming in messages:
            requester = incoming.identity, incoming.number
            if reason := refusal(incoming.role, incoming.message):
                self._answer(requester, Refused(reason))
                continue
            match incoming.message:
                case ManifestRequest() as request:
                    self._parked[requester[0]] = (
                        requester[1],
                        request,
                        now + min(request.wait_seconds, LONGEST_PARK_SECONDS),
                    )
                case RelayHello(address=address, host_id=host):
                    self._answer(requester, RelayPlace(self._relays.hear(host, address, now)))
                case ChunkRequest() as request:
                    self._pulls.add(*requester, request, now)
                case DeltaRequest(publication=publication, base=base):
                    self._wanted_deltas[requester] = self._kept.delta(base, publication)
                case other:
                    self._answer(requester, Refused(f"the weight store does not answer {type(other).__name__}"))

    def _answer(self, requester: Requester, message: Message) -> None:
        self._router.send(requester[0], message, requester[1])

    def _answer_parked(self) -> None:
        newest, now = self._kept.newest(), time.monotonic()
        for identity, (number, request, deadline) in list(self._parked.items()):
            if newest is not None and newest.publication != request.known_publication:
                relay = self._relays.at(request.host_id, now)
                self._answer((identity, number), replace(newest, relay=relay))
            elif now >= deadline:
                self._answer((identity, number), NoNewVersion())
            else:
                continue
            del self._parked[identity]

    def _answer_deltas(self) -> None:
        for requester, delta in list(self._wanted_deltas.items()):
            if delta.done():
                del self._wanted_deltas[requester]
                self._answer(requester, DeltaReply(len(delta.result()), checksum(delta.result())))

    def _answer_chunks(self) -> None:
        now, versions = time.monotonic(), self._kept.versions()
        for _ in range(MESSAGES_PER_TURN):
            self._chunks_left = self._throttle.free_at > now
            if self._chunks_left:
                return
            due = self._pulls.take(versions, now)
            if due is None:
                return
            identity, number, request = due
            reply = self._kept.chunk(request, (identity, number))
            if self._kept.is_last(request):
                self._pulls.end(identity)
            if isinstance(reply, Chunk):
                self._throttle.take(request.num_bytes, now)
            if reply is not None:
                self._answer((identity, number), reply)
        self._chunks_left = True
