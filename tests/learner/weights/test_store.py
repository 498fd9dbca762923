import resource
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch
import zmq
from torch import Tensor

from buffer.transport.connection import Connection, RequestRefused
from buffer.transport.credentials import Credentials
from buffer.transport.messages import (
    Chunk,
    ChunkRequest,
    Close,
    Manifest,
    ManifestRequest,
    Message,
    NoNewVersion,
    decode,
    encode,
)
from buffer.weights.config import WeightsConfig
from buffer.weights.layout import checksum
from buffer.weights.shared_memory import hold, max_segments
from learner.weights.store import ALIGNMENT_BYTES, HostMemory, WeightStore

Stores = Callable[..., WeightStore]


@pytest.fixture
def address(socket_folder: Path) -> str:
    return f"ipc://{socket_folder}/weights"


@pytest.fixture
def open_store(tmp_path: Path, address: str) -> Iterator[Stores]:
    stores: list[WeightStore] = []

    def start(**settings: int) -> WeightStore:
        config = WeightsConfig(address, **settings)
        stores.append(WeightStore(tmp_path / "weights", config, Credentials.plain("test")))
        return stores[-1]

    yield start
    for store in stores:
        store.close()


@pytest.fixture
def actor(address: str) -> Iterator[Connection]:
    with Connection(address, "actor-0", Credentials.plain("test"), timeout_seconds=20) as connection:
        yield connection


def weights(seed: int = 0) -> list[tuple[str, Tensor]]:
    """Three dtypes, odd sizes so that alignment matters, a scalar, and a view that is not contiguous."""
    generator = torch.Generator().manual_seed(seed)
    return [
        ("embed", torch.randn(7, 3, generator=generator)),
        ("head", torch.randn(5, 5, generator=generator).bfloat16()),
        ("turned", torch.randn(4, 6, generator=generator).T),
        ("scale", torch.tensor(float(seed))),
    ]


def manifest_of(actor: Connection, known: str = "", wait_seconds: float = 10.0) -> Manifest:
    reply = actor.call(ManifestRequest(known, wait_seconds))
    assert isinstance(reply, Manifest)
    return reply


def pull(actor: Connection, manifest: Manifest, chunk_bytes: int = 50) -> bytes:
    offsets = range(0, manifest.num_bytes, chunk_bytes)
    sizes = [min(chunk_bytes, manifest.num_bytes - offset) for offset in offsets]
    requests = [ChunkRequest(manifest.publication, "", *pair) for pair in zip(offsets, sizes, strict=True)]
    replies = [future.result() for future in [actor.request(request) for request in requests]]
    chunks = [reply for reply in replies if isinstance(reply, Chunk)]
    assert [chunk.offset for chunk in chunks] == list(offsets)
    return b"".join(chunk.data for chunk in chunks)


def read(manifest: Manifest, data: bytes | np.ndarray) -> dict[str, Tensor]:
    return {
        entry.name: torch.frombuffer(bytearray(data[entry.offset : entry.offset + entry.num_bytes]), dtype=torch.uint8)
        .view(getattr(torch, entry.dtype))
        .view(entry.shape)
        for entry in manifest.tensors
    }


def test_pulled_chunks_and_the_mapped_file_are_the_published_tensors(open_store: Stores, actor: Connection):
    store, tensors = open_store(), weights()
    written = store.publish(3, tensors).result(10)
    manifest = manifest_of(actor)
    assert manifest == written and manifest.policy_version == 3
    mapped = np.memmap(manifest.path, dtype=np.uint8, mode="r")
    assert len(mapped) == manifest.num_bytes
    pulled = pull(actor, manifest)
    assert pulled == mapped.tobytes()
    for loaded in (read(manifest, pulled), read(manifest, mapped)):
        assert list(loaded) == [name for name, _ in tensors]
        assert all(torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype for name, tensor in tensors)


def test_every_tensor_has_a_checksum_and_lies_aligned(open_store: Stores, actor: Connection):
    open_store().publish(0, weights())
    manifest = manifest_of(actor)
    data = pull(actor, manifest)
    for entry in manifest.tensors:
        span = data[entry.offset : entry.offset + entry.num_bytes]
        assert entry.offset % ALIGNMENT_BYTES == 0
        assert checksum(span) == entry.checksum
        assert checksum(bytes([span[0] ^ 1]) + span[1:]) != entry.checksum


