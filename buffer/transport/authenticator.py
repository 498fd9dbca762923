"""Authentication of connections: answers ZeroMQ's authentication requests (ZAP) and reports failed handshakes.

Owned by `buffer/transport/router.py`; one thread per server. With CURVE only a peer that has the key of one of the
run's roles is let in. A peer without a key, with another server's key, or that does not speak ZeroMQ fails earlier, in
the handshake.

Every failed connection is counted. Each address is logged once. A connection that closes before its address can be
read is logged and counted under `GONE`. The thread ends when its ZeroMQ context is terminated.
"""

from __future__ import annotations

import logging
import os
import resource
import socket as sockets
import time
from collections.abc import Callable

import zmq
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from buffer.process import start_thread
from buffer.transport.credentials import Credentials

log = logging.getLogger(__name__)

MAX_ADDRESSES = 1_000
"""Addresses that are logged. Connections from further addresses are only counted."""
ZAP_ADDRESS = "inproc://zeromq.zap.01"
MONITOR_ADDRESS = "inproc://handshakes"
GONE = "an address that is gone"
_NO_KEY = "it has no key or another server's, or broke off"
# A peer without a key may itself close the connection when the server asks for one.
_REASONS = {
    int(zmq.EVENT_HANDSHAKE_FAILED_AUTH): "its key is not this run's",
    int(zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL): _NO_KEY,
    int(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL): _NO_KEY,
}
NO_FILES_SECONDS = 60.0
"""Interval of the message that connections cannot be accepted."""
_WATCHED = (
    sum(_REASONS)
    | zmq.EVENT_ACCEPT_FAILED
    | zmq.EVENT_ACCEPTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_DISCONNECTED
)


class Authenticator:
    """Authenticates the peers of `socket`, which must not be bound yet.

    `count` is called with "rejected", in the authenticator's thread, for each refused connection.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        socket: zmq.Socket[bytes],
        credentials: Credentials,
        count: Callable[[str], None],
    ) -> None:
        self._roles = {z85.decode(key): role.encode() for key, role in credentials.roles.items()}
        self._count = count
        self._handshakes = _Handshakes()
        self._logged: set[str] = set()
        self._quiet_until = 0.0
        self._requests = context.socket(zmq.REP)
        self._requests.bind(ZAP_ADDRESS)
        socket.monitor(MONITOR_ADDRESS, _WATCHED)
        self._events = context.socket(zmq.PAIR)
        self._events.connect(MONITOR_ADDRESS)
        self._thread = start_thread("authenticator", self._run)

    def join(self) -> None:
        """Wait for the thread's end.

        Waits for: the end of the ZeroMQ context. Unblocked by: `term` of the context, by the caller or another thread.
        """
        self._thread.join()

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._requests, zmq.POLLIN)
        poller.register(self._events, zmq.POLLIN)
        try:
            while True:
                ready = dict(poller.poll())
                # Events first: while a connection waits for authentication, its address can still be read.
                if self._events in ready:
                    self._watch(self._events.recv_multipart())
                elif self._requests in ready:
                    self._authenticate(self._requests.recv_multipart())
        except zmq.ContextTerminated:
            pass  # The router was closed. The thread ends here.
        finally:
            self._requests.close(linger=0)
            self._events.close(linger=0)

    def _authenticate(self, request: list[bytes]) -> None:
        """Answer one ZAP request (RFC 27): version, request id, domain, address, identity, mechanism, credentials.

        The answer names the role of the peer's key as the user of all its messages.
        """
        version, request_id, mechanism, key = request[0], request[1], request[5], request[6:7]
        role = self._roles.get(key[0], b"") if mechanism == b"CURVE" and key else b""
        status = (b"200", b"OK", role) if role else (b"400", b"this key is not the run's", b"")
        self._requests.send_multipart([version, request_id, *status, b""])

    def _watch(self, frames: list[bytes]) -> None:
        event = parse_monitor_message(frames)
        if event["event"] == zmq.EVENT_ACCEPT_FAILED:
            self._cannot_accept(int(event["value"]))
            return
        turned_away = self._handshakes.happened(int(event["event"]), int(event["value"]))
        if turned_away is None:
            return
        address, reason = turned_away
        if address not in self._logged and len(self._logged) < MAX_ADDRESSES:
            self._logged.add(address)
            log.warning("a connection from %s was turned away: %s", address, reason)
        # Counted last, so that the log line exists when the count is seen.
        self._count("rejected")

    def _cannot_accept(self, error: int) -> None:
        """Say, now and then, that peers cannot connect, and why. They try again."""
        if time.monotonic() < self._quiet_until:
            return
        self._quiet_until = time.monotonic() + NO_FILES_SECONDS
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        log.error(
            "no further connection can be accepted (%s): this process may have %d open files, and every connection"
            " takes one; raise the hard limit (ulimit -Hn, or LimitNOFILE of the service) and start again",
            *(os.strerror(error), limit),
        )


class _Handshakes:
    """Finds the addresses of failed connections in a socket's monitor events.

    Events of opening and closing name their connection by a file descriptor. Events of the handshake do not.
    """

    def __init__(self) -> None:
        self._addresses: dict[int, str] = {}
        self._num_succeeded = 0
        self._failed = 0

    def happened(self, event: int, value: int) -> tuple[str, str] | None:
        """Take one event. Returns address and reason when the event shows that a connection was refused."""
        if event == zmq.EVENT_ACCEPTED:
            self._addresses[value] = _address(value)
        elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._num_succeeded += 1
            if self._num_succeeded >= len(self._addresses):
                self._addresses.clear()
                self._num_succeeded = 0
        elif event == zmq.EVENT_DISCONNECTED:
            failed, self._failed = self._failed, 0
            address = self._addresses.pop(value, "")
            if failed:
                return address or GONE, _REASONS[failed]
            # While several connections are open and one has succeeded, this may be the one that did.
            if address and not self._num_succeeded:
                return address, "it does not speak ZeroMQ"
        else:
            # The same connection's EVENT_DISCONNECTED follows at once and has the descriptor.
            self._failed = event
        return None


def _address(descriptor: int) -> str:
    """Return the peer's IP address; `GONE` when the connection is already closed."""
    try:
        with sockets.socket(fileno=os.dup(descriptor)) as peer:
            name = peer.getpeername()
    except OSError:
        return GONE
    return str(name[0]) if isinstance(name, tuple) else "this machine"
