"""The client side of a connection to a server of the run: each request returns a future of its answer.

Actors and learner ranks connect to the buffer; actors and relays also connect to weight servers. A background thread
owns the DEALER socket; any thread may call. The thread resends each request with the same number until the answer
arrives, also across a restart of the server, so the server must answer every request idempotently.

Cancelling a future stops the resends, but the server may have acted already. Never cancel a lease request: its leases
could have been granted.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
import threading
import time
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from buffer.process import start_thread
from buffer.transport.credentials import Credentials
from buffer.transport.messages import MAX_FRAME_BYTES, Message, Refused, decode, encode
from buffer.transport.schema import Frame, Frames, WireError, check_name

log = logging.getLogger(__name__)

MAX_QUEUED_MESSAGES = 1_000
"""Messages that ZeroMQ queues for a slow peer, on either side. Further messages are lost and sent again."""
LARGE_FRAME_BYTES = 1 << 18
"""Received frames of at least this size are passed on as views of ZeroMQ's memory, not copied."""
SILENT_RESENDS = 15
"""Resend intervals without any answer after which the socket is reopened."""

_TURNED_AWAY = {
    int(zmq.EVENT_HANDSHAKE_FAILED_AUTH): "the server does not know this client's key",
    int(zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL): "only one side has keys, or they are of different runs",
    int(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL): "the server closed it, as it does with keys of another run",
}


class RequestRefused(RuntimeError):
    """The server will never grant the request. The error's text is the server's reason."""


@dataclass(slots=True)
class _Request:
    number: int
    kind: str
    frames: Frames
    deadline: float
    timeout_seconds: float
    next_send: float = 0.0
    future: Future[Message] = field(default_factory=Future)


