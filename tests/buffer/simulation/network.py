"""The network: messages of clients and the buffer's answers, delayed, duplicated, reordered and dropped.

Frames are really encoded and decoded. `Client` stands in for `Connection` (`buffer/transport/connection.py`): the same
numbers, the same `Outbox` that says what is sent again, without a thread and a socket.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from buffer.transport import messages
from buffer.transport.connection import RequestRefused
from buffer.transport.outbox import Outbox, Request
from buffer.transport.router import Incoming, read_incoming
from buffer.transport.schema import Frame
from tests.buffer.simulation.virtual_time import Process, World

RUN_ID = "simulated"
RESEND_SECONDS = 2.0
Frames = list[bytes]


@dataclass
class Weather:
    """How bad the network is: probabilities per message."""

    lost: float = 0.0
    doubled: float = 0.0
    late: float = 0.0
    late_seconds: float = 5.0


CALM = Weather()


class Network:
    """Carries frames between clients and the buffer's router."""

    def __init__(self, world: World, weather: Weather) -> None:
        self.world, self.weather = world, weather
        self.router: Router | None = None
        """Of the buffer's present process; None while there is none."""
        self.clients: dict[str, Client] = {}
        """By identity of the connection."""
        self.delivering: Callable[[str, Frame], object] = lambda group_id, arrays: None
        """Called with the arrays of every group that a client delivers."""
        self._cut: dict[str, float] = {}
        self._freeze: dict[str, float] = {}
        self._straggling: dict[str, float] = {}

    def cut(self, process: Process, seconds: float) -> None:
        """Carry nothing to and from `process` for a while."""
        process.log(f"is cut off for {seconds:.2f} s")
        self._cut[process.identity] = self.world.now + seconds

    def hold_back(self, process: Process, seconds: float) -> None:
        """Let half of the messages that `process` sends arrive up to `seconds` later, even after its death."""
        process.log(f"sends messages that come up to {seconds:.2f} s late")
        self._straggling[process.identity] = seconds

    def freeze_at_leases(self, process: Process, seconds: float) -> None:
        """Freeze `process` when the next leases are on their way to it."""
        self._freeze[process.identity] = seconds

    def disconnect(self) -> None:
        """The buffer's process is another one: most clients notice that, some only by its silence."""
        for client in self.clients.values():
            if client.process.alive and self.world.chance(0.7):
                self.world.after(self.world.uniform(0.1, 1.0), client.disconnected, client.process)

    def heal(self) -> None:
        self.weather = CALM
        self._cut.clear()
        self._freeze.clear()
        self._straggling.clear()

    def _delays(self, process: Process) -> list[float]:
        """Return when each copy of a message arrives."""
        rng, weather = self.world.rng, self.weather
        copies = 1 + (rng.random() < weather.doubled)
        delays = []
        for _ in range(copies):
            delay = rng.uniform(0.0002, 0.003)
            if rng.random() < weather.late:
                delay += rng.uniform(0.0, weather.late_seconds)
            if rng.random() >= weather.lost and self._cut.get(process.identity, 0.0) <= self.world.now:
                delays.append(delay)
        return delays

    def to_buffer(self, client: Client, frames: Frames) -> None:
        def arrive() -> None:
            if self.router is not None:
                self.router.arrived(client.identity, frames)

        late = self._straggling.get(client.process.identity, 0.0) if self.world.chance(0.5) else 0.0
        for delay in self._delays(client.process):
            self.world.after(delay + self.world.uniform(0.0, late), arrive)

    def to_client(self, identity: bytes, message: messages.Message, number: int) -> None:
        client = self.clients.get(identity.decode())
        if client is None:
            return
        if isinstance(message, messages.LeaseReply) and client.process.identity in self._freeze:
            client.process.freeze(self._freeze.pop(client.process.identity))
        frames = [bytes(frame) for frame in messages.encode(message, number, RUN_ID)]
        for delay in self._delays(client.process):
            self.world.after(delay, lambda: client.arrived(frames), client.process)


class Router:
    """Stands in for the buffer's ROUTER socket (`buffer/transport/router.py`)."""

    address = "simulated"

    def __init__(self, network: Network, wake: Callable[[], object]) -> None:
        self._network, self._wake = network, wake
        self._waiting: list[tuple[str, Frames]] = []
        self.sent: list[tuple[bytes, messages.Message, int]] = []
        """The answers of this turn."""
        self.noted: list[Exception] = []
        """Errors that the server blames on a peer's message, in this turn."""

    def arrived(self, identity: str, frames: Frames) -> None:
        self._waiting.append((identity, frames))
        self._wake()

    def receive(self, limit: int, now: float) -> tuple[list[Incoming], bool]:
        taken, self._waiting = self._waiting[:limit], self._waiting[limit:]
        return [read_incoming(name.encode(), frames, RUN_ID) for name, frames in taken], bool(self._waiting)

    def send(self, identity: bytes, message: messages.Message, number: int) -> None:
        self.sent.append((identity, message, number))
        self._network.to_client(identity, message, number)

    def note(self, identity: bytes, complaint: Exception, now: float) -> None:
        self.noted.append(complaint)

    def take_counts(self) -> dict[str, int]:
        return {}

    def close(self) -> None:
        pass


