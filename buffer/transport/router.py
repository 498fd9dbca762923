"""The guarded ROUTER socket of every server of a run: only peers with the run's key get in, only its messages through.

Used by the buffer's server and the learner's weight store. CURVE authenticates and encrypts; a thread answers ZeroMQ's
authentication requests and watches failed handshakes, so that a peer without a key, or with a wrong one, gets nothing
and is logged once per address. What then arrives is counted and dropped unless it is a sound message of this run; a
peer that keeps sending others is ignored for a while. Nothing that a peer sends makes a method raise.
"""

from __future__ import annotations

import re
import threading
from collections import Counter
from dataclasses import dataclass

import zmq

from buffer.transport.authenticator import Authenticator
from buffer.transport.ban_list import BanList
from buffer.transport.connection import bounded_socket
from buffer.transport.credentials import Credentials
from buffer.transport.messages import (
    MAX_FRAMES,
    MAX_MESSAGE_BYTES,
    ForeignRunError,
    GroupDelivery,
    Message,
    decode,
    encode,
)
from buffer.transport.packed_group import check_group
from buffer.transport.schema import WireError

IDENTITY = re.compile(rb"[A-Za-z0-9_][A-Za-z0-9_.:@-]{0,254}")
"""How connections are named; names go to the ledger and to logs."""
LARGE_FRAME_BYTES = 1 << 16
"""Frames from here on are sent without a copy."""


@dataclass(frozen=True, slots=True)
class Incoming:
    """One sound message."""

    identity: bytes
    message: Message
    number: int


def read_incoming(identity: bytes, frames: list[bytes], run_id: str) -> Incoming:
    """What a peer named `identity` sent.

    Raises:
        ForeignRunError: it belongs to another run.
        WireError: whatever else is wrong with the frames or the name.
    """
    if not IDENTITY.fullmatch(identity):
        raise WireError("its connection has no name of letters, digits and _.:@-")
    message, number = decode(frames, run_id)
    if isinstance(message, GroupDelivery):
        # A broken group must not reach the ledger: the learner would be handed it again and again.
        check_group(message.group)
    return Incoming(identity, message, number)


class Router:
    """A ROUTER bound to `address` for the run of `credentials`. Used by one thread, except `take_counts`.

    Raises:
        ValueError: when the address is in use or is none, or is not local and there are no keys.
    """

    def __init__(self, address: str, credentials: Credentials) -> None:
        credentials.check_address(address)
        self._run_id = credentials.run_id
        self._counts: Counter[str] = Counter()
        self._counts_lock = threading.Lock()
        self._ban_list = BanList()
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self._open(credentials)
        self._authenticator = Authenticator(self.context, self.socket, credentials, self._count)
        try:
            self.socket.bind(address)
        except zmq.ZMQError as error:
            self.close()
            if error.errno == zmq.EADDRINUSE:
                raise ValueError(
                    f"{address} is in use; end the process that listens there or choose another port"
                ) from error
            raise ValueError(f"cannot listen on {address}: {error}") from error
        self.address = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)
        """Where it listens, with the port that was found for a wildcard."""

    def _open(self, credentials: Credentials) -> zmq.Socket[bytes]:
        socket = bounded_socket(self.context, zmq.ROUTER)
        # A client that reopens its socket keeps its identity; without handover the old, dead connection would win.
        socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        if credentials.encrypted:
            socket.curve_server = True
            socket.curve_secretkey = credentials.server_secret
        return socket

    def receive(self, limit: int, now: float) -> tuple[list[Incoming], bool]:
        """The sound ones of up to `limit` waiting messages, and whether more may be waiting. Does not block."""
        sound: list[Incoming] = []
        for _ in range(limit):
            try:
                identity, frames = self._frames()
            except zmq.Again:
                return sound, False
            if self._ban_list.is_ignored(identity, now):
                self._count("ignored")
                continue
            try:
                sound.append(read_incoming(identity, frames, self._run_id))
            except WireError as error:
                self._count("foreign_run" if isinstance(error, ForeignRunError) else "wire_errors")
                self._ban_list.note(identity, error, now)
        return sound, True

    def _frames(self) -> tuple[bytes, list[bytes]]:
        """One whole message; of one that is too large only its beginning, which `decode` then refuses."""
        identity = self.socket.recv(zmq.NOBLOCK)
        frames: list[bytes] = []
        num_bytes = 0
        while self.socket.getsockopt(zmq.RCVMORE):
            frame = self.socket.recv()
            num_bytes += len(frame)
            if len(frames) <= MAX_FRAMES and num_bytes <= MAX_MESSAGE_BYTES:
                frames.append(frame)
        return identity, frames if num_bytes <= MAX_MESSAGE_BYTES else []

    def send(self, identity: bytes, message: Message, number: int) -> None:
        """Answer a request; dropped when the peer is gone or does not read, and asked for again."""
        frames = encode(message, number, self._run_id)
        small = max(len(frame) for frame in frames) < LARGE_FRAME_BYTES
        self.socket.send_multipart([identity, *frames], copy=small)

    def take_counts(self) -> dict[str, int]:
        """What was turned away since the last call: wire_errors, foreign_run, ignored, rejected (connections)."""
        if not self._counts:
            return {}
        with self._counts_lock:
            taken, self._counts = dict(self._counts), Counter()
        return taken

    def _count(self, name: str) -> None:
        with self._counts_lock:
            self._counts[name] += 1

    def close(self) -> None:
        """End the socket, the thread and the context; other sockets of the context must be closed already.

        Closing twice is allowed.
        """
        if self.socket.closed:
            return
        self.socket.disable_monitor()
        self.socket.close()
        self.context.term()
        self._authenticator.join()
