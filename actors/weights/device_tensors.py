"""Builds torch's arguments for mapping a CUDA tensor of another process."""

from __future__ import annotations

from typing import Any

import torch

from buffer.weights.device_handle import DeviceHandle


def rebuild_arguments(handle: DeviceHandle, dtype_name: str, shape: list[int], offset: int) -> tuple[Any, ...]:
    """Return the arguments of torch's `rebuild_cuda_tensor`. The seventh is the reader's device index, here 0.

    Args:
        handle: describes the learner's buffer.
        dtype_name: such as bfloat16.
        shape: shape of the contiguous tensor.
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
