"""Published adapters are merged on the actor's host into the whole weights that the learner would have published."""

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from actors.weights.adapters import Merger, base_tensors, tensor_at
from actors.weights.client import WeightClient
from actors.weights.local import LocalWeights
from buffer.transport.connection import Connection, host_id
from buffer.transport.credentials import Credentials
from buffer.weights.config import WeightsConfig
from learner.checkpoints.checkpoint import POLICY_PREFIX
from learner.config import LoraConfig
from learner.models.lora import NamedTensor, adapter_tensors, whole_tensors
from learner.models.policy import PolicyModel
from learner.weights.store import WeightStore
from tests.learner.samples import save_tiny_model

PLAIN = Credentials.plain("test")
Stores = Callable[[str], WeightStore]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("base"))


def policy_of(base: Path, dtype: torch.dtype = torch.float32, seed: int = 0) -> PolicyModel:
    """A policy with trained adapters; with `seed` 0 the adapters are untrained."""
    lora = LoraConfig(rank=3, alpha=7)
    policy = PolicyModel.load(base, dtype=dtype, temperature=1.0, checkpointing=False, lora=lora)
    if seed:
        move(policy, seed)
    return policy


def move(policy: PolicyModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def named(tensors: Iterator[NamedTensor]) -> dict[str, Tensor]:
    return {tensor.name.removeprefix(POLICY_PREFIX): tensor.value() for tensor in tensors}


def tensors_of(local: LocalWeights) -> dict[str, Tensor]:
    array = np.memmap(local.path, np.uint8, mode="c")
    return {e.name: tensor_at(array, e.dtype, e.shape, e.offset) for e in local.manifest.tensors}


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
        assert torch.equal(found[name].signbit(), tensor.signbit()), name


def sharded(base: Path, folder: Path) -> Path:
    """The weights split into two files with an index."""
    tensors = list(load_file(base / "model.safetensors").items())
    files = {f"model-{i}.safetensors": dict(tensors[i::2]) for i in range(2)}
    folder.mkdir()
    for name, half in files.items():
        save_file(half, folder / name)
    index = {"weight_map": {key: name for name, half in files.items() for key in half}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def store(tmp_path: Path, socket_folder: Path) -> Iterator[WeightStore]:
    opened = WeightStore(tmp_path / "weights", WeightsConfig(f"ipc://{socket_folder}/weights"), PLAIN)
    yield opened
    opened.close()


def publish(store: WeightStore, version: int, policy: PolicyModel) -> LocalWeights:
    manifest = store.publish(version, named(adapter_tensors(policy)).items(), torch.float32).result(20)
    return LocalWeights(manifest, Path(manifest.path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_parts", [False, True])
def test_the_actor_makes_the_bits_that_the_learner_would_have_sent(
    base: Path, tmp_path: Path, store: WeightStore, dtype: torch.dtype, in_parts: bool
):
    policy = policy_of(base, dtype)
    folder = sharded(base, tmp_path / "sharded") if in_parts else base
    merger = Merger(folder, str(dtype).removeprefix("torch."))
    for version in range(3):
        local = publish(store, version, policy)
        whole = merger.whole(local)
        assert whole.policy_version == version
        assert_same_bits(tensors_of(whole), named(whole_tensors(policy)))
        move(policy, seed=version + 1)


def test_before_the_first_step_every_bit_is_the_bases(base: Path, tmp_path: Path, store: WeightStore):
    """Even the sign of a zero is kept, which adding a product of zeros would lose."""
    tensors = {name: tensor.clone() for name, tensor in base_tensors(base).items()}
    for tensor in tensors.values():
        tensor.view(-1)[0] = -0.0
    save_file(tensors, tmp_path / "model.safetensors")
    merger = Merger(tmp_path, "float32")
    assert_same_bits(tensors_of(merger.whole(publish(store, 0, policy_of(base)))), tensors)


@pytest.mark.parametrize("on_host", [True, False], ids=["mapped", "pulled"])
def test_fetched_adapters_arrive_whole_and_cost_the_link_little(
    base: Path, tmp_path: Path, store: WeightStore, socket_folder: Path, on_host: bool
):
    policy = policy_of(base)
    with Connection(f"ipc://{socket_folder}/weights", "actor-0", PLAIN) as connection:
        client = WeightClient(
            connection,
            host_id=host_id() if on_host else "elsewhere",
            published=tmp_path / "weights",
            chunk_bytes=10_000,
            whole=Merger(base, "float32").whole,
        )
        for version in range(6):
            move(policy, seed=version)
            manifest = publish(store, version, policy).manifest
            whole = asyncio.run(client.fetch(manifest))
            assert_same_bits(tensors_of(whole), named(whole_tensors(policy)))
        assert client.pulled_bytes <= (0 if on_host else 6 * manifest.num_bytes)
        client.close()


def test_a_version_of_whole_weights_is_left_as_it_is(base: Path, tmp_path: Path, store: WeightStore):
    manifest = store.publish(1, named(whole_tensors(policy_of(base, seed=1))).items()).result(20)
    local = LocalWeights(manifest, Path(manifest.path))
    assert Merger(tmp_path / "nowhere", "float32").whole(local) is local


def test_adapters_of_another_model_are_an_error(base: Path, tmp_path: Path, store: WeightStore):
    local = publish(store, 1, policy_of(base, seed=1))
    first = local.manifest.tensors[0]
    renamed = replace(first, name="model.layers.7.mlp.x.lora_A.weight")
    other = replace(local.manifest.tensors[1], name="model.layers.7.mlp.x.lora_B.weight")
    strange = replace(local.manifest, tensors=(renamed, other))
    with pytest.raises(RuntimeError, match=r"for model.layers.7.mlp.x, which is not there in .*different models"):
        Merger(base, "float32").whole(replace(local, manifest=strange))
    wider = save_tiny_model(tmp_path / "wider", heads=2, key_value_heads=1)
    with pytest.raises(RuntimeError, match=r"policy 1: an adapter of shape .* which is \(16, 32\) in .*wider"):
        Merger(wider, "float32").whole(local)


def test_a_folder_without_safetensors_is_an_error(base: Path, tmp_path: Path, store: WeightStore):
    local = publish(store, 1, policy_of(base, seed=1))
    with pytest.raises(RuntimeError, match=r"has no base that adapters can be added to: model.safetensors"):
        Merger(tmp_path, "float32").whole(local)
