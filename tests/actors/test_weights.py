"""Weights between the learner's real store and the actor's client: the only tests here that import vLLM."""

import asyncio
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from actors.weights import FileTransferEngine, FileUpdateInfo, LocalWeights, WeightClient, export_folder
from buffer.client import Connection, RequestRefused, host_id
from buffer.credentials import Credentials
from buffer.wire import Manifest
from learner.publisher import WeightStore

SECONDS = 20.0


def tensors(version: int = 0) -> dict[str, Tensor]:
    """Of both dtypes, of sizes that leave gaps in the file, and more than a few chunks in all."""
    generator = torch.Generator().manual_seed(version)
    return {
        "embed": torch.randn(37, 11, generator=generator),
        "norm": torch.randn(5, generator=generator).to(torch.bfloat16),
        "layers.0.weight": torch.randn(64, 33, generator=generator).to(torch.bfloat16),
        "scale": torch.randn(1, generator=generator),
    }


@pytest.fixture
def address() -> Iterator[str]:
    # Shorter than tmp_path: an ipc socket's path may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="store-") as folder:
        yield f"ipc://{folder}/weights"


@pytest.fixture
def store(tmp_path: Path, address: str) -> Iterator[WeightStore]:
    started = WeightStore(tmp_path / "published", address, Credentials.plain("test"))
    yield started
    started.close()


@pytest.fixture
def client(store: WeightStore, address: str, tmp_path: Path) -> Iterator[Callable[..., WeightClient]]:
    connections: list[Connection] = []

    def connect(on_host: str = "", chunk_bytes: int = 1000) -> WeightClient:
        connections.append(Connection(address, "actor-0", Credentials.plain("test"), timeout_seconds=SECONDS))
        return WeightClient(
            connections[-1],
            host_id=on_host,
            published=tmp_path / "published",
            spool=tmp_path / "spool",
            chunk_bytes=chunk_bytes,
        )

    yield connect
    for connection in connections:
        connection.close()


def publish(store: WeightStore, version: int) -> Manifest:
    return store.publish(version, list(tensors(version).items())).result(SECONDS)


def fetch(client: WeightClient, manifest: Manifest) -> LocalWeights:
    return asyncio.run(client.fetch(manifest))


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_weights_on_the_same_host_are_mapped_where_the_learner_wrote_them(
    store: WeightStore, client: Callable[..., WeightClient], tmp_path: Path
):
    manifest = publish(store, 3)
    local = fetch(client(host_id()), manifest)
    assert local.path == Path(manifest.path)
    assert local.policy_version == 3
    assert not (tmp_path / "spool").exists()
    assert_same(local.tensors(), tensors(3))


@pytest.mark.parametrize("chunk_bytes", [7_919, 1 << 20, 500])
def test_weights_of_another_host_are_pulled_in_chunks(
    store: WeightStore, client: Callable[..., WeightClient], tmp_path: Path, chunk_bytes: int
):
    manifest = publish(store, 3)
    local = fetch(client("another host", chunk_bytes), manifest)
    assert local.path.parent == tmp_path / "spool"
    assert local.path.read_bytes() == Path(manifest.path).read_bytes()
    assert_same(local.tensors(), tensors(3))


def test_a_pulled_version_replaces_the_one_before(
    store: WeightStore, client: Callable[..., WeightClient], tmp_path: Path
):
    pulling = client()
    for version in (1, 2):
        assert_same(fetch(pulling, publish(store, version)).tensors(), tensors(version))
    assert [path.name for path in (tmp_path / "spool").iterdir()] == ["v00000002.weights"]


def test_a_folder_that_is_not_visible_here_is_no_obstacle(store: WeightStore, client: Callable[..., WeightClient]):
    manifest = publish(store, 3)
    hidden = Manifest(3, manifest.publication, "/absent/v3", host_id(), manifest.num_bytes, manifest.tensors)
    assert_same(fetch(client(host_id()), hidden).tensors(), tensors(3))


