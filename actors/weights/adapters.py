"""Merges published LoRA adapters into whole weights on the actor's host, before generation pauses.

For every layer that a LoRA trains, a version may hold two matrices instead of the weight: A [rank, in] and B [out,
rank], in float32, with the LoRA's scale contained in B. `Merger` adds B A to the weights of the folder that the actor
started from, by the formula of `learner/models/lora.py`. The result is a version like any other, so the engine needs no
support for adapters.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from actors.weights.local import HostCopy, LocalWeights
from buffer.transport.messages import TensorEntry
from buffer.weights.layout import ALIGNMENT_BYTES, LORA_A, LORA_B

INDEX = "model.safetensors.index.json"


def tensor_at(array: NDArray[np.uint8], dtype_name: str, shape: Iterable[int], offset: int) -> Tensor:
    """Return the tensor at byte `offset` of `array`; the tensor shares the array's memory."""
    dtype, shape = getattr(torch, dtype_name), tuple(shape)
    flat = torch.from_numpy(array[offset : offset + math.prod(shape) * dtype.itemsize])
    tensor: Tensor = flat.view(dtype).view(shape)
    return tensor


def base_tensors(folder: Path) -> dict[str, Tensor]:
    """Return every tensor of a Hugging Face folder of safetensors files, memory-mapped.

    Raises:
        RuntimeError: a file is missing or cannot be read.
    """
    index = folder / INDEX
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    tensors: dict[str, Tensor] = {}
    try:
        for name in sorted(names):
            with safe_open(folder / name, framework="pt") as file:
                tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise RuntimeError(f"{folder} has no base that adapters can be added to: {name}: {error}") from error
    return tensors


class Merger:
    """Holds one copy of the whole weights in this process's memory; every version is merged into the same copy.

    Args:
        base: the Hugging Face folder that engine and learner started from.
        dtype: the dtype of the engine and of the learner.
    """

    def __init__(self, base: Path, dtype: str) -> None:
        self._base, self._dtype = base, dtype
        self._copy: HostCopy | None = None
        self._tensors: dict[str, Tensor] = {}
        """The base's tensors, memory-mapped, in the folder's dtypes."""
        self._places: dict[str, TensorEntry] = {}
        """Where each tensor lies in the copy."""

    def whole(self, weights: LocalWeights) -> LocalWeights:
        """Return `weights` itself when it holds no adapters; otherwise release `weights` and return the merged weights.

        Raises:
            RuntimeError: an adapter belongs to no layer of the base, or has another shape.
            OSError: there is no room.
        """
        manifest = weights.manifest
        entries = {entry.name: entry for entry in manifest.tensors}
        layers = [name.removesuffix(LORA_A) for name in entries if name.endswith(LORA_A)]
        if not layers:
            return weights
        try:
            copy = self._copy or self._lay_out()
            published = np.memmap(weights.path, np.uint8, mode="c")
            for layer in layers:
                down, up = (_tensor(published, entries[layer + kind]) for kind in (LORA_A, LORA_B))
                place = self._places.get(f"{layer}.weight")
                if place is None or place.shape != (len(up), down.shape[1]):
                    raise RuntimeError(
                        f"policy {manifest.policy_version}: an adapter of shape {(len(up), down.shape[1])} for {layer},"
                        f" which is {place.shape if place else 'not there'} in {self._base}; learner and actors run"
                        " different models"
                    )
                weight = self._tensors[place.name].to(getattr(torch, self._dtype))
                _tensor(copy.array, place).copy_(merged(weight, down, up))
        finally:
            weights.release()
        whole = replace(manifest, path=str(copy.path), num_bytes=len(copy.array), tensors=tuple(self._places.values()))
        return LocalWeights(whole, copy.path)

    def _lay_out(self) -> HostCopy:
        """Allocate the copy and fill it with the base's tensors."""
        self._tensors, offset = base_tensors(self._base), 0
        for name, tensor in self._tensors.items():
            type_name = self._dtype if tensor.is_floating_point() else str(tensor.dtype).removeprefix("torch.")
            num_bytes = tensor.numel() * getattr(torch, type_name).itemsize
            self._places[name] = TensorEntry(name, type_name, tuple(tensor.shape), offset, num_bytes, "")
            offset += num_bytes + -num_bytes % ALIGNMENT_BYTES
        copy = HostCopy(offset)
        for name, place in self._places.items():
            _tensor(copy.array, place).copy_(self._tensors[name])
        self._copy = copy
        return copy


def merged(weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Return W + B A, computed in float32, in the dtype of W."""
    # With B = 0 the weight must keep every bit, but adding 0 would turn -0 into 0.
    return (weight.float() + up @ down).to(weight.dtype) if up.any() else weight


def _tensor(array: NDArray[Any], entry: TensorEntry) -> Tensor:
    return tensor_at(array, entry.dtype, entry.shape, entry.offset)
