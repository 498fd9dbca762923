"""Weights on their way in: pulled from the learner's store, checked, and loaded inside the vLLM worker.

Two halves. `WeightClient` runs in the actor: it waits for a new manifest, and brings the bytes to a local file (mapped
where the learner's own file is reachable, pulled in chunks where not) before generation pauses. `FileTransferEngine`
runs in vLLM's worker processes, registered under `TRANSFER_BACKEND` by importing this module: it maps that file and
hands the tensors to vLLM's layerwise reload, so tensor parallelism and weight repacking keep working.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import mmap
import shutil
import time
import zlib
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from vllm.distributed.weight_transfer import WeightTransferEngine, WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo

from actors.lifeline import end_with_actor
from buffer.client import Connection
from buffer.wire import Chunk, ChunkRequest, Manifest, ManifestRequest, NoNewVersion

logger = logging.getLogger(__name__)

TRANSFER_BACKEND = "slipstream_file"
WORKER_EXTENSION = "actors.weights.WorkerExtension"
CHUNKS_IN_FLIGHT = 8
LONGEST_PARK_SECONDS = 10.0
"""How long one request for a manifest stays with the store, which knows nothing of longer waits."""


@dataclass(frozen=True, slots=True)
class LocalWeights:
    """A version whose bytes are on this host, checked against its manifest."""

    manifest: Manifest
    path: Path

    @property
    def policy_version(self) -> int:
        """Completed optimizer steps behind these weights."""
        return self.manifest.policy_version

    def update_info(self) -> dict[str, Any]:
        """What `FileTransferEngine` needs, in types that cross to the worker process."""
        tensors = self.manifest.tensors
        return {
            "path": str(self.path),
            "names": [entry.name for entry in tensors],
            "dtypes": [entry.dtype for entry in tensors],
            "shapes": [list(entry.shape) for entry in tensors],
            "offsets": [entry.offset for entry in tensors],
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        """Copies of all tensors by name."""
        info = FileUpdateInfo(**self.update_info())
        return {name: tensor.clone() for name, tensor in info.map_tensors()}


class WeightClient:
    """Pulls versions from the learner's weight store.

    Args:
        connection: to the store; not closed here.
        host_id: this host's kernel; equal to the learner's when files can be shared.
        published: the only folder whose files are mapped, whatever path a manifest names.
        spool: folder for pulled versions.
        chunk_bytes: size of one pulled piece.
    """

    def __init__(self, connection: Connection, *, host_id: str, published: Path, spool: Path, chunk_bytes: int) -> None:
        self._connection = connection
        self._host_id = host_id
        self._published = published.resolve()
        self._spool = spool
        self._chunk_bytes = chunk_bytes

    async def wait_for_new(self, known_publication: str, wait_seconds: float) -> Manifest | None:
        """The newest manifest unless it is `known_publication`.

        Waits for: the learner's next publication. Unblocked by: the learner. Gives up after: `wait_seconds`, with a
        TimeoutError when the store has not answered in that time and a minute more.
        """
        deadline = time.monotonic() + wait_seconds
        while True:
            remaining = max(deadline - time.monotonic(), 0.0)
            request = ManifestRequest(known_publication, min(remaining, LONGEST_PARK_SECONDS))
            reply = await asyncio.wrap_future(self._connection.request(request, timeout_seconds=remaining + 60.0))
            if isinstance(reply, Manifest):
                return reply
            if not isinstance(reply, NoNewVersion):
                raise RuntimeError(f"the weight store answered {type(reply).__name__} to a request for a manifest")
            if not remaining:
                return None

    async def fetch(self, manifest: Manifest) -> LocalWeights:
        """Bring a version to this host and compare every tensor's checksum.

        Raises:
            RuntimeError: bytes that are not what the learner published, or a manifest that contradicts itself, naming
                the tensor.
            RequestRefused: the version is gone; ask for the newest manifest.
        """
        _check_manifest(manifest)
        if manifest.host_id == self._host_id and Path(manifest.path).resolve().is_relative_to(self._published):
            # Where the folder is not visible here, or the version is gone from it, the store is asked instead.
            with contextlib.suppress(FileNotFoundError):
                return await self._checked(manifest, Path(manifest.path))
        return await self._checked(manifest, await self._pull(manifest))

    async def _checked(self, manifest: Manifest, path: Path) -> LocalWeights:
        await asyncio.to_thread(_check, manifest, path)
        return LocalWeights(manifest, path)

    async def _pull(self, manifest: Manifest) -> Path:
        self._spool.mkdir(parents=True, exist_ok=True)
        for old in self._spool.glob("v*.weights"):
            old.unlink()
        path = self._spool / f"v{manifest.policy_version:08d}.weights"
        waiting: deque[tuple[ChunkRequest, asyncio.Future[Any]]] = deque()
        try:
            with path.open("wb") as file:
                for offset in range(0, manifest.num_bytes, self._chunk_bytes):
                    size = min(self._chunk_bytes, manifest.num_bytes - offset)
                    request = ChunkRequest(manifest.policy_version, offset, size)
                    answer = asyncio.wrap_future(self._connection.request(request, timeout_seconds=60.0))
                    waiting.append((request, answer))
                    if len(waiting) == CHUNKS_IN_FLIGHT:
                        await _write_chunk(file, *waiting.popleft())
                while waiting:
                    await _write_chunk(file, *waiting.popleft())
        finally:
            for _, future in waiting:
                future.cancel()
        return path


async def _write_chunk(file: Any, request: ChunkRequest, answer: asyncio.Future[Any]) -> None:
    reply = await answer
    if not isinstance(reply, Chunk):
        raise RuntimeError(f"the weight store answered {type(reply).__name__} to a request for a chunk")
    if (reply.offset, len(reply.data)) != (request.offset, request.num_bytes):
        raise RuntimeError(
            f"the weight store answered with {len(reply.data)} bytes at {reply.offset} to a request for"
            f" {request.num_bytes} at {request.offset}"
        )
    file.seek(reply.offset)
    file.write(reply.data)


def _check_manifest(manifest: Manifest) -> None:
    """Every tensor has a type that torch knows, as many bytes as its shape says, and lies inside the file."""
    for entry in manifest.tensors:
        dtype = getattr(torch, entry.dtype, None)
        if not isinstance(dtype, torch.dtype) or math.prod(entry.shape) * dtype.itemsize != entry.num_bytes:
            raise RuntimeError(
                f"policy {manifest.policy_version}: tensor {entry.name} of type {entry.dtype} and shape {entry.shape}"
                f" cannot have {entry.num_bytes} bytes"
            )
        if entry.offset + entry.num_bytes > manifest.num_bytes:
            raise RuntimeError(
                f"policy {manifest.policy_version}: tensor {entry.name} ends at byte {entry.offset + entry.num_bytes}"
                f" of a file of {manifest.num_bytes}"
            )


def _check(manifest: Manifest, path: Path) -> None:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        if len(mapped) != manifest.num_bytes:
            raise RuntimeError(
                f"policy {manifest.policy_version}: {path} has {len(mapped)} bytes, the learner published"
                f" {manifest.num_bytes}"
            )
        for entry in manifest.tensors:
            checksum = zlib.crc32(memoryview(mapped)[entry.offset : entry.offset + entry.num_bytes])
            if checksum != entry.checksum:
                raise RuntimeError(
                    f"policy {manifest.policy_version}: tensor {entry.name} arrived with checksum {checksum:08x}, the"
                    f" learner published {entry.checksum:08x}"
                )


def export_folder(weights: LocalWeights, base: Path, folder: Path) -> Path:
    """A version as a Hugging Face folder, with configuration and tokenizer from `base`."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in base.iterdir():
        if path.is_file() and path.suffix == ".json" and "index" not in path.name:
            shutil.copy2(path, folder / path.name)
    save_file(weights.tensors(), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@dataclass
class FileInitInfo(WeightTransferInitInfo):
    """Nothing to agree on beforehand."""


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
        """(name, tensor) pairs that share the mapped file's memory."""
        # Copy on write: torch wants writable memory, and nobody may write into the learner's file.
        mapped = np.memmap(self.path, dtype=np.uint8, mode="c")
        tensors = []
        for name, dtype_name, shape, offset in zip(self.names, self.dtypes, self.shapes, self.offsets, strict=True):
            dtype = getattr(torch, dtype_name)
            num_bytes = math.prod(shape) * dtype.itemsize
            flat = torch.from_numpy(mapped[offset : offset + num_bytes]).view(dtype)
            tensors.append((name, flat.view(shape)))
        return tensors


class FileTransferEngine(WeightTransferEngine[FileInitInfo, FileUpdateInfo]):
    """vLLM's weight-transfer interface over a local file; runs in every worker process."""

    init_info_cls = FileInitInfo
    update_info_cls = FileUpdateInfo

    def init_transfer_engine(self, init_info: FileInitInfo) -> None:
        """No connection to make."""

    def start_weight_update(self) -> None:
        """Loaded layers are repacked, so they go back to their checkpoint layout first."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load all tensors; the base class would synchronize an accelerator that a CPU worker does not have."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: FileUpdateInfo) -> None:
        """Hand the mapped tensors to the model's own loader.

        Raises:
            RuntimeError: a parameter of the engine's model is in no published tensor and would keep its old value.
        """
        loaded = self.model.load_weights(update_info.map_tensors())
        wanted = {name for name, _ in self.model.named_parameters()}
        missing = wanted - (loaded or wanted) - _tied_parameters(self.model)
        # Quantized layers make parameters of their own from the published ones.
        if missing and self.model_config.quantization is None:
            raise RuntimeError(
                f"{len(missing)} of {len(wanted)} parameters are not among the published weights, the first is"
                f" {min(missing)}; learner and actors run different models"
            )

    def finish_weight_update(self) -> None:
        """Repack the layers for serving."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        _repack_tied_head(self.model)

    def shutdown(self) -> None:
        """Nothing is held between updates."""


def _tied_parameters(model: torch.nn.Module) -> set[str]:
    """Names of parameters that share another one's storage by the model's configuration."""
    return {"lm_head.weight"} if getattr(model.config, "tie_word_embeddings", False) else set()


def _repack_tied_head(model: torch.nn.Module) -> None:
    """Repack an output head that shares the embedding's weight.

    The reload fills the shared tensor through the embedding and passes the head over, but on a CPU the head multiplies
    with a packed copy that was made when it was last processed: without this it would stay at the first version.
    """
    head = getattr(model, "lm_head", None)
    if head is not None and _tied_parameters(model):
        head.quant_method.process_weights_after_loading(head)


class _ExpectedlyEmpty(logging.Filter):
    """Drops vLLM's warning about layers that no weights arrive for by design; `receive_weights` checks the others."""

    def filter(self, record: logging.LogRecord) -> bool:
        """False for rotary tables and tied heads, which every update would report."""
        text = record.getMessage()
        return not (text.endswith("Failed to load weights") and ("RotaryEmbedding" in text or "LMHead" in text))


logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").addFilter(_ExpectedlyEmpty())


class WorkerExtension:
    """Named to vLLM as worker extension, so that its workers import this module and know the engine below."""


end_with_actor()

# vLLM's factory has no public way to ask; importing this module twice in one process must not fail.
if TRANSFER_BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(TRANSFER_BACKEND, FileTransferEngine)
