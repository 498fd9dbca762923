"""The part `publication` of `benchmarks/gpu.py`: from a learner's parameters to memory that an actor can read.

Over shared memory: the seconds in which the learner waits for the copy, and the seconds until the version has its
checksums and is announced. A plain copy to pinned memory shows the limit of the link.

Over CUDA's IPC: the seconds of the copy on the device, and those of a second process that maps the learner's buffer,
copies every tensor out of it and compares the contents.
"""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.parts.gpu.work import Meter, Shape, random_model

SHARED_MEMORY = Path("/dev/shm")
READER_SECONDS = 120.0
Tensors = list[tuple[str, Tensor]]


def publication(meter: Meter, shape: Shape, quick: bool) -> dict[str, Any]:
    """Measures the size in GB, and the seconds of a plain copy and of each transport."""
    tensors = [(name, p.detach()) for name, p in random_model(shape, meter.device).named_parameters()]
    num_bytes = sum(tensor.nbytes for _, tensor in tensors)
    repeats = 2 if quick else 4
    return {
        "gb": num_bytes / 1e9,
        "copy_seconds": statistics.median(_copy_to_host(meter, tensors, repeats)),
        "shared_memory": _over("file", meter, tensors, repeats),
        "ipc": _over("ipc", meter, tensors, repeats)
        if meter.device.type == "cuda"
        else {"skipped": "needs a CUDA device"},
    }


def _copy_to_host(meter: Meter, tensors: Tensors, repeats: int) -> list[float]:
    pinned = [torch.empty_like(t, device="cpu", pin_memory=meter.device.type == "cuda") for _, t in tensors]

    def copy() -> None:
        for target, (_, tensor) in zip(pinned, tensors, strict=True):
            target.copy_(tensor, non_blocking=True)

    return meter.seconds(copy, repeats)


def _over(transport: str, meter: Meter, tensors: Tensors, repeats: int) -> dict[str, Any]:
    """Measures `repeats` versions of the learner's store, after two that are written to new memory and not measured."""
    from buffer.transport.credentials import Credentials
    from buffer.weights.config import WeightsConfig
    from learner.weights.device_store import open_store

    stalls, readies, reads = [], [], []
    with tempfile.TemporaryDirectory(prefix="slipstream-gpu-", dir=SHARED_MEMORY, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        config = WeightsConfig(f"ipc://{folder}/socket", transport=transport, keep_versions=1, deltas=False)
        store = open_store(folder / "weights", config, Credentials.plain("benchmark"), None, meter.device)
        try:
            for number in range(2 + repeats):
                meter.wait()
                began = time.perf_counter()
                future = store.publish(number, tensors)
                held = time.perf_counter() - began
                manifest = future.result()
                if number >= 2:
                    stalls.append(held)
                    readies.append(time.perf_counter() - began)
                    if transport == "ipc" and number < 4:
                        reads.append(_read_elsewhere(manifest, tensors))
        except OSError as error:
            return {"skipped": str(error).partition(";")[0]}
        finally:
            store.close()
    measured = {"stall_seconds": statistics.median(stalls), "ready_seconds": statistics.median(readies)}
    return measured | ({"read_seconds": statistics.median(reads)} if reads else {})


def _read_elsewhere(manifest: Any, tensors: Tensors) -> float:
    """Returns the seconds in which another process maps and copies the version.

    Waits for: that process. Gives up after: `READER_SECONDS`.

    Raises:
        RuntimeError: when the process reads other weights than the learner published, or gives no answer.
    """
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_reader, args=(manifest, theirs), daemon=True)
    process.start()
    try:
        if not ours.poll(READER_SECONDS):
            raise RuntimeError(f"the reader of the device's memory said nothing for {READER_SECONDS:.0f} s")
        seconds, sums = ours.recv()
    finally:
        process.kill()
        process.join()
    expected = [_sum(tensor) for _, tensor in tensors]
    if sums != expected:
        raise RuntimeError("another process read other weights from the device than the learner published")
    return float(seconds)


def _sum(tensor: Tensor) -> tuple[int, int]:
    """A checksum of a tensor: the sums of all bytes and of every third byte, which also changes with their order."""
    data = tensor.reshape(-1).view(torch.uint8)
    return int(data.sum(dtype=torch.int64)), int(data[::3].sum(dtype=torch.int64))


def _reader(manifest: Any, pipe: Pipe) -> None:
    """Maps and copies the version in a process of its own, as a vLLM worker does."""
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    from actors.weights.device_tensors import rebuild_arguments
    from buffer.weights.device_handle import unpack_record

    handle: Any = unpack_record(Path(manifest.path).read_bytes())
    torch.cuda.synchronize()
    began = time.perf_counter()
    entries = manifest.tensors
    views = [rebuild_cuda_tensor(*rebuild_arguments(handle, e.dtype, list(e.shape), e.offset)) for e in entries]
    copies = [view.clone() for view in views]
    torch.cuda.synchronize()
    pipe.send((time.perf_counter() - began, [_sum(copy) for copy in copies]))
