import errno
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch
import zmq
from torch import Tensor

from buffer.client import Connection, RequestRefused
from buffer.credentials import Credentials
from buffer.wire import Chunk, ChunkRequest, Close, Manifest, ManifestRequest, Message, NoNewVersion
from learner.publisher import ALIGNMENT_BYTES, WeightStore

Stores = Callable[..., WeightStore]


@pytest.fixture
def address(socket_folder: Path) -> str:
    return f"ipc://{socket_folder}/weights"


@pytest.fixture
def open_store(tmp_path: Path, address: str) -> Iterator[Stores]:
    stores: list[WeightStore] = []

    def start(**settings: int) -> WeightStore:
        stores.append(WeightStore(tmp_path / "weights", address, Credentials.plain("test"), **settings))
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
    requests = [ChunkRequest(manifest.policy_version, *pair) for pair in zip(offsets, sizes, strict=True)]
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
        assert zlib.crc32(span) == entry.checksum
        assert zlib.crc32(bytes([span[0] ^ 1]) + span[1:]) != entry.checksum


def test_a_parked_request_wakes_when_a_version_is_published(
    open_store: Stores, actor: Connection, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("learner.publisher.TICK_SECONDS", 3.0)
    store = open_store()
    waiting: Future[Message] = actor.request(ManifestRequest("", 30.0))
    with pytest.raises(TimeoutError):
        waiting.result(0.5)
    started = time.monotonic()
    store.publish(1, weights())
    manifest = waiting.result(10)
    assert isinstance(manifest, Manifest) and manifest.policy_version == 1
    # Sooner than the next tick (3 s) and than the request is repeated (2 s): the publication itself wakes it.
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
        store.publish(version, weights(version))
    store.publish(3, weights(3)).result(10)
    manifest = manifest_of(actor)
    assert manifest.policy_version == 3
    assert read(manifest, pull(actor, manifest))["scale"].item() == 3.0


def test_kept_versions_are_served_until_the_end_and_older_ones_refused(
    open_store: Stores, actor: Connection, tmp_path: Path
):
    store = open_store(keep_versions=2)
    manifests = [store.publish(version, weights(version)).result(10) for version in range(4)]
    assert sorted(path.name[:9] for path in (tmp_path / "weights").iterdir()) == ["v00000002", "v00000003"]
    assert read(manifests[2], pull(actor, manifests[2]))["scale"].item() == 2.0
    with pytest.raises(RequestRefused, match="version 1 is not kept here; ask for the manifest again"):
        actor.call(ChunkRequest(1, 0, 10))


@pytest.mark.parametrize(("offset", "num_bytes"), [(0, 0), (10, 10_000), (10_000, 1), (2**62, 2**62)])
def test_chunks_outside_the_file_are_refused(open_store: Stores, actor: Connection, offset: int, num_bytes: int):
    open_store().publish(0, weights()).result(10)
    with pytest.raises(RequestRefused, match="lie outside"):
        actor.call(ChunkRequest(0, offset, num_bytes))


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
    (tmp_path / "weights" / "v00000005-dead.weights.tmp").write_bytes(b"half")
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
        WeightStore(tmp_path / "other", f"tcp://127.0.0.1:{port}", Credentials.plain("test"))
    context.destroy(linger=0)


def test_a_full_disk_leaves_no_half_version_and_the_older_ones_are_served(
    open_store: Stores, actor: Connection, tmp_path: Path
):
    """The second tensor cannot be written any more."""
    store = open_store()
    store.publish(1, weights()).result(10)

    class Unwritable(Tensor):
        def contiguous(self) -> Tensor:  # type: ignore[override]
            raise OSError(errno.ENOSPC, "No space left on device")

    half = [weights()[0], ("late", torch.zeros(4).as_subclass(Unwritable))]
    with pytest.raises(
        OSError, match=r"policy 2 cannot be published to .*/weights: No space left on device; make room"
    ):
        store.publish(2, half).result(10)
    assert [path.name[:9] for path in (tmp_path / "weights").iterdir()] == ["v00000001"]
    assert manifest_of(actor).policy_version == 1
