"""The connection against small servers that answer late, twice, wrongly or not at all."""

import asyncio
import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import zmq

from buffer.transport import messages
from buffer.transport.connection import Connection, RequestRefused
from buffer.transport.credentials import Credentials
from buffer.transport.router import Router
from tests.buffer.conftest import GroupMaker

CREDENTIALS = Credentials.plain("test")

Answer = Callable[[messages.Message, int], list[messages.Frames]]


class Answering:
    """A ROUTER in a thread; `answer` returns the replies to each message."""

    def __init__(self, address: str, answer: Answer) -> None:
        self.heard: list[int] = []
        self._answer, self._stop = answer, threading.Event()
        self._router = Router(address, CREDENTIALS)
        self.address = self._router.address
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            self._router.socket.poll(10)
            for incoming in self._router.receive(10, time.monotonic())[0]:
                self.heard.append(incoming.number)
                for reply in self._answer(incoming.message, incoming.number):
                    self._router.socket.send_multipart([incoming.identity, *reply])
        self._router.close()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()


def echo(message: messages.Message, number: int) -> list[messages.Frames]:
    assert isinstance(message, messages.CheckpointCommitted)
    return [messages.encode(messages.LearnerWelcome(message.policy_version, 0), number, "test")]


@pytest.fixture
def address(run_dir: Path) -> str:
    return f"ipc://{run_dir}/socket"


@pytest.fixture
def serving() -> Iterator[Callable[[str, Answer], Answering]]:
    """Starts servers that end with the test, also when it fails."""
    servers: list[Answering] = []

    def start(address: str, answer: Answer) -> Answering:
        servers.append(Answering(address, answer))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def connection(address: str) -> Iterator[Connection]:
    with Connection(address, "test", CREDENTIALS, timeout_seconds=10, resend_seconds=0.1) as opened:
        yield opened


def test_many_threads_get_their_own_answers(serving: Callable[..., Answering], address: str, connection: Connection):
    server = serving(address, echo)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: connection.call(messages.CheckpointCommitted(n)), range(200)))
    server.close()
    assert answers == [messages.LearnerWelcome(n, 0) for n in range(200)]


def test_a_request_waits_for_a_server_that_starts_later(
    serving: Callable[..., Answering], address: str, connection: Connection
):
    future = connection.request(messages.CheckpointCommitted(1))
    time.sleep(0.5)
    assert not future.done()
    server = serving(address, echo)
    assert future.result(5) == messages.LearnerWelcome(1, 0)
    time.sleep(0.1)
    server.close()
    assert len(server.heard) <= 2, "repeats do not pile up while the server is away"


def test_an_unanswered_request_is_repeated_under_its_number(
    serving: Callable[..., Answering], address: str, connection: Connection
):
    server = serving(address, lambda m, n: echo(m, n) if server.heard.count(n) >= 3 else [])
    assert connection.call(messages.CheckpointCommitted(7)) == messages.LearnerWelcome(7, 0)
    server.close()
    assert server.heard[:3] == [0, 0, 0]


def test_a_second_answer_is_ignored(serving: Callable[..., Answering], address: str, connection: Connection):
    server = serving(address, lambda m, n: echo(m, n) * 2)
    assert [connection.call(messages.CheckpointCommitted(n)) for n in (1, 2)] == [
        messages.LearnerWelcome(1, 0),
        messages.LearnerWelcome(2, 0),
    ]
    server.close()


def test_a_broken_answer_is_dropped_and_the_request_repeated(
    serving: Callable[..., Answering], address: str, connection: Connection
):
    server = serving(address, lambda m, n: echo(m, n) if server.heard.count(n) > 1 else [[b"\xc1"]])
    assert connection.call(messages.CheckpointCommitted(7)) == messages.LearnerWelcome(7, 0)
    server.close()


def test_a_restarted_server_is_found_again(serving: Callable[..., Answering], address: str, connection: Connection):
    server = serving(address, echo)
    connection.call(messages.CheckpointCommitted(1))
    server.close()
    future = connection.request(messages.CheckpointCommitted(2))
    time.sleep(0.3)
    server = serving(address, echo)
    assert future.result(5) == messages.LearnerWelcome(2, 0)
    server.close()


def test_the_socket_is_reopened_when_nothing_is_heard(
    serving: Callable[..., Answering], address: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("buffer.transport.connection.SILENT_RESENDS", 3)
    opened: list[int] = []
    real = Connection._open
    monkeypatch.setattr(Connection, "_open", lambda self: opened.append(1) or real(self))
    server = serving(address, lambda m, n: echo(m, n) if len(opened) > 1 else [])
    with Connection(address, "test", CREDENTIALS, timeout_seconds=10, resend_seconds=0.1) as connection:
        assert connection.call(messages.CheckpointCommitted(7)) == messages.LearnerWelcome(7, 0)
    server.close()
    assert len(opened) >= 2


def test_a_refusal_is_raised(serving: Callable[..., Answering], address: str, connection: Connection):
    server = serving(address, lambda m, n: [messages.encode(messages.Refused("no such thing"), n, "test")])
    with pytest.raises(RequestRefused, match="no such thing"):
        connection.call(messages.Close())
    server.close()


def test_a_timeout_names_what_was_waited_for(address: str, connection: Connection):
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=f"no answer to StatusRequest from {address} within 0.2 s"):
        connection.call(messages.StatusRequest(), 0.2)
    assert 0.15 < time.monotonic() - started < 2


