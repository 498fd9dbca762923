"""A thread that dies ends its process: no thread is missed in silence by those that wait for its work."""

import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from buffer.process import start_thread
from buffer.transport.connection import Connection
from buffer.transport.credentials import Credentials
from buffer.transport.messages import (
    DeltaReply,
    DeltaRequest,
    Manifest,
    ManifestRequest,
    NoNewVersion,
    StatusRequest,
    TensorEntry,
)
from buffer.weights.layout import checksum
from buffer.weights.server import WeightServer
from buffer.weights.shared_memory import SegmentPool

ROOT = Path(__file__).parents[2]
RUN = Credentials.plain("run")


def wait_for(condition: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.01)


def fail(*_: object, **__: object) -> Any:
    raise RuntimeError("a bug")


def test_the_process_of_a_dead_thread_ends_with_its_name_and_traceback_in_the_log():
    program = """
import logging, time
from buffer.process import start_thread
logging.basicConfig()
def dig():
    raise SystemExit("a quiet end")
start_thread("digger", dig)
time.sleep(60)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=50, check=False
    )
    assert done.returncode == 1
    assert "the thread digger failed, so this process ends" in done.stderr
    assert "in dig" in done.stderr and done.stderr.endswith("SystemExit: a quiet end\n")


def test_a_thread_that_returns_ends_nothing(ended: list[int]):
    start_thread("quick", lambda: None).join()
    assert ended == []


@pytest.mark.parametrize("method", ["_send_due", "_poll", "_receive", "_expire"])
def test_the_thread_of_a_connection(monkeypatch: pytest.MonkeyPatch, ended: list[int], method: str):
    with Connection("tcp://127.0.0.1:9", "actor-1", RUN, resend_seconds=0.01) as connection:
        monkeypatch.setattr(connection, method, fail)
        answer = connection.request(StatusRequest())
        wait_for(lambda: ended)
        with pytest.raises(ConnectionError):
            answer.result(10)
    assert ended == [1]
    ended.clear()


def test_the_thread_of_the_authenticator():
    # In a process of its own: ZeroMQ blocks for ever when a socket is closed whose monitor has no reader any more.
    program = """
import time
from buffer.transport.authenticator import Authenticator
from buffer.transport.connection import Connection
from buffer.transport.credentials import Credentials
from buffer.transport.router import Router
def fail(*_):
    raise RuntimeError("a bug")
Authenticator._watch = fail
router = Router("tcp://127.0.0.1:*", Credentials.plain("run"))
connection = Connection(router.address, "actor-1", Credentials.plain("run"))
time.sleep(60)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=50, check=False
    )
    assert done.returncode == 1
    assert "the thread authenticator failed" in done.stderr


@pytest.fixture
def store(tmp_path: Path) -> Iterator[WeightServer]:
    """A server of two versions."""
    server, pool = WeightServer("tcp://127.0.0.1:*", RUN, keep_versions=3), SegmentPool(tmp_path)
    for version in (1, 2):
        segment = pool.take(1000)
        segment.array[:] = version
        path = str(segment.publish(f"v{version}.weights"))
        entry = TensorEntry("w", "float32", (250,), 0, 1000, checksum(segment.array))
        server.announce(Manifest(version, f"s:{version}", path, "host", 1000, (entry,)), segment)
    yield server
    for segment in server.close():
        segment.remove()


@pytest.mark.parametrize(
    "method", ["_receive", "_answer_parked", "_answer_deltas", "_answer_chunks", "_patience_milliseconds"]
)
def test_the_thread_of_the_weight_server(
    store: WeightServer, monkeypatch: pytest.MonkeyPatch, ended: list[int], method: str
):
    monkeypatch.setattr(store, method, fail)
    with Connection(store.address, "actor-1", RUN) as actor:
        actor.request(ManifestRequest("", 1.0))
        wait_for(lambda: ended)
    assert ended == [1]
    ended.clear()


def test_an_error_in_the_thread_that_makes_deltas_reaches_the_weight_server(
    store: WeightServer, monkeypatch: pytest.MonkeyPatch, ended: list[int]
):
    monkeypatch.setattr("buffer.weights.versions.encode", fail)
    with Connection(store.address, "actor-1", RUN) as actor:
        actor.request(DeltaRequest("s:2", "s:1"))
        wait_for(lambda: ended)
    assert ended == [1]
    ended.clear()


def test_a_version_that_cannot_be_opened_has_no_delta_and_everybody_is_answered(
    store: WeightServer, monkeypatch: pytest.MonkeyPatch
):
    def no_descriptors(path: Path) -> BinaryIO:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr("buffer.weights.versions.hold", no_descriptors)
    with Connection(store.address, "actor-1", RUN) as actor:
        assert actor.call(DeltaRequest("s:2", "s:1"), 20) == DeltaReply(0, checksum(b""))
        assert actor.call(ManifestRequest("s:2", 0.1), 20) == NoNewVersion()
