"""The server side of a connection: a ROUTER socket that accepts only peers with the run's key and only valid messages.

Used by the buffer's server and by the weight server. CURVE authenticates and encrypts (`authenticator.py`). Invalid
messages and those of other runs are counted and dropped; a peer that keeps sending them is ignored for a while
(`ban_list.py`). No method raises because of what a peer sends.
"""

from __future__ import annotations

import logging
import os
import re
import resource
import threading
from collections import Counter
from contextlib import suppress
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
    GroupRequest,
    Message,
    decode,
    encode,
)
from buffer.transport.packed_group import check_group
from buffer.transport.schema import WireError

log = logging.getLogger(__name__)

IDENTITY = re.compile(rb"[A-Za-z0-9_][A-Za-z0-9_.:@-]{0,254}")
"""Valid names of connections. The names appear in the ledger and in logs."""
MAX_ARRIVING = 4_096
"""Connections that may wait to be accepted, as when all actors of a run start at once. The kernel may allow fewer."""
LARGE_FRAME_BYTES = 1 << 20
"""Frames of at least this size are sent without a copy. Smaller ones are copied faster than their release is noted."""
LARGE_MESSAGE_BYTES = 4 << 20
"""Messages of at least this size are sent without a copy, and known to be on their way until they have left."""
GROUPS_PER_TURN = 8
"""Requests for a group of a batch after which `receive` returns, because each may be answered with many megabytes."""
FIRST_PRUNE = 64
"""Number of entries at which answers that have left are forgotten for the first time."""


@dataclass(frozen=True, slots=True)
class Incoming:
    """One valid message."""

    identity: bytes
    message: Message
    number: int
    role: str = ""
    """The role of the peer's key (`buffer/transport/roles.py`); empty without encryption."""