def test_a_parked_request_wakes_when_a_version_is_published(
    open_store: Stores, actor: Connection, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("buffer.weights.server.TICK_SECONDS", 3.0)
    store = open_store()
    waiting: Future[Message] = actor.request(ManifestRequest("", 30.0))
    with pytest.raises(TimeoutError):
        waiting.result(0.5)
    started = time.monotonic()
    store.publish(1, weights())
    manifest = waiting.result(10)
    assert isinstance(manifest, Manifest) and manifest.policy_version == 1
    # The answer comes before the next tick (3 s) and before the request is repeated (2 s): the publication causes it.
    assert time.monotonic() - started < 1.0
    following = actor.request(ManifestRequest(manifest.publication, 30.0))
    with pytest.raises(TimeoutError):
        following.result(0.3)
    store.publish(2, weights())
    newer = following.result(10)
    assert isinstance(newer, Manifest) and newer.policy_version == 2


def test_a_request_is_answered_when_nothing_new_came_in_time(open_store: Stores, actor: Connection):
    open_store()
    assert actor.call(ManifestRequest("", 0.1)) == NoNewVersion()


def test_a_late_joiner_gets_the_newest_version(open_store: Stores, actor: Connection):
    store = open_store()
    for version in range(3):
        store.publish(version, weights(version)).result(10)
    store.publish(3, weights(3)).result(10)
    manifest = manifest_of(actor)
    assert manifest.policy_version == 3
    assert read(manifest, pull(actor, manifest))["scale"].item() == 3.0


def test_kept_versions_are_served_until_the_end_and_older_ones_refused(
    open_store: Stores, actor: Connection, tmp_path: Path
):
    store = open_store(keep_versions=2)
    manifests = [store.publish(version, weights(version)).result(10) for version in range(4)]
    assert sorted(path.name[:9] for path in (tmp_path / "weights").glob("*.weights")) == ["v00000002", "v00000003"]
    assert read(manifests[2], pull(actor, manifests[2]))["scale"].item() == 2.0
    with pytest.raises(RequestRefused, match="is not kept here; ask for the manifest again"):
        actor.call(ChunkRequest(manifests[1].publication, "", 0, 10))


@pytest.mark.parametrize(("offset", "num_bytes"), [(0, 0), (10, 10_000), (10_000, 1), (2**62, 2**62)])
def test_chunks_outside_the_file_are_refused(open_store: Stores, actor: Connection, offset: int, num_bytes: int):
    manifest = open_store().publish(0, weights()).result(10)
    with pytest.raises(RequestRefused, match="lie outside"):
        actor.call(ChunkRequest(manifest.publication, "", offset, num_bytes))


def test_other_messages_are_refused_by_name(open_store: Stores, actor: Connection):
    open_store()
    with pytest.raises(RequestRefused, match="does not answer Close"):
        actor.call(Close())


def test_bytes_that_are_no_message_are_dropped_and_service_goes_on(open_store: Stores, actor: Connection, address: str):
    open_store().publish(5, weights()).result(10)
    context = zmq.Context()
    stranger = context.socket(zmq.DEALER)
    stranger.connect(address)
    for frames in ([b"nonsense"], [b""], [b"\xc1", b"x" * 1000], [b"a", b"b", b"c"]):
        stranger.send_multipart(frames)
    assert stranger.poll(300) == 0
    assert manifest_of(actor).policy_version == 5
    context.destroy(linger=0)


def test_a_restarted_store_publishes_the_same_version_under_another_name(
    open_store: Stores, actor: Connection, tmp_path: Path
):
    first = open_store()
    before = first.publish(4, weights(1)).result(10)
    first.close()
    (tmp_path / "weights" / "slot-1.part").write_bytes(b"half")
    second = open_store()
    assert list((tmp_path / "weights").iterdir()) == []
    second.publish(4, weights(2)).result(10)
    after = manifest_of(actor, known=before.publication)
    assert after.policy_version == before.policy_version and after.publication != before.publication
    assert after.path != before.path and after.host_id == before.host_id


def test_an_unfinished_file_is_never_announced(open_store: Stores, actor: Connection, monkeypatch: pytest.MonkeyPatch):
    store = open_store()
    store.publish(0, weights()).result(10)
    begun, finish = threading.Event(), threading.Event()

    def slow_rename(self: Path, target: Path) -> Path:
        begun.set()
        assert finish.wait(10)
        return Path(self.replace(target))

    monkeypatch.setattr(Path, "rename", slow_rename)
    publication = store.publish(1, weights())
    assert begun.wait(10)
    assert manifest_of(actor).policy_version == 0
    finish.set()
    publication.result(10)
    assert manifest_of(actor).policy_version == 1


def test_an_address_in_use_is_one_sentence(open_store: Stores, tmp_path: Path):
    context = zmq.Context()
    blocker = context.socket(zmq.ROUTER)
    port = blocker.bind_to_random_port("tcp://127.0.0.1")
    with pytest.raises(ValueError, match=f"tcp://127.0.0.1:{port} is in use"):
        WeightStore(tmp_path / "other", WeightsConfig(f"tcp://127.0.0.1:{port}"), Credentials.plain("test"))
    context.destroy(linger=0)


def test_where_there_is_no_room_nothing_is_left_behind_and_the_next_attempt_may_work(
    open_store: Stores, actor: Connection, tmp_path: Path
):
    store = open_store()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(OSError, match=r"policy 1 cannot be published to .*/weights: File too large; make room"):
            store.publish(1, weights())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list((tmp_path / "weights").iterdir()) == []
    store.publish(1, weights()).result(10)
    assert manifest_of(actor).policy_version == 1


def test_the_memory_of_a_retired_version_is_written_again_unless_somebody_reads_it(open_store: Stores):
    store = open_store(keep_versions=1)
    manifests = [store.publish(version, weights(version)).result(10) for version in range(2)]
    inodes = [Path(manifests[1].path).stat().st_ino]
    with hold(Path(manifests[1].path)) as reading:
        for version in (2, 3, 4):
            manifests.append(store.publish(version, weights(version)).result(10))
            inodes.append(Path(manifests[-1].path).stat().st_ino)
        reading.seek(manifests[1].tensors[-1].offset)
        assert np.frombuffer(reading.read(4), np.float32) == 1.0
    # Version 1 is being read, so two other segments take turns.
    assert inodes[0] not in inodes[1:] and inodes[1] == inodes[3]
    for version in (5, 6):
        manifests.append(store.publish(version, weights(version)).result(10))
    assert Path(manifests[-1].path).stat().st_ino in inodes[:2]
    with pytest.raises(FileNotFoundError):
        hold(Path(manifests[0].path))


def test_a_stalled_reader_gets_what_it_asked_for_although_later_versions_are_published(
    open_store: Stores, actor: Connection, address: str
):
    """ZeroMQ sends chunks from the segment itself, so the segment must not be reused while a reader stalls."""
    store, size = open_store(keep_versions=1), 1 << 22
    manifests = [store.publish(0, [("w", torch.zeros(4 * size, dtype=torch.uint8))]).result(10)]
    inodes = [Path(manifests[0].path).stat().st_ino]
    context = zmq.Context()
    stalled = context.socket(zmq.DEALER)
    stalled.setsockopt(zmq.RCVHWM, 1)
    stalled.setsockopt(zmq.IDENTITY, b"stalled")
    stalled.connect(address)
    for number in range(4):
        # A client repeats a request that gets no answer for a while.
        for _ in range(3):
            request = ChunkRequest(manifests[0].publication, "", number * size, size)
            stalled.send_multipart(encode(request, number, "test"))
    assert stalled.poll(10_000)
    time.sleep(0.3)
    for version in range(1, 5):
        tensor = torch.full((4 * size,), version, dtype=torch.uint8)
        manifests.append(store.publish(version, [("w", tensor)]).result(10))
        inodes.append(Path(manifests[-1].path).stat().st_ino)
        assert pull(actor, manifests[-1], size) == tensor.numpy().tobytes()
    # Version 0 keeps its segment, the other versions take turns.
    assert inodes[0] not in inodes[1:] and len(set(inodes)) == 3
    replies = []
    while stalled.poll(500):
        replies.append(decode(stalled.recv_multipart(), "test")[0])
    context.destroy(linger=0)
    assert all(isinstance(reply, Chunk) and bytes(reply.data) == bytes(size) for reply in replies)
    # A chunk that was sent before the repetition arrived is sent again; a chunk that still waits is not.
    assert 4 <= len(replies) <= 8
    for version in range(5, 9):
        manifests.append(store.publish(version, [("w", torch.zeros(4 * size, dtype=torch.uint8))]).result(10))
        inodes.append(Path(manifests[-1].path).stat().st_ino)
    assert inodes[0] in inodes[1:]


def test_a_store_never_has_more_segments_than_the_launcher_checked_room_for(open_store: Stores, tmp_path: Path):
    store, num_segments, readers = open_store(keep_versions=2), [], []
    for version in range(8):
        readers.append(hold(Path(store.publish(version, weights(version)).result(10).path)))
        num_segments.append(len([*(tmp_path / "weights").glob("*.weights"), *(tmp_path / "weights").glob("*.part")]))
    assert max(num_segments) == num_segments[-1] == max_segments(2)
    for reader in readers:
        reader.close()


def test_other_tensors_than_before_are_refused(open_store: Stores):
    store = open_store()
    store.publish(0, weights()).result(10)
    with pytest.raises(ValueError, match=r"tensor embed of shape \(3,\) is not what was published before"):
        store.publish(1, [("embed", torch.zeros(3))])
    with pytest.raises(ValueError, match="tensor head was published before and is missing now"):
        store.publish(1, weights()[:1])


def test_versions_lie_in_shared_memory_where_there_is_a_folder_for_them(tmp_path: Path, address: str):
    directory, memory = tmp_path / "weights", tmp_path / "memory" / "weights"
    directory.mkdir()
    for _ in range(2):
        files = HostMemory(directory, memory)
        store = WeightStore(directory, WeightsConfig(address), Credentials.plain("test"), files)
        manifest = store.publish(0, weights(), torch.bfloat16).result(10)
        assert Path(manifest.path).parent == memory and directory.resolve() == memory
        assert {entry.dtype for entry in manifest.tensors} == {"bfloat16"}
        store.close()
        assert list(memory.iterdir()) == []


def test_versions_whose_files_are_removed_by_somebody_else_cost_no_publication(
    open_store: Stores, caplog: pytest.LogCaptureFixture
):
    store = open_store(keep_versions=2)
    for version in range(12):
        manifest = store.publish(version, weights(version)).result(20)
        if version in (4, 7):
            Path(manifest.path).unlink()
        if version == 9:
            # The memory for the next version.
            [spare] = Path(manifest.path).parent.glob("*.part")
            spare.unlink()
    assert Path(manifest.path).is_file()
    assert caplog.text.count("was removed by somebody else") == 3
