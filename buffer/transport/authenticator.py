"""Who may connect: answers ZeroMQ's authentication requests and reports the connections that were turned away.

Owned by `buffer/transport/router.py`; one thread per server. With CURVE only the run's client key is let in; a peer
without a key, with another server's key or without ZeroMQ fails before that. Each address that fails is logged once
and counted every time; one that is gone before it can be asked for its address is counted and logged as such. Ends by
itself when its ZeroMQ context does.
"""

from __future__ import annotations

import logging
import os
import socket as sockets
import threading
from collections.abc import Callable

import zmq
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from buffer.transport.credentials import Credentials

log = logging.getLogger(__name__)

MAX_ADDRESSES = 1_000
"""Addresses remembered as logged; those beyond are only counted."""
ZAP_ADDRESS = "inproc://zeromq.zap.01"
MONITOR_ADDRESS = "inproc://handshakes"
GONE = "an address that is gone"
_NO_KEY = "it has no key or another server's, or broke off"
# A peer without a key sees that one is asked for, and may be the first to end the connection.
_REASONS = {
    int(zmq.EVENT_HANDSHAKE_FAILED_AUTH): "its key is not this run's",
    int(zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL): _NO_KEY,
    int(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL): _NO_KEY,
}
_WATCHED = sum(_REASONS) | zmq.EVENT_ACCEPTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED


class Authenticator:
    """Guards `socket`, which must not be bound yet. `count` is called with "rejected" for each one turned away."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        socket: zmq.Socket[bytes],
        credentials: Credentials,
        count: Callable[[str], None],
    ) -> None:
        self._client_key = z85.decode(credentials.client_public) if credentials.encrypted else b""
        self._count = count
        self._handshakes = _Handshakes()
        self._logged: set[str] = set()
        self._requests = context.socket(zmq.REP)
        self._requests.bind(ZAP_ADDRESS)
        socket.monitor(MONITOR_ADDRESS, _WATCHED)
        self._events = context.socket(zmq.PAIR)
        self._events.connect(MONITOR_ADDRESS)
        self._thread = threading.Thread(target=self._run, name="authenticator", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait for the thread, which ends with its context: call it after, or while another thread ends that."""
        self._thread.join()

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._requests, zmq.POLLIN)
        poller.register(self._events, zmq.POLLIN)
        try:
            while True:
                ready = dict(poller.poll())
                # Events first: a connection that waits for its key to be judged can still be asked for its address.
                if self._events in ready:
                    self._watch(self._events.recv_multipart())
                elif self._requests in ready:
                    self._authenticate(self._requests.recv_multipart())
        except zmq.ContextTerminated:
            pass  # The router is closed: this is how the thread ends.
        finally:
            self._requests.close(linger=0)
            self._events.close(linger=0)

    def _authenticate(self, request: list[bytes]) -> None:
        """RFC 27: version, request id, domain, address, identity, mechanism, credentials."""
        version, request_id, mechanism, key = request[0], request[1], request[5], request[6:7]
        known = mechanism == b"CURVE" and key == [self._client_key]
        status = (b"200", b"OK", b"client") if known else (b"400", b"this key is not the run's", b"")
        self._requests.send_multipart([version, request_id, *status, b""])

    def _watch(self, frames: list[bytes]) -> None:
        event = parse_monitor_message(frames)
        turned_away = self._handshakes.happened(int(event["event"]), int(event["value"]))
        if turned_away is None:
            return
        address, reason = turned_away
        if address not in self._logged and len(self._logged) < MAX_ADDRESSES:
            self._logged.add(address)
            log.warning("a connection from %s was turned away: %s", address, reason)
        # Last: whoever sees the count finds the line in the log.
        self._count("rejected")


class _Handshakes:
    """Which connections are under way. ZeroMQ names a connection by its file descriptor, but not in every event."""

    def __init__(self) -> None:
        self._addresses: dict[int, str] = {}
        self._num_succeeded = 0
        self._failed = 0

    def happened(self, event: int, value: int) -> tuple[str, str] | None:
        """The address that was turned away and why, when that is what happened."""
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
            # While it is unclear which of several connections succeeded, this may have been one of those.
            if address and not self._num_succeeded:
                return address, "it does not speak ZeroMQ"
        else:
            # The disconnection of the same peer follows at once and has the descriptor.
            self._failed = event
        return None


def _address(descriptor: int) -> str:
    """The peer's address, as far as the connection is still there."""
    try:
        with sockets.socket(fileno=os.dup(descriptor)) as peer:
            name = peer.getpeername()
    except OSError:
        return GONE
    return str(name[0]) if isinstance(name, tuple) else "this machine"
