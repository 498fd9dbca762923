"""Connections and messages that the router accepts or refuses, and its log; with real sockets and keys."""

import logging
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import zmq

from buffer.transport import ban_list, messages
from buffer.transport.authenticator import GONE
from buffer.transport.ban_list import BanList
from buffer.transport.connection import Connection
from buffer.transport.credentials import Credentials, RunKeys
from buffer.transport.roles import ROLES
from buffer.transport.router import Incoming, Router
from buffer.transport.schema import WireError

RUN, OTHER_RUN = RunKeys.new("run"), RunKeys.new("other")
ACTOR = RUN.clients["actor"]
SECONDS = 20.0


@pytest.fixture
def router() -> Iterator[Router]:
    opened = Router("tcp://127.0.0.1:*", RUN.buffer)
    yield opened
    opened.close()


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def serve_until(router: Router, condition: Callable[[], object]) -> None:
    def answer() -> object:
        for incoming in router.receive(10, time.monotonic())[0]:
            router.send(incoming.identity, messages.Done(), incoming.number)
        return condition()

    until(answer)


def test_a_client_of_the_run_is_answered(router: Router):
    with Connection(router.address, "actor-0", ACTOR, timeout_seconds=SECONDS) as connection:
        future = connection.request(messages.Close())
        serve_until(router, future.done)
        assert future.result() == messages.Done()
    assert router.take_counts() == {}


@pytest.mark.parametrize("role", ROLES)
def test_a_message_has_the_role_of_its_senders_key(router: Router, role: str):
    heard: list[Incoming] = []
    with Connection(router.address, "somebody", RUN.clients[role], timeout_seconds=SECONDS) as connection:
        connection.request(messages.StatusRequest())
        until(lambda: heard.extend(router.receive(10, 0.0)[0]) or heard)
    assert heard[0].role == role


NO_KEY = "it has no key or another server's, or broke off"
STRANGERS = {
    "no key": (Credentials.plain("run"), NO_KEY),
    "another server's key": (replace(OTHER_RUN.clients["actor"], run_id="run"), NO_KEY),
    "a key of its own": (
        replace(OTHER_RUN.clients["actor"], run_id="run", server_public=ACTOR.server_public),
        "its key is not this run's",
    ),
}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_stranger_gets_nothing_and_is_logged_once(router: Router, stranger: str, caplog: pytest.LogCaptureFixture):
    credentials, reason = STRANGERS[stranger]
    heard: list[object] = []
    rejected = 0
    for _ in range(3):
        with Connection(router.address, "spy", credentials, timeout_seconds=0.5) as connection:
            asked = connection.request(messages.StatusRequest())
            until(lambda: heard.extend(router.receive(10, 0.0)[0]) or asked.done())  # noqa: B023
            with pytest.raises(TimeoutError, match=r"no answer to StatusRequest .* the last handshake failed: "):
                asked.result()
        rejected += router.take_counts().get("rejected", 0)
    assert not heard
    assert rejected >= 3
    lines = [record.message for record in caplog.records if record.name == "buffer.transport.authenticator"]
    # A connection that fails at once may be closed before its address can be read.
    addresses = ["127.0.0.1"] if stranger == "a key of its own" else ["127.0.0.1", GONE]
    assert lines
    assert len(lines) == len(set(lines))
    assert set(lines) <= {f"a connection from {address} was turned away: {reason}" for address in addresses}
    assert RUN.buffer.secret.decode() not in caplog.text


