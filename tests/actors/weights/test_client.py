"""Weights between the learner's real store and the actor's client: mapped, pulled, and pulled as a difference."""

import asyncio
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from actors.weights.client import WeightClient
from actors.weights.local import LocalWeights, TensorCheck
from buffer.transport.connection import Connection, RequestRefused, host_id
from buffer.transport.credentials import Credentials
from buffer.transport.messages import Chunk, ChunkRequest, DeltaRequest, Manifest, Message, TensorEntry
from buffer.weights.config import WeightsConfig
from buffer.weights.layout import checksum
from learner.weights.store import WeightStore

SECONDS = 20.0
ELSEWHERE = "another host"


def tensors(version: int = 0) -> dict[str, Tensor]:
    """Tensors of both dtypes that need gaps in the file and several chunks; versions differ in few numbers."""
    generator = torch.Generator().manual_seed(0)
    named = {
        "embed": torch.randn(37, 11, generator=generator),
        "norm": torch.randn(5, generator=generator).to(torch.bfloat16),
        "layers.0.weight": torch.randn(64, 333, generator=generator).to(torch.bfloat16),
        "scale": torch.full((1,), float(version)),
    }
    named["layers.0.weight"].view(-1)[version::97] *= 1 + 2**-6
    return named


class Wire:
    """A connection to the store that counts requests and can damage chunks."""

    def __init__(self, address: str) -> None:
        self.connection = Connection(address, "actor-0", Credentials.plain("test"), timeout_seconds=SECONDS)
        self.asked: list[Message] = []
        self.spoil: Callable[[Chunk], Chunk] = lambda chunk: chunk

    def request(self, message: Message, timeout_seconds: float | None = None) -> Future[Message]:
        self.asked.append(message)
        if not isinstance(message, ChunkRequest):
            return self.connection.request(message, timeout_seconds)
        answer: Future[Message] = Future()
        try:
            reply = self.connection.call(message)
            answer.set_result(self.spoil(reply) if isinstance(reply, Chunk) else reply)
        except (RequestRefused, TimeoutError) as error:
            answer.set_exception(error)
        return answer

    def chunks(self) -> list[tuple[str, int]]:
        """(base, offset) of the chunks requested since the last call."""
        asked, self.asked = self.asked, []
        return [(message.base, message.offset) for message in asked if isinstance(message, ChunkRequest)]


@pytest.fixture
def address(socket_folder: Path) -> str:
    return f"ipc://{socket_folder}/weights"


@pytest.fixture
def store(tmp_path: Path, address: str) -> Iterator[WeightStore]:
    started = WeightStore(tmp_path / "published", WeightsConfig(address), Credentials.plain("test"))
    yield started
    started.close()


@pytest.fixture
def wire(address: str) -> Iterator[Wire]:
    opened = Wire(address)
    yield opened
    opened.connection.close()


Clients = Callable[..., WeightClient]


@pytest.fixture
def client(store: WeightStore, wire: Wire, tmp_path: Path) -> Clients:
    connected: list[WeightClient] = []
    """Keeps the clients alive, because a client owns the weights that it has pulled."""

    def connect(on_host: str = ELSEWHERE, chunk_bytes: int = 10_000, deltas: bool = True) -> WeightClient:
        settings: dict[str, Any] = {"published": tmp_path / "published", "chunk_bytes": chunk_bytes, "deltas": deltas}
        connected.append(WeightClient(wire, host_id=on_host, **settings))  # type: ignore[arg-type]
        return connected[-1]

    return connect


def publish(store: WeightStore, version: int) -> Manifest:
    return store.publish(version, tensors(version).items()).result(SECONDS)


def fetch(client: WeightClient, manifest: Manifest) -> LocalWeights:
    return asyncio.run(client.fetch(manifest))


def assert_holds(local: LocalWeights, version: int) -> None:
    data, expected = np.fromfile(local.path, np.uint8), tensors(version)
    assert [entry.name for entry in local.manifest.tensors] == list(expected)
    for entry in local.manifest.tensors:
        found = torch.from_numpy(data[entry.offset : entry.offset + entry.num_bytes])
        assert torch.equal(found.view(getattr(torch, entry.dtype)).view(entry.shape), expected[entry.name]), entry.name