def test_closing_fails_what_waits_and_what_comes_after(connection: Connection):
    future = connection.request(messages.Close(), math.inf)
    connection.close()
    with pytest.raises(ConnectionError, match="before it answered Close"):
        future.result(0)
    with pytest.raises(ConnectionError, match="is closed"):
        connection.call(messages.Close())
    connection.close()


def test_it_works_from_asyncio_and_a_cancelled_request_stops(
    serving: Callable[..., Answering], address: str, connection: Connection
):
    server = serving(address, lambda m, n: echo(m, n) if isinstance(m, messages.CheckpointCommitted) else [])

    async def talk() -> messages.Message:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.wrap_future(connection.request(messages.Close())), 0.15)
        return await asyncio.wrap_future(connection.request(messages.CheckpointCommitted(3)))

    assert asyncio.run(talk()) == messages.LearnerWelcome(3, 0)
    time.sleep(0.15)
    repeats = server.heard.count(0)
    time.sleep(0.3)
    server.close()
    assert server.heard.count(0) == repeats


def test_a_reopened_socket_takes_over_its_identity(serving: Callable[..., Answering], address: str):
    server = serving(address, echo)
    with zmq.Context() as context, context.socket(zmq.DEALER) as old, context.socket(zmq.DEALER) as new:
        for version, dealer in enumerate((old, new)):
            dealer.setsockopt(zmq.IDENTITY, b"same")
            dealer.setsockopt(zmq.RCVTIMEO, 5000)
            dealer.setsockopt(zmq.LINGER, 0)
            dealer.connect(address)
            dealer.send_multipart(messages.encode(messages.CheckpointCommitted(version), 0, "test"))
            assert messages.decode(dealer.recv_multipart(), "test")[0] == messages.LearnerWelcome(version, 0)
    server.close()


def test_a_port_in_use_gives_one_sentence(serving: Callable[..., Answering], address: str):
    server = serving("tcp://127.0.0.1:*", echo)
    with pytest.raises(ValueError, match=f"{server.address} is in use; end the process"):
        Router(server.address, CREDENTIALS)
    with pytest.raises(ValueError, match="cannot listen on ipc:///nowhere"):
        Router("ipc:///nowhere/at/all", CREDENTIALS)
    server.close()


def beat() -> messages.Heartbeat:
    return messages.Heartbeat("actor", "test", 0, "", {})


def test_answers_that_nobody_waits_for_are_handed_over(serving: Callable[..., Answering], address: str):
    late = threading.Event()

    def answer(message: messages.Message, number: int) -> list[messages.Frames]:
        if isinstance(message, messages.CheckpointCommitted):
            return echo(message, number) * 2
        late.wait(10)
        return [messages.encode(messages.Done(), number, "test")]

    handed_over: list[messages.Message] = []
    server = serving(address, answer)
    with Connection(address, "test", CREDENTIALS, timeout_seconds=20, unclaimed=handed_over.append) as connection:
        assert connection.call(messages.CheckpointCommitted(1)) == messages.LearnerWelcome(1, 0)
        expired, cancelled = connection.request(messages.Close(), 0.1), connection.request(messages.Close())
        with pytest.raises(TimeoutError):
            expired.result()
        cancelled.cancel()
        late.set()
        assert connection.call(messages.CheckpointCommitted(2)) == messages.LearnerWelcome(2, 0)
    server.close()
    assert handed_over[:3] == [messages.LearnerWelcome(1, 0), messages.Done(), messages.Done()]


def test_a_lost_delivery_is_sent_again_when_a_later_heartbeat_is_answered(
    serving: Callable[..., Answering], address: str, make_group: GroupMaker
):
    def answer(message: messages.Message, number: int) -> list[messages.Frames]:
        if isinstance(message, messages.GroupDelivery) and server.heard.count(number) == 1:
            return []
        return [messages.encode(messages.Done(), number, "test")]

    server = serving(address, answer)
    with Connection(address, "test", CREDENTIALS, timeout_seconds=20, resend_seconds=60) as connection:
        delivery = connection.request(messages.GroupDelivery("test", make_group("0.0", 0)))
        connection.call(beat())
        assert delivery.result() == messages.Done()
    server.close()
    assert server.heard == [0, 1, 0]


def test_a_server_that_ended_gets_everything_again_at_once(serving: Callable[..., Answering], address: str):
    server = serving(address, lambda *_: [])
    with Connection(address, "test", CREDENTIALS, timeout_seconds=20, resend_seconds=60) as connection:
        futures = [connection.request(messages.CheckpointCommitted(n)) for n in range(3)]
        while len(server.heard) < 3:
            time.sleep(0.01)
        server.close()
        server = serving(address, echo)
        assert [future.result() for future in futures] == [messages.LearnerWelcome(n, 0) for n in range(3)]
    server.close()