def raise_file_limit() -> None:
    """Allow this process as many open files as its hard limit says, because every connection takes one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        # Without permission, or in a container that forbids it, the soft limit stays.
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _num_io_threads() -> int:
    """Return the number of threads that read, write and encrypt: one has enough to do where there are few cores."""
    return min(4, max(1, len(os.sched_getaffinity(0)) // 2))


def read_incoming(identity: bytes, frames: list[bytes], run_id: str, role: str = "") -> Incoming:
    """Decode and check a message from the peer `identity`, whose key is of the given role.

    Raises:
        ForeignRunError: when the message belongs to another run.
        WireError: when the peer's name or the message is invalid, or a group breaks a rule of `Trajectory`.
    """
    if not IDENTITY.fullmatch(identity):
        raise WireError("its connection has no name of letters, digits and _.:@-")
    message, number = decode(frames, run_id)
    if isinstance(message, GroupDelivery):
        # A broken group must not reach the ledger, because the learner would fail on it again and again.
        check_group(message.group)
    return Incoming(identity, message, number, role)


class Router:
    """A ROUTER socket bound to `address`, for the run of `credentials`. One thread uses it; any may call `take_counts`.

    Raises:
        ValueError: when the address is in use or invalid, or is not local and the credentials have no keys.
    """

    def __init__(self, address: str, credentials: Credentials) -> None:
        credentials.check_address(address)
        self._run_id, self._encrypted = credentials.run_id, credentials.encrypted
        self._counts: Counter[str] = Counter()
        self._counts_lock = threading.Lock()
        self._ban_list = BanList()
        self._leaving: dict[tuple[bytes, int], zmq.MessageTracker] = {}
        """Large answers that ZeroMQ has not passed on, by connection and request number; also some that it has."""
        self._prune_at = FIRST_PRUNE
        raise_file_limit()
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(_num_io_threads())
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
        """The bound address, with the actual port where the given one had a wildcard."""

    def _open(self, credentials: Credentials) -> zmq.Socket[bytes]:
        socket = bounded_socket(self.context, zmq.ROUTER)
        # A client that reopens its socket keeps its identity. Without handover ZeroMQ would keep the dead connection.
        socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        socket.setsockopt(zmq.BACKLOG, MAX_ARRIVING)
        if credentials.encrypted:
            socket.curve_server = True
            socket.curve_secretkey = credentials.secret
        return socket

    def receive(self, limit: int, now: float) -> tuple[list[Incoming], bool]:
        """Take up to `limit` waiting messages, and at most `GROUPS_PER_TURN` that ask for a group. Does not block.

        Returns:
            The valid ones, and whether more messages may be waiting.
        """
        valid: list[Incoming] = []
        num_groups = 0
        for _ in range(limit):
            if num_groups == GROUPS_PER_TURN:
                break
            try:
                identity, frames, role = self._frames()
            except zmq.Again:
                return valid, False
            if self._ban_list.is_ignored(identity, now):
                self._count("ignored")
                continue
            try:
                incoming = read_incoming(identity, frames, self._run_id, role)
            except WireError as error:
                self._count("foreign_run" if isinstance(error, ForeignRunError) else "wire_errors")
                self._ban_list.note(identity, error, now)
                continue
            except Exception as error:
                # A check that fails by itself is an error of this message, and of no other.
                log.exception("a message could not be checked and is dropped")
                self._count("message_errors")
                self._ban_list.note(identity, error, now)
                continue
            # The large answer is still waiting for the link, which a second one would make slower.
            if not self._is_leaving(identity, incoming.number):
                valid.append(incoming)
                num_groups += isinstance(incoming.message, GroupRequest)
        return valid, True

    def _frames(self) -> tuple[bytes, list[bytes], str]:
        """Receive the identity and frames of the next message, and the role of its sender's key.

        An oversized message is cut so that `decode` refuses it.
        """
        if self._encrypted:
            first = self.socket.recv(zmq.NOBLOCK, copy=False)
            # The authenticator's answer, which ZeroMQ attaches to every message of the connection.
            identity, role = first.bytes, str(first.get("User-Id"))
        else:
            identity, role = self.socket.recv(zmq.NOBLOCK), ""
        frames: list[bytes] = []
        num_bytes = 0
        while self.socket.getsockopt(zmq.RCVMORE):
            frame = self.socket.recv()
            num_bytes += len(frame)
            if len(frames) <= MAX_FRAMES and num_bytes <= MAX_MESSAGE_BYTES:
                frames.append(frame)
        return identity, frames if num_bytes <= MAX_MESSAGE_BYTES else [], role

    def send(self, identity: bytes, message: Message, number: int) -> None:
        """Answer a request. The answer is lost when the peer is gone or does not read; the peer then asks again.

        Until a large answer has left, `receive` drops repetitions of its request.
        """
        frames = encode(message, number, self._run_id)
        sizes = [len(frame) for frame in frames]
        small = max(sizes) < LARGE_FRAME_BYTES and sum(sizes) < LARGE_MESSAGE_BYTES
        tracker = self.socket.send_multipart([identity, *frames], copy=small, track=not small)
        if tracker is not None:
            self._leaving[identity, number] = tracker
            if len(self._leaving) >= self._prune_at:
                self._leaving = {key: waiting for key, waiting in self._leaving.items() if not waiting.done}
                self._prune_at = 2 * len(self._leaving) + FIRST_PRUNE

    def _is_leaving(self, identity: bytes, number: int) -> bool:
        tracker = self._leaving.get((identity, number))
        return tracker is not None and not tracker.done

    def note(self, identity: bytes, complaint: Exception, now: float) -> None:
        """Count a valid message of a peer that could not be handled; with too many the peer is ignored for a while."""
        self._ban_list.note(identity, complaint, now)

    def take_counts(self) -> dict[str, int]:
        """Return how many messages and connections were refused since the last call, by name.

        wire_errors: invalid messages; foreign_run: messages of other runs; ignored: messages of ignored peers;
        rejected: connections.
        """
        if not self._counts:
            return {}
        with self._counts_lock:
            taken, self._counts = dict(self._counts), Counter()
        return taken

    def _count(self, name: str) -> None:
        with self._counts_lock:
            self._counts[name] += 1

    def close(self) -> None:
        """Close the socket and end the authenticator. Closing twice is allowed.

        Waits for: all other sockets of `context` to be closed. Unblocked by: their owners, which must close them first.
        """
        if self.socket.closed:
            return
        self.socket.disable_monitor()
        self.socket.close()
        self.context.term()
        self._authenticator.join()
