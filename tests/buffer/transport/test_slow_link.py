"""Large messages over a link of a few MB/s: each travels once, and small messages are not held up behind them."""

import threading
import time
from collections import Counter
from collections.abc import Iterator

import pytest
import zmq

from buffer.transport import messages
from buffer.transport.connection import Connection, bounded_socket
from buffer.transport.credentials import Credentials
from buffer.transport.outbox import FIRST_WINDOW_BYTES
from buffer.transport.router import Incoming, Router
from tests.buffer.conftest import GroupMaker
from tests.buffer.transport.slow_link import SlowLink

CREDENTIALS = Credentials.plain("test")


class Server:
    """A ROUTER in a thread behind a slow link. It answers as the buffer and the weight store do."""

    def __init__(self, bytes_per_second: float, chunk_bytes: int = 0) -> None:
        self.received: list[Incoming] = []
        self._chunk, self._stop = bytes(chunk_bytes), threading.Event()
        self._router = Router("tcp://127.0.0.1:*", CREDENTIALS)
        self.link = SlowLink(int(self._router.address.rpartition(":")[2]), bytes_per_second)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            self._router.socket.poll(10)
            for incoming in self._router.receive(100, time.monotonic())[0]:
                self.received.append(incoming)
                self._router.send(incoming.identity, self._answer(incoming.message), incoming.number)
        self._router.close()

    def _answer(self, message: messages.Message) -> messages.Message:
        match message:
            case messages.GroupDelivery():
                return messages.GroupReceipt(message.group.header.group_id, "stored")
            case messages.ChunkRequest():
                return messages.Chunk(0, "abc", self._chunk)
            case _:
                return messages.HeartbeatReply(0, False)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self.link.close()


@pytest.fixture
def serve() -> Iterator[type[Server]]:
    servers: list[Server] = []

    def start(*arguments: float) -> Server:
        servers.append(Server(*arguments))  # type: ignore[arg-type]
        return servers[-1]

    yield start  # type: ignore[misc]
    for server in servers:
        server.close()


def test_deliveries_travel_once_and_a_heartbeat_overtakes_those_that_wait(serve: type[Server], make_group: GroupMaker):
    groups = [make_group(f"{number}.0", number, size=1, num_tokens=70_000) for number in range(16)]
    num_bytes = sum(group.num_bytes for group in groups)
    server = serve(3e6)
    with Connection(server.link.address, "actor-0", CREDENTIALS, timeout_seconds=120, resend_seconds=1.0) as actor:
        deliveries = [actor.request(messages.GroupDelivery("actor-0", group)) for group in groups]
        actor.call(messages.Heartbeat("actor", "actor-0", 0, "", {}))
        earlier = [each for each in server.received if isinstance(each.message, messages.GroupDelivery)]
        for delivery in deliveries:
            delivery.result()
    assert server.link.num_bytes_up <= 1.1 * num_bytes
    assert len(earlier) * groups[0].num_bytes <= 3 * FIRST_WINDOW_BYTES
    assert len(earlier) < 16 / 2


def test_a_large_answer_is_not_sent_again_while_it_is_on_its_way(serve: type[Server], monkeypatch: pytest.MonkeyPatch):
    def small_buffer(context: "zmq.Context[zmq.Socket[bytes]]", kind: int) -> "zmq.Socket[bytes]":
        # Otherwise the kernel takes megabytes, and the server cannot see that they have not arrived.
        socket = bounded_socket(context, kind)
        socket.setsockopt(zmq.SNDBUF, 1 << 16)
        return socket

    monkeypatch.setattr("buffer.transport.router.bounded_socket", small_buffer)
    server = serve(3e6, 12_000_000)
    with Connection(server.link.address, "actor-0", CREDENTIALS, timeout_seconds=120, resend_seconds=1.0) as actor:
        chunk = actor.call(messages.ChunkRequest("p", "", 0, 12_000_000))
        assert isinstance(chunk, messages.Chunk) and len(chunk.data) == 12_000_000
    [copies] = Counter(each.number for each in server.received).values()
    assert copies <= 2


def test_an_answer_that_takes_longer_than_the_silence_before_a_reopening_arrives(
    serve: type[Server], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("buffer.transport.connection.SILENT_RESENDS", 1)
    server = serve(3e6, 3_000_000)
    with Connection(server.link.address, "actor-0", CREDENTIALS, timeout_seconds=120, resend_seconds=0.3) as actor:
        chunk = actor.call(messages.ChunkRequest("p", "", 0, 3_000_000))
        assert isinstance(chunk, messages.Chunk) and len(chunk.data) == 3_000_000