def test_something_that_does_not_speak_the_protocol_gets_nothing(router: Router, caplog: pytest.LogCaptureFixture):
    port = int(router.address.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as browser:
        browser.settimeout(SECONDS)
        received = browser.recv(4096)
        until(lambda: router._authenticator._handshakes._addresses)
        browser.sendall(b"GET / HTTP/1.1\r\n\r\n" + b"x" * 100)
        with suppress(ConnectionResetError):
            while part := browser.recv(4096):
                received += part
    assert len(received) <= 64
    assert b"run" not in received
    until(lambda: router.take_counts().get("rejected"))
    assert "a connection from 127.0.0.1 was turned away: it does not speak ZeroMQ" in caplog.text


def test_a_server_without_the_runs_keys_is_not_believed(caplog: pytest.LogCaptureFixture):
    impostor = Router("tcp://127.0.0.1:*", replace(OTHER_RUN.buffer, run_id="run"))
    with Connection(impostor.address, "actor-0", ACTOR, timeout_seconds=0.5) as connection:
        asked = connection.request(messages.Close())
        serve_until(impostor, asked.done)
        with pytest.raises(TimeoutError, match="the last handshake failed"):
            asked.result()
    impostor.close()


def test_another_runs_id_is_dropped_counted_and_logged_once(router: Router, caplog: pytest.LogCaptureFixture):
    replayed = replace(ACTOR, run_id="yesterday")
    with Connection(router.address, "actor-0", replayed, timeout_seconds=60, resend_seconds=0.05) as connection:
        connection.request(messages.Close())
        counted = 0

        def several() -> bool:
            nonlocal counted
            assert router.receive(10, 0.0) == ([], False)
            counted += router.take_counts().get("foreign_run", 0)
            return counted >= 3

        until(several)
    lines = [r.message for r in caplog.records if r.name == "buffer.transport.ban_list"]
    assert len(lines) == 1
    assert lines[0].endswith("dropped: it belongs to run 'yesterday', not to run")


def test_answers_of_another_run_reach_nobody(caplog: pytest.LogCaptureFixture):
    router = Router("tcp://127.0.0.1:*", RUN.buffer)
    with Connection(router.address, "actor-0", ACTOR, timeout_seconds=1) as connection:
        asked = connection.request(messages.Close())

        def answer() -> bool:
            for incoming in router.receive(10, 0.0)[0]:
                router.socket.send_multipart(
                    [incoming.identity, *messages.encode(messages.Done(), incoming.number, "yesterday")]
                )
            return asked.done()

        until(answer)
        with pytest.raises(TimeoutError):
            asked.result()
    router.close()
    assert "dropped: it belongs to run 'yesterday'" in caplog.text


def test_a_nameless_connection_is_dropped(router: Router):
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger, dealer.curve_serverkey = 0, RUN.buffer.public
        dealer.curve_publickey, dealer.curve_secretkey = ACTOR.public, ACTOR.secret
        for identity in (b"two\nlines", b"\xff\xfe", b"../x"):
            dealer.setsockopt(zmq.IDENTITY, identity)
            dealer.connect(router.address)
            dealer.send_multipart(messages.encode(messages.Close(), 0, "run"))
            until(lambda: router.receive(10, 0.0) == ([], False) and router.take_counts().get("wire_errors"))
            dealer.disconnect(router.address)


def test_a_message_larger_than_allowed_is_dropped(router: Router, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("buffer.transport.router.MAX_MESSAGE_BYTES", 1000)
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger, dealer.curve_serverkey = 0, RUN.buffer.public
        dealer.curve_publickey, dealer.curve_secretkey = ACTOR.public, ACTOR.secret
        dealer.setsockopt(zmq.IDENTITY, b"big")
        dealer.connect(router.address)
        dealer.send_multipart([*messages.encode(messages.Chunk(0, "", b"x" * 300), 0, "run"), *[b"x" * 300] * 4])
        until(lambda: router.receive(10, 0.0) == ([], False) and router.take_counts().get("wire_errors"))
        dealer.send_multipart(messages.encode(messages.Close(), 7, "run"))
        until(lambda: [incoming.number for incoming in router.receive(10, 0.0)[0]] == [7])


def test_plain_sockets_stay_on_this_machine():
    with pytest.raises(ValueError, match="or use tcp://127"):
        Router("tcp://0.0.0.0:*", Credentials.plain("run"))
    with pytest.raises(ValueError, match="or use tcp://127"):
        Connection("tcp://10.0.0.1:5", "actor-0", Credentials.plain("run"))


def test_a_name_that_no_server_takes_is_refused_at_once():
    for name in ("", "../x", "a b", "x" * 129, "a\nb"):
        with pytest.raises(ValueError, match="is not made of 1 to 128 letters"):
            Connection("tcp://127.0.0.1:5", name, RUN)


def test_who_keeps_sending_nonsense_is_ignored_for_a_while(caplog: pytest.LogCaptureFixture):
    peers, now = BanList(), 100.0
    for _ in range(ban_list.BAD_MESSAGES - 1):
        peers.note(b"bad", WireError("nonsense"), now)
    assert not peers.is_ignored(b"bad", now)
    peers.note(b"bad", WireError("nonsense"), now)
    assert peers.is_ignored(b"bad", now)
    assert not peers.is_ignored(b"good", now)
    assert not peers.is_ignored(b"bad", now + ban_list.IGNORED_SECONDS)
    assert [r.message for r in caplog.records] == [
        "message of bad dropped: nonsense",
        "bad keeps sending invalid messages: ignored for 30 s",
    ]


def test_rare_mistakes_are_forgiven():
    peers = BanList()
    for number in range(10 * ban_list.BAD_MESSAGES):
        now = number * ban_list.WINDOW_SECONDS
        peers.note(b"clumsy", WireError("nonsense"), now)
        assert not peers.is_ignored(b"clumsy", now)


def test_names_made_up_by_the_thousand_cost_bounded_memory_and_lines(caplog: pytest.LogCaptureFixture):
    peers = BanList()
    for number in range(5 * ban_list.MAX_PEERS):
        peers.note(b"peer-%d\n\x1b" % number, WireError("nonsense"), 1.0)
    assert len(peers._peers) == ban_list.MAX_PEERS
    assert len(caplog.records) == ban_list.LINES_PER_WINDOW
    assert all(record.levelno == logging.WARNING and record.message.isprintable() for record in caplog.records)


MANY_PEERS = """
import logging, resource, sys, time
import zmq
from buffer.transport import messages
from buffer.transport.credentials import Credentials
from buffer.transport.router import Router

soft, hard = (int(limit) for limit in sys.argv[1:])
logging.basicConfig()
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
router = Router("tcp://127.0.0.1:*", Credentials.plain("run"))
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0], router.address, flush=True)
while True:
    router.socket.poll(100)
    for incoming in router.receive(256, time.monotonic())[0]:
        router.send(incoming.identity, messages.Done(), incoming.number)
"""


@pytest.mark.parametrize(("soft", "hard", "num_peers"), [(64, 64, 100), (64, 1_000, 300)])
def test_as_many_peers_are_served_as_the_hard_limit_of_open_files_allows(soft: int, hard: int, num_peers: int):
    """Beyond it the log names the limit and the way out, and does not say that a peer has no key."""
    command = [sys.executable, "-c", MANY_PEERS, str(soft), str(hard)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with (
        subprocess.Popen(command, cwd=Path(__file__).parents[3], text=True, **pipes) as server,
        zmq.Context() as context,
    ):
        assert server.stdout is not None and server.stderr is not None
        limit, address = server.stdout.readline().split()
        assert int(limit) == hard
        peers = []
        for number in range(num_peers):
            peers.append(context.socket(zmq.DEALER))
            peers[-1].setsockopt(zmq.LINGER, 0)
            peers[-1].setsockopt(zmq.IDENTITY, b"peer-%d" % number)
            peers[-1].connect(address)
            peers[-1].send_multipart(messages.encode(messages.StatusRequest(), 1, "run"))
        if hard > num_peers:
            assert all(peer.poll(60_000) for peer in peers)
            server.kill()
            assert server.stderr.read() == ""
        else:
            said = server.stderr.readline()
            assert "no further connection can be accepted (Too many open files)" in said
            assert "may have 64 open files" in said and "ulimit -Hn" in said
            server.kill()
        for peer in peers:
            peer.close()
