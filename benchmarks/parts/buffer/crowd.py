"""Many actors in few processes: raw DEALER sockets, each of which acts as one correct actor does.

An actor always has one lease request at the buffer. It delivers every group that it is granted at once, asks for more,
and sends heartbeats with the metrics of a real actor. All actors of a process share one thread.
"""

from __future__ import annotations

import heapq
import resource
import select
import struct
import time
from collections.abc import Callable
from typing import Any

import msgpack
import zmq

from buffer.transport import messages
from buffer.transport.credentials import Credentials
from buffer.transport.packed_group import PackedGroup

CREDIT = 32
METRICS = dict.fromkeys((f"metric_{number}_seconds" for number in range(16)), 1.0)

Named = Callable[[PackedGroup, messages.Lease, int], PackedGroup]
"""The same contents as the group of a lease, sampled by a policy version."""


class Actor:
    """One connection. `policy_version` has the learner's version, which every actor has at once."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        address: str,
        name: str,
        credentials: Credentials,
        contents: PackedGroup,
        named: Named,
        policy_version: Any,
    ) -> None:
        self._name, self._run_id, self._contents, self._named = name, credentials.run_id, contents, named
        self._policy_version = policy_version
        self._number = 0
        self._held: set[str] = set()
        self._said: Any = None
        """What the last heartbeat said."""
        self.least_heartbeat_seconds = 0.0
        """As the buffer asks in its last answer to a heartbeat."""
        self.socket = context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.IDENTITY, f"{name}-00000000".encode())
        if credentials.encrypted:
            self.socket.curve_serverkey = credentials.server_public
            self.socket.curve_publickey = credentials.public
            self.socket.curve_secretkey = credentials.secret
        self.socket.connect(address)

    def _send(self, message: messages.Message) -> None:
        self._number += 1
        self.socket.send_multipart(messages.encode(message, self._number, self._run_id))

    def ask(self) -> None:
        """Ask for leases."""
        version, held = self._policy_version.value, tuple(self._held)
        self._send(messages.LeaseRequest(self._name, version, CREDIT, "prompts", held))

    def beat(self) -> None:
        """Send a heartbeat."""
        said = self._policy_version.value, tuple(self._held)
        if said != self._said:
            beat = messages.Heartbeat("actor", self._name, said[0], "prompts from the buffer", METRICS, said[1])
            # Only the number of a header, its fourth value, changes: the benchmark's processes must stay light.
            self._said, header = said, msgpack.unpackb(messages.encode(beat, 0, self._run_id)[0])
            self._before = b"\x95" + b"".join(map(msgpack.packb, header[:3]))
            self._after = msgpack.packb(header[4])
        self._number += 1
        self.socket.send(self._before + msgpack.packb(self._number) + self._after)
        self.read()

    def read(self) -> None:
        """Act on all answers that have arrived."""
        while True:
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if b"HeartbeatReply" in frames[0][:64]:
                # Its last value, which ends the frame. All of it is not decoded, to keep this process light.
                self.least_heartbeat_seconds = struct.unpack(">d", frames[0][-8:])[0]
                continue
            answer, _ = messages.decode(frames, self._run_id)
            if isinstance(answer, messages.LeaseReply):
                version = self._policy_version.value
                self._held.update(lease.group_id for lease in answer.leases)
                for lease in answer.leases:
                    group = self._named(self._contents, lease, version)
                    self._send(messages.GroupDelivery(self._name, group))
                self.ask()
            elif isinstance(answer, messages.GroupReceipt):
                self._held.discard(answer.group_id)
            elif isinstance(answer, messages.Refused):
                raise RuntimeError(answer.reason)


def crowd(
    address: str,
    names: list[str],
    credentials: Credentials,
    contents: PackedGroup,
    named: Named,
    version: Any,
    heartbeat_seconds: float,
) -> None:
    """Act as the actors `names`, until the process is ended."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    context.set(zmq.MAX_SOCKETS, 2 * len(names) + 100)
    actors = [Actor(context, address, name, credentials, contents, named, version) for name in names]
    by_file = {actor.socket.getsockopt(zmq.FD): actor for actor in actors}
    ready = select.epoll()
    for number in by_file:
        ready.register(number, select.EPOLLIN)
    begin = time.monotonic()
    beats = [(begin + heartbeat_seconds * (1 + number / len(actors)), number) for number in range(len(actors))]
    for actor in actors:
        actor.ask()
        actor.read()
    while True:
        now = time.monotonic()
        while beats[0][0] <= now:
            due, number = beats[0]
            actors[number].beat()
            seconds = max(heartbeat_seconds, actors[number].least_heartbeat_seconds)
            heapq.heapreplace(beats, (max(due + seconds, now), number))
        for number, _ in ready.poll(max(0.0, beats[0][0] - time.monotonic())):
            by_file[number].read()
