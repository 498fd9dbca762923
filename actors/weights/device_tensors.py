"""What torch needs to map a tensor of another process's device, made from the record of its buffer."""

from __future__ import annotations

from typing import Any

import torch

from buffer.weights.device_handle import DeviceHandle


def rebuild_arguments(handle: DeviceHandle, dtype_name: str, shape: list[int], offset: int) -> tuple[Any, ...]:
    """For torch's `rebuild_cuda_tensor`; the seventh is the reader's number of the device, here 0.

    Args:
        handle: of the buffer.
        dtype_name: such as bfloat16.
        shape: of the tensor, contiguous.
        offset: bytes from the start of the buffer.
    """
    dtype, size = getattr(torch, dtype_name), torch.Size(shape)
    return (
        torch.Tensor,
        size,
        torch.empty(size, device="meta").stride(),
        offset // dtype.itemsize,
        torch.TypedStorage,
        dtype,
        0,
        bytes.fromhex(handle.storage_handle),
        handle.storage_bytes,
        handle.storage_offset,
        False,
        bytes.fromhex(handle.ref_counter_handle),
        handle.ref_counter_offset,
        bytes.fromhex(handle.event_handle),
        handle.waits_for_event,
    )