@pytest.mark.parametrize("place", ["../outside.weights", "link.weights"])
def test_a_file_outside_the_published_folder_is_never_mapped(
    store: WeightStore, client: Callable[..., WeightClient], tmp_path: Path, place: str
):
    manifest = publish(store, 3)
    outside = Path(shutil.copy(manifest.path, tmp_path / "outside.weights"))
    (tmp_path / "published" / "link.weights").symlink_to(outside)
    elsewhere = replace(manifest, path=str(tmp_path / "published" / place))
    local = fetch(client(host_id()), elsewhere)
    assert local.path.parent == tmp_path / "spool"
    assert_same(local.tensors(), tensors(3))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"dtype": "nn"}, "tensor embed of type nn and shape .* cannot have"),
        ({"dtype": "float64"}, "tensor embed of type float64 and shape .* cannot have"),
        ({"shape": (2**40, 2**20)}, "tensor embed of type float32 and shape .* cannot have"),
        ({"offset": 2**60}, "tensor embed ends at byte .* of a file of"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused_before_anything_is_read(
    store: WeightStore, client: Callable[..., WeightClient], changes: dict[str, Any], complaint: str
):
    manifest = publish(store, 3)
    entries = tuple(replace(entry, **(changes if entry.name == "embed" else {})) for entry in manifest.tensors)
    with pytest.raises(RuntimeError, match=complaint):
        fetch(client(host_id()), replace(manifest, tensors=entries))


@pytest.mark.parametrize("on_host", [host_id(), "another host"], ids=["same host", "another host"])
def test_a_flipped_bit_is_noticed_and_its_tensor_named(
    store: WeightStore, client: Callable[..., WeightClient], on_host: str
):
    manifest = publish(store, 3)
    entry = next(entry for entry in manifest.tensors if entry.name == "layers.0.weight")
    with Path(manifest.path).open("r+b") as file:
        file.seek(entry.offset + entry.num_bytes - 1)
        [last] = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([last ^ 1]))
    with pytest.raises(RuntimeError, match=r"policy 3: tensor layers\.0\.weight arrived with checksum") as caught:
        fetch(client(on_host), manifest)
    assert f"the learner published {entry.checksum:08x}" in str(caught.value)
    assert entry.checksum == zlib.crc32(tensors(3)[entry.name].view(torch.uint8).numpy().tobytes())


def test_a_file_that_was_cut_off_is_noticed(store: WeightStore, client: Callable[..., WeightClient]):
    manifest = publish(store, 3)
    with Path(manifest.path).open("r+b") as file:
        file.truncate(manifest.num_bytes - 1)
    with pytest.raises(RuntimeError, match=f"has {manifest.num_bytes - 1} bytes, the learner published"):
        fetch(client(host_id()), manifest)


@pytest.mark.parametrize("on_host", [host_id(), "another host"], ids=["same host", "another host"])
def test_a_version_that_is_gone_is_refused(store: WeightStore, client: Callable[..., WeightClient], on_host: str):
    first = publish(store, 1)
    for version in range(2, 7):
        publish(store, version)
    assert not Path(first.path).exists()
    with pytest.raises(RequestRefused, match="version 1 is not"):
        fetch(client(on_host), first)


def test_waiting_ends_with_the_next_publication_or_in_time(
    store: WeightStore, client: Callable[..., WeightClient], monkeypatch: pytest.MonkeyPatch
):
    """The store is asked again and again: it parks a request for less time than an actor may wait."""
    monkeypatch.setattr("actors.weights.LONGEST_PARK_SECONDS", 0.1)

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


def test_a_version_becomes_a_folder_that_transformers_loads(
    store: WeightStore, client: Callable[..., WeightClient], tmp_path: Path
):
    from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Qwen2Config(vocab_size=11, num_key_value_heads=2, tie_word_embeddings=False, **sizes)
    base, trained = Qwen2ForCausalLM(config), Qwen2ForCausalLM(config)
    base.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    (tmp_path / "base" / "model.safetensors.index.json").write_text("{}")
    named = [(name, tensor.detach()) for name, tensor in trained.state_dict().items()]
    local = fetch(client(host_id()), store.publish(4, named).result(SECONDS))

    folder = export_folder(local, tmp_path / "base", tmp_path / "verify")
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [path.name for path in (tmp_path / "base").iterdir() if "index" not in path.name]
    )
    assert_same(load_file(folder / "model.safetensors"), dict(named))
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert_same(loaded.state_dict(), dict(named))


def test_mapped_tensors_may_be_changed_without_changing_the_learners_file(
    store: WeightStore, client: Callable[..., WeightClient]
):
    local = fetch(client(host_id()), publish(store, 3))
    before = local.path.read_bytes()
    update: dict[str, Any] = local.update_info()
    for _, tensor in FileUpdateInfo(**update).map_tensors():
        tensor.zero_()
    assert local.path.read_bytes() == before


class StandInModel(torch.nn.Linear):
    """A model whose loader takes what it knows and passes over the rest, as vLLM's do."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.config = SimpleNamespace(tie_word_embeddings=False)

    def load_weights(self, weights: list[tuple[str, torch.Tensor]]) -> set[str]:
        return {name for name, _ in weights if name in dict(self.named_parameters())}


def test_a_parameter_that_is_not_published_is_an_error(tmp_path: Path):
    engine = FileTransferEngine.__new__(FileTransferEngine)
    engine.model, engine.model_config = StandInModel(), SimpleNamespace(quantization=None)
    (tmp_path / "v1").write_bytes(bytes(24))
    whole = FileUpdateInfo(str(tmp_path / "v1"), ["weight", "bias"], ["float32"] * 2, [[2, 2], [2]], [0, 16])
    engine.receive_weights(whole)
    partial = FileUpdateInfo(str(tmp_path / "v1"), ["weight"], ["float32"], [[2, 2]], [0])
    with pytest.raises(RuntimeError, match="1 of 2 parameters are not among the published weights, the first is bias"):
        engine.receive_weights(partial)
