"""The buffer's socket: one ROUTER, one thread, many messages per transaction.

Every turn drains the waiting messages, handles them inside one ledger transaction and sends the answers after the
commit, so an acknowledged group is in the file. Waits for: messages, at most `TICK_SECONDS`. A message that is not one
of ours is counted, logged and dropped. SIGTERM and SIGINT end the process after the transaction under way.
"""

from __future__ import annotations

import logging
import signal
import time

import zmq

from buffer.config import BufferConfig
from buffer.leasing import Outgoing, holder_name
from buffer.ledger import Ledger
from buffer.service import Service
from buffer.wire import MAX_FRAME_BYTES, WireError, decode, encode

log = logging.getLogger(__name__)

MESSAGES_PER_TURN = 256
TICK_SECONDS = 0.2
"""How late the end of a lease, or a signal, may be noticed."""
COMPLAINT_SECONDS = 60.0
"""Broken messages of one peer are logged once in this time."""
LARGE_FRAME_BYTES = 1 << 16
"""Frames from here on are sent without a copy."""


def bind_router(context: zmq.Context[zmq.Socket[bytes]], address: str) -> zmq.Socket[bytes]:
    """A ROUTER socket bound to `address`, with the limits every server of the run shares.

    Raises:
        ValueError: when the address is in use or is none.
    """
    socket = context.socket(zmq.ROUTER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, 10_000)
    socket.setsockopt(zmq.RCVHWM, 10_000)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
    # A client that reopens its socket keeps its identity; without handover the old, dead connection would win.
    socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
    try:
        socket.bind(address)
    except zmq.ZMQError as error:
        socket.close()
        if error.errno == zmq.EADDRINUSE:
            raise ValueError(
                f"{address} is in use; end the process that listens there or choose another port"
            ) from error
        raise ValueError(f"cannot listen on {address}: {error}") from error
    return socket


class Server:
    """The buffer process: the ledger behind a socket.

    Raises:
        ValueError: when the ledger is in use or belongs to other data, or the address is in use.
    """

    def __init__(self, config: BufferConfig) -> None:
        self._ledger = Ledger(config, time.monotonic())
        self._service = Service(config, self._ledger)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._stopping = False
        self._complaints: dict[bytes, float] = {}
        try:
            self._socket = bind_router(self._context, config.address)
        except BaseException:
            self._context.term()
            self._ledger.close()
            raise
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        """Where it listens, with the port that was found for a wildcard."""

    def stop(self) -> None:
        """End `run` within one tick. May be called from a signal handler or another thread."""
        self._stopping = True

    def run(self) -> None:
        """Serve until `stop`, then close the ledger."""
        log.info("buffer listens on %s", self.address)
        try:
            while not self._stopping:
                self._socket.poll(int(TICK_SECONDS * 1000))
                self._turn()
        finally:
            self._socket.close()
            self._context.term()
            self._ledger.close()
        log.info("buffer closed")

    def _turn(self) -> None:
        messages = self._drain()
        now = time.monotonic()
        outgoing: list[Outgoing] = []
        with self._ledger.transaction():
            for identity, frames in messages:
                try:
                    message, number = decode(frames)
                except WireError as error:
                    self._complain(identity, error, now)
                    continue
                outgoing += self._service.receive(identity, message, number, now)
            # With more messages waiting a peer's sign of life may be among them: nobody is silent yet.
            outgoing += self._service.wake(now, may_expire=len(messages) < MESSAGES_PER_TURN)
        for answer in outgoing:
            frames = encode(answer.message, answer.request_number)
            self._socket.send_multipart([answer.identity, *frames], copy=_is_small(frames))

    def _drain(self) -> list[tuple[bytes, list[bytes]]]:
        messages: list[tuple[bytes, list[bytes]]] = []
        while len(messages) < MESSAGES_PER_TURN:
            try:
                identity, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            messages.append((identity, frames))
        return messages

    def _complain(self, identity: bytes, error: WireError, now: float) -> None:
        self._ledger.file.count("wire_errors")
        if now - self._complaints.get(identity, -COMPLAINT_SECONDS) >= COMPLAINT_SECONDS:
            self._complaints = {i: at for i, at in self._complaints.items() if now - at < COMPLAINT_SECONDS}
            self._complaints[identity] = now
            log.warning("message of %s dropped: %s", holder_name(identity), error)


def _is_small(frames: list[bytes]) -> bool:
    return max(len(frame) for frame in frames) < LARGE_FRAME_BYTES


def serve(config: BufferConfig) -> None:
    """Run the buffer in this process until SIGTERM or SIGINT."""
    server = Server(config)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.stop())
    server.run()
