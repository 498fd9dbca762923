"""Loading a file of weights in vLLM's workers."""

import asyncio
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from actors.loading import Loader
from actors.weights.local import LocalWeights
from actors.weights.vllm_loader import FileTransferEngine, FileUpdateInfo, export_folder
from buffer.transport.messages import Manifest, TensorEntry
from buffer.weights.shared_memory import Segment, SegmentPool


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def published(folder: Path, named: Iterable[tuple[str, Tensor]]) -> tuple[Segment, LocalWeights]:
    """Publish tensors in shared memory without a learner."""
    entries, offset = [], 0
    tensors = [(name, tensor.detach()) for name, tensor in named]
    for name, tensor in tensors:
        dtype = str(tensor.dtype).removeprefix("torch.")
        entries.append(TensorEntry(name, dtype, tuple(tensor.shape), offset, tensor.nbytes, ""))
        offset += tensor.nbytes
    slot = SegmentPool(folder).take(offset)
    for (_, tensor), entry in zip(tensors, entries, strict=True):
        slot.array[entry.offset : entry.offset + entry.num_bytes] = tensor.reshape(-1).view(torch.uint8).numpy()
    path = slot.publish("v4.weights")
    return slot, LocalWeights(Manifest(4, "test:4", str(path), "", offset, tuple(entries)), path)


def test_a_version_becomes_a_folder_that_transformers_loads(tmp_path: Path):
    from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Qwen2Config(vocab_size=11, num_key_value_heads=2, tie_word_embeddings=False, **sizes)
    base, trained = Qwen2ForCausalLM(config), Qwen2ForCausalLM(config)
    base.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    (tmp_path / "base" / "model.safetensors.index.json").write_text("{}")
    named = [(name, tensor.detach()) for name, tensor in trained.state_dict().items()]
    slot, local = published(tmp_path / "published", named)

    folder = export_folder(local, tmp_path / "base", tmp_path / "verify")
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [path.name for path in (tmp_path / "base").iterdir() if "index" not in path.name]
    )
    assert_same(load_file(folder / "model.safetensors"), dict(named))
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert_same(loaded.state_dict(), dict(named))
    slot.remove()


class Reloading:
    """An engine that loads folders. Its checksums are the sums of the tensors that it holds."""

    def __init__(self, tensors: dict[str, Tensor], error: Exception | None = None) -> None:
        self.tensors, self.error = tensors, error
        self.folders: list[Path] = []

    async def checksums(self) -> dict[str, str]:
        return {name: str(tensor.sum()) for name, tensor in self.tensors.items()}

    async def reload_from_folder(self, folder: str) -> None:
        self.folders.append(Path(folder))
        if self.error is not None:
            raise self.error
        self.tensors = load_file(Path(folder) / "model.safetensors")


def verify(engine: Reloading, local: LocalWeights, base: Path, spool: Path) -> None:
    async def check() -> None:
        unused: Any = None
        config: Any = SimpleNamespace(model_path=str(base))
        parts: Any = config, engine, unused, spool
        await Loader(*parts, unused, unused, 0, unused, time.monotonic).verify(local)

    asyncio.run(check())


@pytest.fixture
def model(tmp_path: Path) -> Iterator[tuple[dict[str, Tensor], LocalWeights]]:
    (tmp_path / "base").mkdir()
    tensors = {"embed": torch.randn(37, 11), "norm": torch.randn(5)}
    slot, local = published(tmp_path / "published", tensors.items())
    yield tensors, local
    slot.remove()


def test_the_copy_for_the_comparison_after_the_first_load_does_not_stay(
    tmp_path: Path, model: tuple[dict[str, Tensor], LocalWeights]
):
    tensors, local = model
    spool = tmp_path / "spool"
    engine = Reloading(dict(tensors))
    verify(engine, local, tmp_path / "base", spool)
    assert [folder.parent for folder in engine.folders] == [spool] and list(spool.iterdir()) == []
    # Nor when the comparison finds a difference, or the engine fails.
    for engine, error in (
        (
            Reloading(tensors | {"norm": torch.zeros(5)}),
            "1 of 2 parameters differ .*, the first is norm",
        ),
        (Reloading(dict(tensors), RuntimeError("no memory")), "no memory"),
    ):
        with pytest.raises(RuntimeError, match=error):
            verify(engine, local, tmp_path / "base", spool)
        assert list(spool.iterdir()) == []


def test_where_no_disk_has_room_for_the_copy_the_comparison_is_left_out(
    tmp_path: Path,
    model: tuple[dict[str, Tensor], LocalWeights],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    tensors, local = model
    free = {tmp_path / "spool": 100, tmp_path / "temporary": 1 << 30}
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free[Path(path).parent]))
    engine = Reloading(dict(tensors))
    verify(engine, local, tmp_path / "base", tmp_path / "spool")
    assert [folder.parent for folder in engine.folders] == [tmp_path / "temporary"]
    free[tmp_path / "temporary"] = 100
    verify(engine, local, tmp_path / "base", tmp_path / "spool")
    assert len(engine.folders) == 1
    assert "policy 4 is not compared after the first load: no disk has room for it" in caplog.text
    assert [list(folder.iterdir()) for folder in free] == [[], []]


def test_mapped_tensors_may_be_changed_without_changing_the_learners_file(tmp_path: Path):
    slot, local = published(tmp_path, [("embed", torch.randn(37, 11)), ("norm", torch.randn(5).bfloat16())])
    before = local.path.read_bytes()
    update: dict[str, Any] = local.update_info()
    for _, tensor in FileUpdateInfo(**update).map_tensors():
        tensor.zero_()
    assert local.path.read_bytes() == before
    slot.remove()


class StandInModel(torch.nn.Linear):
    """A model whose loader ignores unknown tensors, as vLLM's do."""

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
