"""The weight server's keys: actors are served, other roles are refused, and the buffer's key is not its own."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from buffer.transport.connection import Connection, RequestRefused
from buffer.transport.credentials import WEIGHTS, client_credentials, ensure_credentials, server_credentials
from buffer.transport.messages import ManifestRequest, NoNewVersion, RelayHello, RelayPlace
from buffer.weights.server import WeightServer


@pytest.fixture
def server(run_dir: Path) -> Iterator[WeightServer]:
    ensure_credentials(run_dir)
    started = WeightServer("tcp://127.0.0.1:*", server_credentials(run_dir, WEIGHTS), keep_versions=1)
    yield started
    started.close()


def test_an_actor_and_a_relay_are_answered(server: WeightServer, run_dir: Path):
    credentials = client_credentials(run_dir, "actor").for_weights()
    with Connection(server.address, "actor-0", credentials, timeout_seconds=20) as actor:
        assert actor.call(ManifestRequest("", 0.0)) == NoNewVersion()
        assert isinstance(actor.call(RelayHello("tcp://127.0.0.1:5", "host")), RelayPlace)


@pytest.mark.parametrize("role", ["learner", "observer"])
def test_other_roles_are_refused(server: WeightServer, run_dir: Path, role: str):
    credentials = client_credentials(run_dir, role).for_weights()
    with (
        Connection(server.address, role, credentials, timeout_seconds=20) as other,
        pytest.raises(RequestRefused, match=rf"the key {role}\.json does not allow ManifestRequest"),
    ):
        other.call(ManifestRequest("", 0.0))


def test_the_buffers_public_key_does_not_open_it(server: WeightServer, run_dir: Path):
    with (
        Connection(server.address, "actor-0", client_credentials(run_dir, "actor"), timeout_seconds=1) as actor,
        pytest.raises(TimeoutError, match="the last handshake failed"),
    ):
        actor.call(ManifestRequest("", 0.0))
