"""Relays between the learner's real store and actors on several hosts."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import torch

from actors.relay import Relay, make_folder, own_address
from actors.weights.client import WeightClient
from actors.weights.local import LocalWeights
from buffer.transport.connection import Connection
from buffer.transport.credentials import Credentials
from buffer.transport.messages import Manifest, Refused
from buffer.weights.config import MEMORY_VARIABLE, WeightsConfig
from buffer.weights.server import WeightServer
from learner.weights.store import WeightStore

CREDENTIALS = Credentials.plain("test")
SECONDS = 20.0


class Cluster:
    """A learner's store, and named hosts with a relay or an actor each."""

    def __init__(self, run_dir: Path, sockets: Path, stack: AsyncExitStack, fanout: int) -> None:
        self.run_dir, self._sockets, self._stack = run_dir, sockets, stack
        config = WeightsConfig(f"ipc://{sockets}/store", relay_fanout=fanout)
        self.store = WeightStore(run_dir / "weights", config, CREDENTIALS)
        self._stack.callback(self.store.close)
        self._config = config

    def client(self, host: str, *, maps: bool) -> WeightClient:
        connection = self._stack.enter_context(Connection(self._config.address, f"on-{host}", CREDENTIALS))
        client = WeightClient(
            connection,
            host_id=host if maps else "",
            published=self.run_dir / "weights",
            chunk_bytes=4_000,
            relays=self.run_dir / "relays",
            connect=lambda address: Connection(address, f"on-{host}", CREDENTIALS),
        )
        self._stack.callback(client.close)
        return client

    async def relay(self, host: str) -> tuple[Relay, WeightClient, asyncio.Task[None]]:
        """A relay on `host` that the store knows."""
        client = self.client(host, maps=False)
        server = WeightServer(f"ipc://{self._sockets}/{host}", CREDENTIALS, keep_versions=2)
        store = self._stack.enter_context(Connection(self._config.address, f"relay-{host}", CREDENTIALS))
        relay = Relay(make_folder(self.run_dir, host), store, server, client, host)
        task = asyncio.create_task(relay.run())
        self._stack.callback(relay.close)
        self._stack.callback(task.cancel)
        await until(lambda: self.store._server._relays.at(host, 0.0))
        return relay, client, task

    async def publish(self, version: int) -> Manifest:
        tensors = [("weight", torch.full((5_000,), float(version)))]
        return await asyncio.wrap_future(self.store.publish(version, tensors))

    async def take(self, client: WeightClient) -> LocalWeights:
        manifest = await client.wait_for_new("", SECONDS)
        assert manifest is not None
        return await client.fetch(manifest)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.fixture
def start(tmp_path: Path, socket_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], object]:
    monkeypatch.delenv(MEMORY_VARIABLE, raising=False)

    @asynccontextmanager
    async def cluster(fanout: int = 0) -> AsyncIterator[Cluster]:
        async with AsyncExitStack() as stack:
            yield Cluster(tmp_path, socket_folder, stack, fanout)

    return cluster


def holds(local: LocalWeights, version: int) -> bool:
    return bool((torch.frombuffer(bytearray(local.path.read_bytes()), dtype=torch.float32) == version).all())


def test_a_version_comes_to_a_host_once_however_many_actors_there_are(start):
    async def check() -> None:
        async with start() as cluster:
            relay, pulling, _ = await cluster.relay("far")
            for version in (1, 2):
                manifest = await cluster.publish(version)
                actors = [cluster.client("far", maps=True) for _ in range(2)]
                taken = [await cluster.take(actor) for actor in actors]
                assert all(holds(local, version) for local in taken)
                # Both actors map the relay's file.
                assert {local.path.parent for local in taken} == {(cluster.run_dir / "relays" / "far")}
                assert [actor.pulled_bytes for actor in actors] == [0, 0]
                assert relay.policy_version == version
                if version == 1:
                    assert pulling.pulled_bytes == manifest.num_bytes
                for local in taken:
                    local.release()
            # The manifest for an actor on another host does not name the relay.
            other = cluster.client("near", maps=True)
            assert holds(await cluster.take(other), 2) and other.pulled_bytes == manifest.num_bytes

    asyncio.run(check())