class Client:
    """One connection of one process: what `Connection` does in its thread, with the same `Outbox`."""

    def __init__(self, network: Network, process: Process, name: str, timeout_seconds: float) -> None:
        self.process, self._network, self._timeout_seconds = process, network, timeout_seconds
        self.identity = f"{name}-{process.identity.rpartition('-')[2]}"
        self.heard: Callable[[messages.Message, messages.Message], object] = lambda request, answer: None
        """Called with each request and its answer when the process learns of it."""
        self.unclaimed: Callable[[messages.Message], object] | None = None
        """Called with each answer that no request waits for."""
        self.epoch = 0
        self._outbox = Outbox(RESEND_SECONDS)
        self._messages: dict[int, messages.Message] = {}
        self._next_number = 0
        self._wakes_at = math.inf
        """When the thread's `poll` ends without a message."""
        self._closed = False
        network.clients[self.identity] = self

    def request(self, message: messages.Message, timeout_seconds: float | None = None) -> Future[Any]:
        if self._closed:
            raise ConnectionError("the connection is closed")
        number, self._next_number = self._next_number, self._next_number + 1
        message = messages.with_epoch(message, self.epoch)
        frames = [bytes(frame) for frame in messages.encode(message, number, RUN_ID)]
        if isinstance(message, messages.GroupDelivery):
            self._network.delivering(message.group.header.group_id, message.group.arrays_frame)
        seconds = self._timeout_seconds if timeout_seconds is None else timeout_seconds
        entry = Request(number, type(message).__name__, frames, self._network.world.now + seconds, seconds)
        self._messages[number] = message
        self._outbox.add(entry)
        self.process.log(f"sends {number} {brief(message)}")
        self._network.world.after(0.0, self._wake, self.process)
        return entry.future

    async def call(self, message: messages.Message, timeout_seconds: float | None = None) -> Any:
        return await asyncio.wrap_future(self.request(message, timeout_seconds))

    def disconnected(self) -> None:
        """The connection broke and is open again."""
        self._outbox.disconnected(self._network.world.now)
        self._wake()

    def close(self) -> None:
        self._closed = True
        for entry in self._outbox:
            self._finish(entry, ConnectionError("the connection was closed"))

    # What the thread does between two polls.

    def _wake(self, frames: Frames | None = None) -> None:
        if self._closed:
            return
        world = self._network.world
        # The thread may be stopped anywhere; it notices that only if it was inside `poll`.
        if world.now > self._wakes_at and world.chance(0.7):
            self._outbox.postpone(world.now - self._wakes_at)
        if frames is not None:
            self._receive(frames)
        self._expire()
        for entry in self._outbox.to_send(world.now):
            self._network.to_buffer(self, entry.frames)
            self._outbox.sent(entry, world.now)
        deadlines = [entry.deadline for entry in self._outbox]
        self._wakes_at = min([self._outbox.next_due(world.now), *deadlines])
        if self._wakes_at < world.now + 1e6:
            moment = self._wakes_at
            world.after(moment - world.now, lambda: self._wake() if moment == self._wakes_at else None, self.process)

    def arrived(self, frames: Frames) -> None:
        self._wake(frames)

    def _receive(self, frames: Frames) -> None:
        answer, number = messages.decode(frames, RUN_ID)
        entry = self._outbox.get(number)
        if entry is None:
            self._hand_over(answer)
            return
        self._outbox.answered(entry, self._network.world.now)
        self.process.log(f"gets  {number} {brief(answer)}")
        self.heard(self._messages[number], answer)
        if not self._finish(entry, RequestRefused(answer.reason) if isinstance(answer, messages.Refused) else answer):
            self._hand_over(answer)

    def _hand_over(self, answer: messages.Message) -> None:
        if self.unclaimed is not None:
            self.unclaimed(answer)

    def _expire(self) -> None:
        for entry in self._outbox:
            if entry.future.cancelled():
                self._outbox.remove(entry)
            elif entry.deadline <= self._network.world.now:
                self._finish(entry, TimeoutError(f"no answer to {entry.kind} within {entry.timeout_seconds:g} s"))

    def _finish(self, entry: Request, outcome: Any) -> bool:
        self._outbox.remove(entry)
        if not entry.future.set_running_or_notify_cancel():
            return False
        if isinstance(outcome, Exception):
            entry.future.set_exception(outcome)
        else:
            entry.future.set_result(outcome)
        return True


def brief(message: messages.Message) -> str:
    """Name a message and what matters of it, for the trace."""
    match message:
        case messages.LeaseReply():
            leases = " ".join(lease.group_id for lease in message.leases)
            return f"LeaseReply [{leases}] evaluate={message.evaluate_version} closing={message.closing}"
        case messages.GroupDelivery():
            return f"GroupDelivery {message.group.header.group_id} from v{message.group.header.oldest_version}"
        case messages.Shard():
            groups = " ".join(group.header.group_id for group in message.groups)
            return f"Shard v{message.policy_version} [{groups}] staleness {message.staleness}"
        case messages.Heartbeat():
            return f"Heartbeat v{message.policy_version} {message.waiting_for}"
        case messages.EvaluationReport():
            return f"EvaluationReport of {message.requested_version} under v{message.policy_version}"
        case messages.EvaluationReports():
            return f"EvaluationReports {[report.requested_version for report in message.reports]}"
        case messages.Status():
            return "Status"
        case _:
            return str(message)
