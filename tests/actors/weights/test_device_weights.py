"""vLLM's own weight-transfer engines accept the arguments that `DeviceWeights` makes; a CPU stands in for devices."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from io import BytesIO
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from actors.engine.engine import Engine
from actors.engine.thread import EngineThread
from actors.weights.device_client import DeviceWeights
from actors.weights.device_loader import IpcTransferEngine
from buffer.transport.messages import Manifest, TensorEntry
from buffer.weights.device_handle import DeviceHandle, Record, Rendezvous

EMBED, NORM = torch.arange(15, dtype=torch.bfloat16).view(3, 5), torch.arange(4, dtype=torch.float32)
ENTRIES = (TensorEntry("embed", "bfloat16", (3, 5), 0, 30, ""), TensorEntry("norm", "float32", (4,), 64, 16, ""))
GROUP = Rendezvous("127.0.0.1", 29500, 2)


def fetched(version: int, record: Record) -> DeviceWeights:
    manifest = Manifest(version, f"store:{version}", "v.weights", "", 80, ENTRIES)
    return DeviceWeights(manifest, record, BytesIO(), rank_offset=1)


def test_vllms_ipc_engine_maps_the_tensors_from_the_learners_buffer(monkeypatch: pytest.MonkeyPatch):
    from vllm.distributed.weight_transfer import ipc_engine

    buffer = torch.zeros(80, dtype=torch.uint8)
    buffer[:30].view(torch.bfloat16).copy_(EMBED.flatten())
    buffer[64:].view(torch.float32).copy_(NORM)

    def rebuild(cls: Any, size: Any, stride: Any, offset: int, storage: Any, dtype: Any, *rest: Any) -> torch.Tensor:
        assert rest == (3, b"\x00\xff", 4096, 512, False, b"\x01", 7, b"\x02", True)
        return buffer.view(dtype).as_strided(size, stride, offset)

    loaded: dict[str, torch.Tensor] = {}
    engine = IpcTransferEngine.__new__(IpcTransferEngine)
    engine.packed, engine.device = False, SimpleNamespace(index=3)
    engine.model = SimpleNamespace(load_weights=loaded.update)
    monkeypatch.setattr(ipc_engine, "rebuild_cuda_tensor", rebuild)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="GPU-0"))
    told = fetched(1, DeviceHandle("GPU-0", "00ff", 4096, 512, "01", 7, "02", True)).update_info()
    engine.receive_weights(engine.parse_update_info(told))
    assert torch.equal(loaded["embed"], EMBED) and torch.equal(loaded["norm"], NORM)
    elsewhere = fetched(1, DeviceHandle("GPU-1", "00ff", 4096, 512, "01", 7, "02", True)).update_info()
    with pytest.raises(ValueError, match="IPC handle not found for GPU UUID GPU-0"):
        engine.receive_weights(engine.parse_update_info(elsewhere))


def test_vllms_nccl_engines_meet_over_what_both_sides_are_told(monkeypatch: pytest.MonkeyPatch):
    from vllm.distributed.weight_transfer import nccl_engine

    from learner.weights.nccl_group import join

    sent: list[torch.Tensor] = []
    opened: list[Any] = []

    class Group:
        """Records the tensors that are broadcast."""

        def broadcast(self, tensor: torch.Tensor, src: int, stream: Any) -> None:
            sent.append(tensor)

    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", lambda info: opened.append(info) or Group())
    for name in ("set_device", "Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    send = join(GROUP, torch.device("cuda", 0), [("embed", EMBED), ("norm", NORM)])
    send([("embed", EMBED + 1), ("norm", NORM)])
    assert (opened[0].world_size, opened[0].master_port) == (2, 29500) and opened[0].is_sender
    assert torch.equal(sent[0], EMBED + 1) and torch.equal(sent[1], NORM)

    version = fetched(1, GROUP)
    worker = nccl_engine.NCCLWeightTransferEngine.__new__(nccl_engine.NCCLWeightTransferEngine)
    worker.parallel_config = None
    monkeypatch.setattr(nccl_engine, "worker_init_process_group", lambda info, _: Receiver(info.rank_offset, sent))
    worker.init_transfer_engine(worker.parse_init_info(version.init_info()))
    loaded: dict[str, torch.Tensor] = {}
    worker.device, worker.model = torch.device("cpu"), SimpleNamespace(load_weights=loaded.update)
    worker.receive_weights(worker.parse_update_info(version.update_info()))
    assert torch.equal(loaded["embed"], EMBED + 1) and torch.equal(loaded["norm"], NORM)


class Receiver:
    """A member of the group that receives the trainer's tensors in the same order."""

    def __init__(self, rank: int, sent: list[torch.Tensor]) -> None:
        assert rank == 1
        self.waiting = list(sent)

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any) -> None:
        arrived = self.waiting.pop(0)
        assert (tensor.shape, tensor.dtype) == (arrived.shape, arrived.dtype)
        tensor.copy_(arrived)


class RecordedEngine:
    """Records the calls of vLLM's methods. The method `hangs` takes longer than the timeout."""

    def __init__(self, hangs: str = "") -> None:
        self.calls: list[str] = []
        self.hangs = hangs
        self.engine_core = self
        self.batch_queue = None

    def has_unfinished_requests(self) -> bool:
        return False

    def collective_rpc(self, name: str, **_: Any) -> None:
        getattr(self, name)()

    def __getattr__(self, name: str) -> Any:
        def call(*_: Any, **__: Any) -> None:
            self.calls.append(name)
            if name == self.hangs:
                time.sleep(0.3)

        return call


@contextmanager
def engine_over(llm: RecordedEngine) -> Iterator[Engine]:
    engine = Engine.__new__(Engine)
    engine._recomputes, engine._joined, engine._rendezvous_seconds = False, None, 0.1
    engine._thread = EngineThread(lambda: llm)  # type: ignore[arg-type, return-value]
    try:
        yield engine
    finally:
        engine.close()


def test_a_group_is_joined_once_per_learner_between_pause_and_resume():
    llm = RecordedEngine()

    async def three_versions(engine: Engine) -> None:
        for version, group in ((1, GROUP), (2, GROUP), (1, Rendezvous("127.0.0.1", 29501, 2))):
            await engine.load(fetched(version, group))

    with engine_over(llm) as engine:
        asyncio.run(three_versions(engine))
    load = ["start_weight_update", "update_weights", "finish_weight_update", "set_weight_version", "resume_scheduler"]
    joined, left, pause = "init_weight_transfer_engine", "shutdown_weight_transfer_engine", "pause_scheduler"
    expected = [pause, joined, *load, pause, *load, pause, left, joined, *load, "shutdown"]
    assert llm.calls == expected


def test_a_group_that_is_never_complete_ends_the_actor():
    llm = RecordedEngine(hangs="update_weights")
    with (
        engine_over(llm) as engine,
        pytest.raises(RuntimeError, match=r"policy 4: the learner's group was not complete .*rendezvous_seconds=0\.1"),
    ):
        asyncio.run(engine.load(fetched(4, GROUP)))
