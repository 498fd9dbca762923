"""vLLM's weight-transfer interface over a file on this host.

vLLM runs `FileTransferEngine` in its workers, under the name that `actors/weights/vllm_worker.py` registers. The engine
maps the file that `actors/weights/client.py` has fetched and checked, and hands the tensors to vLLM's layerwise reload.
Tensor parallelism and weight repacking therefore work as in vLLM's own loader.
"""

from __future__ import annotations

import errno
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from vllm.distributed.weight_transfer import WeightTransferEngine
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo

from actors.weights.adapters import tensor_at
from actors.weights.interface import FetchedVersion


def export_folder(weights: FetchedVersion, base: Path, folder: Path) -> Path:
    """Write a version as a Hugging Face folder with the configuration and tokenizer of `base`. Returns the folder.

    The bytes of the version must be on this host.

    Raises:
        OSError: there is no room for the folder.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in base.iterdir():
        if path.is_file() and path.suffix == ".json" and "index" not in path.name:
            shutil.copy2(path, folder / path.name)
    tensors = dict(FileUpdateInfo(**weights.update_info()).map_tensors())
    wanted, free = sum(tensor.nbytes for tensor in tensors.values()), shutil.disk_usage(folder).free
    # safetensors would fail with an error of its own.
    if wanted > free:
        raise OSError(errno.ENOSPC, f"{wanted} bytes do not fit in the {free} that are free", str(folder))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@dataclass
class FileInitInfo(WeightTransferInitInfo):
    """Empty: a file needs no group."""


@dataclass
class FileUpdateInfo(WeightTransferUpdateInfo):
    """Where each tensor lies in a local file; lists of equal length."""

    path: str
    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    offsets: list[int]
    """Bytes from the start of the file."""

    def map_tensors(self) -> list[tuple[str, torch.Tensor]]:
        """Return (name, tensor) pairs; the tensors share the mapped file's memory."""
        # Copy on write: torch needs writable memory, but the learner's file must not change.
        mapped = np.memmap(self.path, dtype=np.uint8, mode="c")
        places = zip(self.names, self.dtypes, self.shapes, self.offsets, strict=True)
        return [(name, tensor_at(mapped, dtype, shape, offset)) for name, dtype, shape, offset in places]


class FileTransferEngine(WeightTransferEngine[FileInitInfo, FileUpdateInfo]):
    """Loads the model of one worker from a local file."""

    init_info_cls = FileInitInfo
    update_info_cls = FileUpdateInfo

    def init_transfer_engine(self, init_info: FileInitInfo) -> None:
        """Do nothing: a file needs no group."""

    def start_weight_update(self) -> None:
        """Put the layers back into their checkpoint layout, because vLLM repacks a layer after loading it."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load all tensors. The base class would synchronize an accelerator, which a CPU worker does not have."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: FileUpdateInfo) -> None:
        """Hand the mapped tensors to the model's own loader.

        Raises:
            RuntimeError: a parameter of the model is in no published tensor and would keep its old value.
        """
        loaded = self.model.load_weights(update_info.map_tensors())
        wanted = {name for name, _ in self.model.named_parameters()}
        missing = wanted - (loaded or wanted) - _tied_parameters(self.model)
        # Quantized layers have parameters that they compute from the published ones.
        if missing and self.model_config.quantization is None:
            raise RuntimeError(
                f"{len(missing)} of {len(wanted)} parameters are not among the published weights, the first is"
                f" {min(missing)}; learner and actors run different models"
            )

    def finish_weight_update(self) -> None:
        """Repack the layers for inference."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        _repack_tied_head(self.model)

    def shutdown(self) -> None:
        """Do nothing: no resource is held between updates."""


def _tied_parameters(model: torch.nn.Module) -> set[str]:
    """Return the names of the parameters that share another parameter's storage by the model's configuration."""
    return {"lm_head.weight"} if getattr(model.config, "tie_word_embeddings", False) else set()


def _repack_tied_head(model: torch.nn.Module) -> None:
    """Repack an output head that shares the embedding's weight.

    vLLM's reload fills the shared tensor through the embedding and skips the head. On a CPU the head multiplies with a
    packed copy of the weight, which would keep the first version without this call.
    """
    head = getattr(model, "lm_head", None)
    if head is not None and _tied_parameters(model):
        head.quant_method.process_weights_after_loading(head)
