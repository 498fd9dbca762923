"""The client side of a connection to a server of the run: each request returns a future of its answer.

Actors and learner ranks connect to the buffer; actors and relays also connect to weight servers. A background thread
owns the DEALER socket; any thread may call. The thread resends a request with the same number when there is evidence
that the copy before was lost (`buffer/transport/outbox.py`), also across a restart of the server, until the answer
arrives. So the server must answer every request idempotently.

Cancelling a future stops the resends, but the server may have acted already. An answer that no request waits for, since
its request was cancelled, has expired or was answered before, goes to `unclaimed`.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from buffer.process import start_thread
from buffer.transport.credentials import Credentials
from buffer.transport.messages import MAX_FRAME_BYTES, Message, Refused, decode, encode, with_epoch
from buffer.transport.outbox import Outbox, Request
from buffer.transport.schema import Frame, WireError, check_name

log = logging.getLogger(__name__)

MAX_QUEUED_MESSAGES = 1_000
"""Messages that ZeroMQ queues for a slow peer, on either side. Further messages are lost and sent again."""
LARGE_FRAME_BYTES = 1 << 18
"""Received frames of at least this size are passed on as views of ZeroMQ's memory, not copied."""
SILENT_RESENDS = 15
"""Multiples of `resend_seconds` without any answer after which the socket is reopened. The time doubles with every
reopening until an answer arrives, because a large answer on a slow link may take longer."""
LONGEST_SILENCE = 16
"""Largest factor of that time."""
LEAVING_SECONDS = 0.05
"""Time between two looks at whether a large request has left ZeroMQ's queue."""
DEAD_PEER_MILLISECONDS = 30_000
"""The kernel closes a connection whose peer has not acknowledged what was sent for this long. ZeroMQ's own heartbeats
wait behind the large message that does not get through."""

_TURNED_AWAY = {
    int(zmq.EVENT_HANDSHAKE_FAILED_AUTH): "the server does not know this client's key",
    int(zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL): "only one side has keys, or they are of different runs",
    int(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL): "the server closed it, as it does with keys of another run",
}


class RequestRefused(RuntimeError):
    """The server will never grant the request.

    Args:
        reason: the server's.
        is_server_error, is_replaced: as in `Refused`.
    """

    def __init__(self, reason: str, *, is_server_error: bool = False, is_replaced: bool = False) -> None:
        super().__init__(reason)
        self.is_server_error, self.is_replaced = is_server_error, is_replaced