def test_weights_on_the_same_host_are_mapped_where_the_learner_wrote_them(store: WeightStore, client: Clients):
    mapping = client(host_id())
    local = fetch(mapping, publish(store, 3))
    assert local.path == Path(local.manifest.path) and local.policy_version == 3
    assert mapping.pulled_bytes == 0
    # Later versions do not overwrite a held version.
    for version in range(4, 10):
        publish(store, version)
    assert_holds(local, 3)
    local.release()


def test_released_versions_leave_their_memory_to_later_ones(store: WeightStore, client: Clients):
    mapping, inodes = client(host_id()), []
    for version in range(12):
        local = fetch(mapping, publish(store, version))
        inodes.append(local.path.stat().st_ino)
        assert_holds(local, version)
        local.release()
    # Three versions are kept and one is being written.
    assert len(set(inodes)) == 4


@pytest.mark.parametrize("chunk_bytes", [7_919, 1 << 20, 500])
def test_weights_of_another_host_are_pulled_in_chunks(store: WeightStore, client: Clients, chunk_bytes: int):
    manifest = publish(store, 3)
    pulling = client(chunk_bytes=chunk_bytes)
    local = fetch(pulling, manifest)
    assert local.path != Path(manifest.path)
    assert local.path.read_bytes() == Path(manifest.path).read_bytes()
    assert pulling.pulled_bytes == manifest.num_bytes