def test_with_a_fanout_of_one_relays_form_a_chain(start):
    async def check() -> None:
        async with start(1) as cluster:
            await cluster.relay("first")
            second, pulling, _ = await cluster.relay("second")
            asked = []
            answer = cluster.store._server._kept.chunk
            cluster.store._server._kept.chunk = lambda request, asker: (
                asked.append(request.offset) or answer(request, asker)
            )
            await cluster.publish(1)
            await until(lambda: second.policy_version == 1)
            assert pulling.pulled_bytes == 20_000
            # The learner sent every chunk once.
            assert sorted(asked) == list(range(0, 20_000, 4_000))

    asyncio.run(check())


def test_where_the_relay_has_died_the_learner_is_asked(start, monkeypatch: pytest.MonkeyPatch):
    async def check() -> None:
        async with start() as cluster:
            relay, _, task = await cluster.relay("far")
            await cluster.publish(1)
            await until(lambda: relay.policy_version == 1)
            actor = cluster.client("far", maps=True)
            task.cancel()
            relay.close()
            monkeypatch.setattr("actors.weights.client.RELAY_SECONDS", 0.2)
            assert holds(await cluster.take(actor), 1) and actor.pulled_bytes == 20_000

    asyncio.run(check())


def test_a_relay_that_failed_is_not_asked_again_for_some_minutes(start, monkeypatch: pytest.MonkeyPatch):
    async def check() -> None:
        async with start() as cluster:
            await cluster.relay("far")
            actor = cluster.client("far", maps=True)
            actor._relays = None
            asked: list[str] = []

            def no_answer(address: str) -> Connection:
                asked.append(address)
                return Connection(f"{address}-unreachable", "lonely", CREDENTIALS)

            actor._connect = no_answer
            monkeypatch.setattr("actors.weights.client.RELAY_SECONDS", 0.1)
            for version in (1, 2, 3):
                await cluster.publish(version)
                assert holds(await cluster.take(actor), version)
            assert len(asked) == 1
            actor.close()
            monkeypatch.setattr("actors.weights.client.RELAY_RETRY_SECONDS", 0.0)
            await cluster.publish(4)
            assert holds(await cluster.take(actor), 4)
            assert len(asked) == 2

    asyncio.run(check())


def test_a_relay_that_breaks_off_is_replaced_by_the_learner_at_that_chunk(start):
    async def check() -> None:
        async with start() as cluster:
            relay, _, _ = await cluster.relay("far")
            await cluster.publish(1)
            await until(lambda: relay.policy_version == 1)
            # Actors may not map this relay's folder, so they pull; the relay refuses half of the chunks.
            actor = cluster.client("far", maps=True)
            actor._relays = None
            answer = relay._server._kept.chunk
            relay._server._kept.chunk = lambda request, asker: (
                answer(request, asker) if request.offset < 8_000 else Refused("no more")
            )
            asked = []
            learners = cluster.store._server._kept.chunk
            cluster.store._server._kept.chunk = lambda request, asker: (
                asked.append(request.offset) or learners(request, asker)
            )
            assert holds(await cluster.take(actor), 1)
            assert sorted(asked) == [8_000, 12_000, 16_000]

    asyncio.run(check())


def test_a_relay_listens_where_those_reach_it_that_pull_from_it():
    assert own_address("tcp://192.0.2.1:5", 0) == "tcp://127.0.0.1:*"
    # The address from which this host reaches the store; for a store on this host, the store's address.
    assert own_address("tcp://127.0.0.1:5", 2) == "tcp://127.0.0.1:*"
    assert own_address("tcp://127.0.0.3:5", 2) in ("tcp://127.0.0.1:*", "tcp://127.0.0.3:*")