class Connection:
    """A named connection to `address`. Close it, or use it as a context manager.

    Args:
        address: ZeroMQ address; the server may start later.
        name: this process's name in the server's logs. A random suffix makes it unique per connection.
        credentials: the run's id and keys.
        timeout_seconds: default time a request waits for its answer; math.inf: without end.
        resend_seconds: time after which an unanswered request may be sent a second time.
        unclaimed: gets every answer that no request waits for, in the background thread. It must not raise or block.

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
        unclaimed: Callable[[Message], None] | None = None,
    ) -> None:
        check_name(name, "the name")
        credentials.check_address(address)
        self.address = address
        self.epoch = 0
        """A learner's, from `LearnerWelcome`: every later message that has an epoch carries this one."""
        self._credentials = credentials
        self._identity = f"{name}-{secrets.token_hex(4)}".encode()
        self._timeout_seconds = timeout_seconds
        self._resend_seconds = resend_seconds
        self.unclaimed = unclaimed
        """May be set later."""
        self._lock = threading.Lock()
        self._next_number = 0
        self._new: list[Request] = []
        """Requests that the background thread has not taken into its outbox yet."""
        self._outbox = Outbox(resend_seconds)
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
            frames = encode(with_epoch(message, self.epoch), number, self._credentials.run_id)
            entry = Request(number, type(message).__name__, frames, time.monotonic() + seconds, seconds)
            self._new.append(entry)
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
        heard, factor = time.monotonic(), 1
        try:
            while not self._closing:
                self._take_new()
                blocked = self._send_due(socket)
                asleep = self._poll(socket, handshakes, blocked)
                now = time.monotonic()
                self._outbox.postpone(asleep)
                if self._receive(socket) or not self._outbox or self._outbox.is_leaving():
                    heard, factor = now, 1
                heard += asleep
                self._expire()
                if now - heard > factor * SILENT_RESENDS * self._resend_seconds:
                    factor = min(2 * factor, LONGEST_SILENCE)
                    log.info("nothing heard from %s for %.0f s; reconnecting", self.address, now - heard)
                    socket.close()
                    handshakes.close()
                    (socket, handshakes), heard = self._open(), now
                    self._outbox.disconnected(now)
        finally:
            # Also after an exception in this thread: no caller may wait for an answer that cannot arrive.
            with self._lock:
                self._closing = True
            socket.close()
            handshakes.close()
            self._take_new()
            for entry in self._outbox:
                self._finish(entry, ConnectionError(f"{self.address} was closed before it answered {entry.kind}"))

    def _take_new(self) -> None:
        with self._lock:
            new, self._new = self._new, []
        for entry in new:
            self._outbox.add(entry)

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
            socket.curve_publickey = self._credentials.public
            socket.curve_secretkey = self._credentials.secret
        self._num_sockets += 1
        monitor = f"inproc://handshakes-{self._num_sockets}"
        socket.monitor(monitor, sum(_TURNED_AWAY) | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        handshakes = self._context.socket(zmq.PAIR)
        handshakes.setsockopt(zmq.LINGER, 0)
        handshakes.connect(monitor)
        socket.connect(self.address)
        return socket, handshakes

    def _watch(self, handshakes: zmq.Socket[bytes]) -> None:
        """Remember the result of the last handshake, and log a failure. What was sent before a disconnect is lost."""
        with suppress(zmq.Again):
            while True:
                event = parse_monitor_message(handshakes.recv_multipart(zmq.NOBLOCK))
                if event["event"] == zmq.EVENT_DISCONNECTED:
                    self._outbox.disconnected(time.monotonic())
                    continue
                turned_away = _TURNED_AWAY.get(int(event["event"]), "")
                if turned_away and turned_away != self._turned_away:
                    log.warning("the handshake with %s failed: %s", self.address, turned_away)
                self._turned_away = turned_away

    def _send_due(self, socket: zmq.Socket[bytes]) -> bool:
        """Send the requests that are new or due again. Returns True when the socket's queue is full."""
        now = time.monotonic()
        for entry in self._outbox.to_send(now):
            try:
                # ZeroMQ tells when it has passed an uncopied message on.
                tracker = socket.send_multipart(
                    entry.frames, zmq.NOBLOCK, copy=not entry.is_large, track=entry.is_large
                )
            except zmq.Again:
                return True
            self._outbox.sent(entry, now, None if tracker is None else partial(getattr, tracker, "done"))
        return False

    def _poll(self, socket: zmq.Socket[bytes], handshakes: zmq.Socket[bytes], blocked: bool) -> float:
        """Wait for an answer, a new request or room in the queue, at most until a request is due or expires.

        Returns:
            Time by which the wait took longer than that, because this process was stopped or had no processor.
        """
        now = time.monotonic()
        moments = [entry.deadline for entry in self._outbox]
        if not blocked:
            moments.append(self._outbox.next_due(now))
        seconds = min([self._resend_seconds, *(moment - now for moment in moments)])
        if self._outbox.is_leaving():
            seconds = min(seconds, LEAVING_SECONDS)
        milliseconds = max(0, math.ceil(seconds * 1000))
        poller = zmq.Poller()
        poller.register(socket, zmq.POLLIN | zmq.POLLOUT if blocked else zmq.POLLIN)
        poller.register(handshakes, zmq.POLLIN)
        poller.register(self._wake_read, zmq.POLLIN)
        poller.poll(milliseconds)
        asleep = time.monotonic() - now - milliseconds / 1000
        with suppress(BlockingIOError):
            os.read(self._wake_read, 1 << 16)
        self._watch(handshakes)
        return max(0.0, asleep)

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
            entry = self._outbox.get(number)
            # The answer to a resend of an answered request finds no request.
            claimed = False
            if entry is not None:
                self._outbox.answered(entry, time.monotonic())
                outcome: Message | RequestRefused = message
                if isinstance(message, Refused):
                    why = {"is_server_error": message.is_server_error, "is_replaced": message.is_replaced}
                    outcome = RequestRefused(message.reason, **why)
                claimed = self._finish(entry, outcome)
            if not claimed and self.unclaimed is not None:
                self.unclaimed(message)

    def _expire(self) -> None:
        now = time.monotonic()
        for entry in self._outbox:
            if entry.future.cancelled():
                self._outbox.remove(entry)
            elif entry.deadline <= now:
                waited = f"no answer to {entry.kind} from {self.address} within {entry.timeout_seconds:g} s"
                if self._turned_away:
                    waited += f"; the last handshake failed: {self._turned_away}"
                self._finish(entry, TimeoutError(waited))

    def _finish(self, entry: Request, outcome: Any) -> bool:
        """Give a request its outcome. Returns False when the request was cancelled."""
        self._outbox.remove(entry)
        try:
            if isinstance(outcome, Exception):
                entry.future.set_exception(outcome)
            else:
                entry.future.set_result(outcome)
        except InvalidStateError:
            log.debug("%s was cancelled before its answer came", entry.kind)
            return False
        return True


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
    socket.setsockopt(zmq.TCP_MAXRT, DEAD_PEER_MILLISECONDS)
    return socket
