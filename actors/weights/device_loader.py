"""vLLM's IPC weight-transfer engine with a description of the learner's buffer in plain types.

vLLM's own engine takes CUDA handles as the tuples that torch pickles, and such tuples reach a worker process only with
unsafe serialization. `IpcTransferEngine` creates the tuples in the worker. `actors/weights/vllm_worker.py` registers it
with vLLM.
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
        """Return the argument of vLLM's engine: per tensor, the arguments of torch's `rebuild_cuda_tensor`."""
        handle = DeviceHandle(**self.handle)
        places = zip(self.dtype_names, self.shapes, self.offsets, strict=True)
        return IPCWeightTransferUpdateInfo(
            names=self.names,
            dtype_names=self.dtype_names,
            shapes=self.shapes,
            ipc_handles=[
                {handle.device_uuid: rebuild_arguments(handle, dtype_name, shape, offset)}
                for dtype_name, shape, offset in places
            ],
        )


class IpcTransferEngine(IPCWeightTransferEngine):
    """vLLM's engine for a buffer that the learner reuses."""

    update_info_cls = HandleUpdateInfo

    def receive_weights(self, update_info: HandleUpdateInfo) -> None:
        """Map the learner's buffer and load from it, without copying the buffer first."""
        super().receive_weights(update_info.for_vllm())

    def finish_weight_update(self) -> None:
        """Finish the load, and wait until the device has read the buffer, which the actor releases afterwards."""
        super().finish_weight_update()
        torch.accelerator.synchronize()
