"""Loading a file of weights in vLLM's workers."""

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

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
