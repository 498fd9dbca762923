"""vLLM's IPC weight-transfer engine, told in plain types where the learner's buffer lies.

Runs in vLLM's worker processes, named to vLLM by `actors/weights/vllm_loader.py`. vLLM's own engine takes handles as
the tuples that torch pickles, which only cross to a worker with unsafe serialization; here the tuples are made in the
worker.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine, IPCWeightTransferUpdateInfo

from actors.weights.device_tensors import rebuild_arguments
from buffer.weights.device_handle import DeviceHandle


@dataclass
class HandleUpdateInfo(WeightTransferUpdateInfo):
    """Where each tensor lies in the learner's buffer; lists of equal length."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    offsets: list[int]
    """Bytes from the start of the buffer."""
    handle: dict[str, Any]
    """The fields of a `DeviceHandle`."""

    def for_vllm(self) -> IPCWeightTransferUpdateInfo:
        """The same as vLLM's engine wants it: a tuple for torch's `rebuild_cuda_tensor` per tensor."""
        handle = DeviceHandle(**self.handle)
        views = zip(self.dtype_names, self.shapes, self.offsets, strict=True)
        return IPCWeightTransferUpdateInfo(
            names=self.names,
            dtype_names=self.dtype_names,
            shapes=self.shapes,
            ipc_handles=[{handle.device_uuid: rebuild_arguments(handle, *view)} for view in views],
        )


class IpcTransferEngine(IPCWeightTransferEngine):
    """vLLM's engine over a buffer that the learner uses again."""

    update_info_cls = HandleUpdateInfo

    def receive_weights(self, update_info: HandleUpdateInfo) -> None:
        """Map the buffer and load from it, without a copy of the whole."""
        super().receive_weights(update_info.for_vllm())

    def finish_weight_update(self) -> None:
        """Nothing may still be read when the actor lets the buffer go."""
        super().finish_weight_update()
        torch.accelerator.synchronize()