@pytest.mark.parametrize("place", ["../outside.weights", "link.weights", "/absent/v3"])
def test_only_files_in_the_published_folder_are_mapped(store: WeightStore, client: Clients, tmp_path: Path, place: str):
    manifest = publish(store, 3)
    outside = Path(shutil.copy(manifest.path, tmp_path / "outside.weights"))
    (tmp_path / "published" / "link.weights").symlink_to(outside)
    pulling = client(host_id())
    local = fetch(pulling, replace(manifest, path=str(tmp_path / "published" / place)))
    assert pulling.pulled_bytes == manifest.num_bytes
    assert_holds(local, 3)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"dtype": "nn"}, "tensor embed of type nn and shape .* cannot have"),
        ({"dtype": "bfloat16"}, "tensor embed of type bfloat16 and shape .* cannot have"),
        ({"shape": (2**40, 2**20)}, "tensor embed of type float32 and shape .* cannot have"),
        ({"offset": 2**60}, "tensor embed ends at byte .* of a file of"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused_before_anything_is_read(
    store: WeightStore, client: Clients, wire: Wire, changes: dict[str, Any], complaint: str
):
    manifest = publish(store, 3)
    entries = tuple(replace(entry, **(changes if entry.name == "embed" else {})) for entry in manifest.tensors)
    with pytest.raises(RuntimeError, match=complaint):
        fetch(client(), replace(manifest, tensors=entries))
    assert wire.chunks() == []


@pytest.mark.parametrize("on_host", [host_id(), ELSEWHERE], ids=["same host", "another host"])
def test_a_bit_that_flips_in_the_learners_memory_is_noticed_and_its_tensor_named(
    store: WeightStore, client: Clients, on_host: str
):
    manifest = publish(store, 3)
    entry = next(entry for entry in manifest.tensors if entry.name == "layers.0.weight")
    with Path(manifest.path).open("r+b") as file:
        file.seek(entry.offset)
        [first] = file.read(1)
        file.seek(entry.offset)
        file.write(bytes([first ^ 1]))
    with pytest.raises(RuntimeError, match=r"policy 3: tensor layers\.0\.weight arrived with checksum") as caught:
        fetch(client(on_host), manifest)
    assert f"the learner published {entry.checksum}" in str(caught.value)


def test_a_file_that_was_cut_off_is_noticed(store: WeightStore, client: Clients):
    manifest = publish(store, 3)
    with Path(manifest.path).open("r+b") as file:
        file.truncate(manifest.num_bytes - 1)
    with pytest.raises(RuntimeError, match=f"has {manifest.num_bytes - 1} bytes, the learner published"):
        fetch(client(host_id()), manifest)


@pytest.mark.parametrize("on_host", [host_id(), ELSEWHERE], ids=["same host", "another host"])
def test_a_version_that_is_gone_is_refused(store: WeightStore, client: Clients, on_host: str):
    first = publish(store, 1)
    for version in range(2, 7):
        publish(store, version)
    with pytest.raises(RequestRefused, match=f"publication {first.publication} is not kept here"):
        fetch(client(on_host), first)


@pytest.mark.parametrize("large_frame_bytes", [1 << 18, 1_000], ids=["copied", "where ZeroMQ has them"])
def test_a_chunk_that_arrives_damaged_is_asked_for_again(
    store: WeightStore, client: Clients, wire: Wire, monkeypatch: pytest.MonkeyPatch, large_frame_bytes: int
):
    monkeypatch.setattr("buffer.transport.connection.LARGE_FRAME_BYTES", large_frame_bytes)
    manifest, spoiled = publish(store, 3), []

    def spoil_once(chunk: Chunk) -> Chunk:
        if chunk.offset != 10_000 or spoiled:
            return chunk
        spoiled.append(type(chunk.data))
        return replace(chunk, data=bytes(chunk.data[:-1]) + bytes([chunk.data[-1] ^ 4]))

    wire.spoil = spoil_once
    assert_holds(fetch(client(), manifest), 3)
    assert spoiled == [bytes if large_frame_bytes > 10_000 else memoryview]
    assert sorted(wire.chunks()) == sorted([("", 10_000), *(("", offset) for offset in range(0, 44_000, 10_000))])
    wire.spoil = lambda chunk: replace(chunk, offset=chunk.offset + 1)
    with pytest.raises(RuntimeError, match=r"bytes 0\+10000 of publication \S+ arrived damaged 3 times"):
        fetch(client(), manifest)


def test_a_pull_that_broke_off_goes_on_at_the_chunk_that_failed(store: WeightStore, client: Clients, wire: Wire):
    manifest, pulling = publish(store, 3), client(chunk_bytes=2_000)

    def lose(chunk: Chunk) -> Chunk:
        if chunk.offset == 30_000:
            raise TimeoutError("no answer to ChunkRequest within 60 s")
        return chunk

    wire.spoil = lose
    with pytest.raises(TimeoutError):
        fetch(pulling, manifest)
    assert len(wire.chunks()) > 15
    wire.spoil = lambda chunk: chunk
    assert_holds(fetch(pulling, manifest), 3)
    assert wire.chunks() == [("", offset) for offset in range(30_000, manifest.num_bytes, 2_000)]


def test_a_tensor_that_arrives_wrong_is_named_and_the_version_pulled_from_the_beginning_again(
    store: WeightStore, client: Clients, wire: Wire
):
    manifest, pulling = publish(store, 3), client(chunk_bytes=2_000)
    wrong = manifest.tensors[2]

    def forge(chunk: Chunk) -> Chunk:
        data = bytes([chunk.data[0] ^ 1]) + bytes(chunk.data[1:])
        return replace(chunk, data=data, checksum=checksum(data)) if chunk.offset == 20_000 else chunk

    wire.spoil = forge
    with pytest.raises(RuntimeError, match=f"policy 3: tensor {wrong.name} arrived with checksum"):
        fetch(pulling, manifest)
    wire.spoil = lambda chunk: chunk
    wire.chunks()
    assert_holds(fetch(pulling, manifest), 3)
    assert ("", 0) in wire.chunks()


@given(st.lists(st.integers(0, 300), max_size=8), st.integers(0, 299), st.integers(0, 2))
def test_checksums_taken_as_the_bytes_arrive_are_those_of_the_whole_tensors(arrivals: list[int], at: int, spoiled: int):
    """For any sizes of the arriving pieces, and for tensors that share bytes, leave gaps or are empty."""
    rng = np.random.default_rng(0)
    published = rng.integers(0, 256, 300, np.uint8)
    places = {"a": (0, 100), "tied": (40, 100), "empty": (150, 0), "c": (160, 140)}
    entries = tuple(
        TensorEntry(name, "float32", (size // 4,), offset, size, checksum(published[offset : offset + size]))
        for name, (offset, size) in places.items()
    )
    arrived = np.zeros(300, np.uint8)
    check = TensorCheck(Manifest(1, "s:1", "", "", 300, entries), arrived)
    published[at] ^= spoiled
    for end in sorted(arrivals):
        arrived[:end] = published[:end]
        check.advance(end)
    arrived[:] = published
    hit = [name for name, (offset, size) in places.items() if spoiled and offset <= at < offset + size]
    with pytest.raises(RuntimeError, match=f"policy 1: tensor {hit[0]} arrived") if hit else nullcontext():
        check.finish()


def test_of_a_later_version_only_the_difference_is_pulled(store: WeightStore, client: Clients):
    pulling = client()
    assert_holds(fetch(pulling, publish(store, 1)), 1)
    whole = pulling.pulled_bytes
    for version in (2, 4):
        publish(store, version - 1)
        manifest = publish(store, version)
        local = fetch(pulling, manifest)
        assert local.path.read_bytes() == Path(manifest.path).read_bytes()
    assert 0 < pulling.pulled_bytes - whole < 0.1 * whole


@pytest.mark.parametrize("why", ["base gone", "all changed", "not wanted", "other store"])
def test_the_whole_version_is_pulled_where_a_difference_is_no_gain(
    store: WeightStore, client: Clients, wire: Wire, why: str
):
    pulling = client(deltas=why != "not wanted")
    first = fetch(pulling, publish(store, 1)).manifest
    wire.chunks()
    if why == "base gone":
        for version in (2, 3):
            publish(store, version)
    if why == "other store":
        assert pulling._puller._copy is not None
        pulling._puller._copy.manifest = replace(first, publication="0123abcd:1")
    noise = {name: torch.randn(tensor.shape).to(tensor.dtype) for name, tensor in tensors().items()}
    manifest = store.publish(4, (noise if why == "all changed" else tensors(4)).items()).result(SECONDS)
    asked_from = len(wire.asked)
    local = fetch(pulling, manifest)
    assert local.path.read_bytes() == Path(manifest.path).read_bytes()
    assert any(isinstance(message, DeltaRequest) for message in wire.asked[asked_from:]) == (why != "not wanted")
    assert {base for base, _ in wire.chunks()} == {""}


def test_a_difference_that_does_not_fit_is_followed_by_the_whole_version(
    store: WeightStore, client: Clients, wire: Wire
):
    pulling = client()
    fetch(pulling, publish(store, 1))
    assert pulling._puller._copy is not None
    # The copy is damaged, so its contents are not the base that the learner knows.
    pulling._puller._copy.array[:100] ^= 1
    assert_holds(fetch(pulling, publish(store, 2)), 2)

    def forge(chunk: Chunk) -> Chunk:
        data = chunk.data[::-1] if wire.asked[-1].base else chunk.data  # type: ignore[union-attr]
        return replace(chunk, data=data, checksum=checksum(data))

    wire.spoil = forge
    assert_holds(fetch(pulling, publish(store, 3)), 3)
    assert "" in {base for base, _ in wire.chunks()}


def test_the_rate_of_chunks_is_limited(tmp_path: Path, address: str, store: WeightStore, client: Clients):
    publish(store, 1)
    store._server._throttle.bytes_per_second = 200_000.0
    started = asyncio.run(_seconds(client(chunk_bytes=5_000), publish(store, 2)))
    assert started > 0.15


async def _seconds(client: WeightClient, manifest: Manifest) -> float:
    started = asyncio.get_running_loop().time()
    await client.fetch(manifest)
    return asyncio.get_running_loop().time() - started


def test_waiting_ends_with_the_next_publication_or_in_time(
    store: WeightStore, client: Clients, monkeypatch: pytest.MonkeyPatch
):
    """The client repeats the request, because the store holds one for less time than an actor may wait."""
    monkeypatch.setattr("actors.weights.manifests.LONGEST_PARK_SECONDS", 0.1)

    async def check(waiting: WeightClient) -> None:
        assert await waiting.wait_for_new("", 0.3) is None
        first = asyncio.ensure_future(waiting.wait_for_new("", SECONDS))
        await asyncio.sleep(0.3)
        assert not first.done()
        published = await asyncio.to_thread(publish, store, 0)
        assert await first == published
        assert await waiting.wait_for_new(published.publication, 0.3) is None
        assert await waiting.wait_for_new("another-store", 0.3) == published

    asyncio.run(check(client()))