class Connection:
    """A named connection to `address`. Close it, or use it as a context manager.

    Args:
        address: ZeroMQ address; the server may start later.
        name: this process's name in the server's logs. A random suffix makes it unique per connection.
        credentials: the run's id and keys.
        timeout_seconds: default time a request waits for its answer; math.inf: without end.
        resend_seconds: time after which an unanswered request is sent again.

    Raises:
        ValueError: when the name has characters that servers refuse, or `address` requires keys.
    """

    def __init__(
        self,
        address: str,
        name: str,
        credentials: Credentials,
        *,
        timeout_seconds: float = 60.0,
        resend_seconds: float = 2.0,
    ) -> None:
        check_name(name, "the name")
        credentials.check_address(address)
        self.address = address
        self._credentials = credentials
        self._identity = f"{name}-{secrets.token_hex(4)}".encode()
        self._timeout_seconds = timeout_seconds
        self._resend_seconds = resend_seconds
        self._lock = threading.Lock()
        self._next_number = 0
        self._requests: dict[int, _Request] = {}
        self._closing = False
        self._closed = False
        self._turned_away = ""
        """Why the last handshake failed; empty when it succeeded."""
        self._num_sockets = 0
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._thread = start_thread(f"connection {name}", self._run)

    def request(self, message: Message, timeout_seconds: float | None = None) -> Future[Message]:
        """Send `message` and return the future of its answer.

        The future raises TimeoutError when no answer arrives in time, RequestRefused when the server refuses, and
        ConnectionError when the connection is closed first. Callers in asyncio use asyncio.wrap_future.

        Raises:
            ConnectionError: when the connection is closed already.
        """
        seconds = self._timeout_seconds if timeout_seconds is None else timeout_seconds
        with self._lock:
            if self._closing:
                raise ConnectionError(f"the connection to {self.address} is closed")
            number, self._next_number = self._next_number, self._next_number + 1
            frames = encode(message, number, self._credentials.run_id)
            entry = _Request(number, type(message).__name__, frames, time.monotonic() + seconds, seconds)
            self._requests[number] = entry
            self._wake()
        return entry.future

    def call(self, message: Message, timeout_seconds: float | None = None) -> Message:
        """Send `message` and block for its answer.

        Waits for: the server. Unblocked by: its answer or `close`. Gives up after: `timeout_seconds`.

        Raises:
            TimeoutError: when no answer arrives in time; the message names the request and the time.
            RequestRefused: when the server refuses; the message is the server's reason.
            ConnectionError: when the connection is closed.
        """
        return self.request(message, timeout_seconds).result()

    def close(self) -> None:
        """End the thread and the socket. Unanswered requests fail with ConnectionError. Closing twice is allowed."""
        with self._lock:
            if self._closed:
                return
            self._closed = self._closing = True
            self._wake()
        self._thread.join()
        self._context.term()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wake(self) -> None:
        # A full pipe wakes the thread too.
        with suppress(BlockingIOError):
            os.write(self._wake_write, b"\0")

    # The methods below run in the background thread.

    def _run(self) -> None:
        socket, handshakes = self._open()
        heard = time.monotonic()
        try:
            while not self._closing:
                blocked = self._send_due(socket)
                self._poll(socket, handshakes, blocked)
                now = time.monotonic()
                if self._receive(socket) or not self._requests:
                    heard = now
                self._expire()
                if now - heard > SILENT_RESENDS * self._resend_seconds:
                    log.info("nothing heard from %s for %.0f s; reconnecting", self.address, now - heard)
                    socket.close()
                    handshakes.close()
                    (socket, handshakes), heard = self._open(), now
        finally:
            # Also after an exception in this thread: no caller may wait for an answer that cannot arrive.
            with self._lock:
                self._closing = True
            socket.close()
            handshakes.close()
            for entry in self._snapshot():
                self._finish(entry, ConnectionError(f"{self.address} was closed before it answered {entry.kind}"))

    def _open(self) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
        """Return a socket that connects to the server, and a socket that reports the first one's handshakes."""
        socket = bounded_socket(self._context, zmq.DEALER)
        socket.setsockopt(zmq.IDENTITY, self._identity)
        # Queue nothing while the server is away, because resent requests would pile up and arrive all at once.
        socket.setsockopt(zmq.IMMEDIATE, 1)
        socket.setsockopt(zmq.RECONNECT_IVL, 100)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1_000)
        if self._credentials.encrypted:
            socket.curve_serverkey = self._credentials.server_public
            socket.curve_publickey = self._credentials.client_public
            socket.curve_secretkey = self._credentials.client_secret
        self._num_sockets += 1
        monitor = f"inproc://handshakes-{self._num_sockets}"
        socket.monitor(monitor, sum(_TURNED_AWAY) | zmq.EVENT_HANDSHAKE_SUCCEEDED)
        handshakes = self._context.socket(zmq.PAIR)
        handshakes.setsockopt(zmq.LINGER, 0)
        handshakes.connect(monitor)
        socket.connect(self.address)
        return socket, handshakes

    def _watch(self, handshakes: zmq.Socket[bytes]) -> None:
        """Remember the result of the last handshake, and log a failure."""
        with suppress(zmq.Again):
            while True:
                event = parse_monitor_message(handshakes.recv_multipart(zmq.NOBLOCK))
                turned_away = _TURNED_AWAY.get(int(event["event"]), "")
                if turned_away and turned_away != self._turned_away:
                    log.warning("the handshake with %s failed: %s", self.address, turned_away)
                self._turned_away = turned_away

    def _send_due(self, socket: zmq.Socket[bytes]) -> bool:
        """Send the requests that are new or due again. Returns True when the socket's queue is full."""
        now = time.monotonic()
        for entry in self._snapshot():
            if entry.next_send > now:
                continue
            try:
                socket.send_multipart(entry.frames, zmq.NOBLOCK)
            except zmq.Again:
                return True
            entry.next_send = now + self._resend_seconds
        return False

    def _poll(self, socket: zmq.Socket[bytes], handshakes: zmq.Socket[bytes], blocked: bool) -> None:
        """Wait for an answer, a new request or room in the queue, at most until a request is due or expires."""
        now = time.monotonic()
        moments = [entry.deadline for entry in self._snapshot()]
        moments += [entry.next_send for entry in self._snapshot() if not blocked]
        seconds = min([self._resend_seconds, *(moment - now for moment in moments)])
        poller = zmq.Poller()
        poller.register(socket, zmq.POLLIN | zmq.POLLOUT if blocked else zmq.POLLIN)
        poller.register(handshakes, zmq.POLLIN)
        poller.register(self._wake_read, zmq.POLLIN)
        poller.poll(max(0, math.ceil(seconds * 1000)))
        with suppress(BlockingIOError):
            os.read(self._wake_read, 1 << 16)
        self._watch(handshakes)

    def _receive(self, socket: zmq.Socket[bytes]) -> bool:
        """Give all received answers to their futures. Returns True when any message arrived."""
        heard = False
        while True:
            try:
                frames = [_contents(frame) for frame in socket.recv_multipart(zmq.NOBLOCK, copy=False)]
            except zmq.Again:
                return heard
            heard = True
            try:
                message, number = decode(frames, self._credentials.run_id)
            except WireError as error:
                log.warning("answer from %s dropped: %s", self.address, error)
                continue
            entry = self._requests.get(number)
            # The answer to a resend of an answered request finds no request.
            if entry is not None:
                self._finish(entry, RequestRefused(message.reason) if isinstance(message, Refused) else message)

    def _expire(self) -> None:
        now = time.monotonic()
        for entry in self._snapshot():
            if entry.future.cancelled():
                self._requests.pop(entry.number, None)
            elif entry.deadline <= now:
                waited = f"no answer to {entry.kind} from {self.address} within {entry.timeout_seconds:g} s"
                if self._turned_away:
                    waited += f"; the last handshake failed: {self._turned_away}"
                self._finish(entry, TimeoutError(waited))

    def _finish(self, entry: _Request, outcome: Any) -> None:
        self._requests.pop(entry.number, None)
        try:
            if isinstance(outcome, Exception):
                entry.future.set_exception(outcome)
            else:
                entry.future.set_result(outcome)
        except InvalidStateError:
            log.debug("%s was cancelled before its answer came", entry.kind)

    def _snapshot(self) -> list[_Request]:
        with self._lock:
            return list(self._requests.values())


def _contents(frame: zmq.Frame) -> Frame:
    # Allocating memory for the copy of a large frame would cost more than all other work on the frame.
    return frame.bytes if len(frame) < LARGE_FRAME_BYTES else frame.buffer


def host_id() -> str:
    """Return an id of the running kernel. Processes with equal ids can share files and memory."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def bounded_socket(context: zmq.Context[zmq.Socket[bytes]], kind: int) -> zmq.Socket[bytes]:
    """Return an unconnected socket with the options that clients and servers share.

    Closing discards unsent messages. A peer cannot make the socket hold an unbounded amount of memory.
    """
    socket = context.socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, MAX_QUEUED_MESSAGES)
    socket.setsockopt(zmq.RCVHWM, MAX_QUEUED_MESSAGES)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
    socket.setsockopt(zmq.HEARTBEAT_IVL, 5_000)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 30_000)
    return socket
