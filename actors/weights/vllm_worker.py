"""Prepares vLLM's workers for Slipstream's weight transfer.

A worker is the actor's own process with `actor.tensor_parallel_size=1`, and a child process otherwise. The actor names
`WorkerExtension` to vLLM, which adds the class to the bases of its worker class in every worker.
"""

from __future__ import annotations

import logging
from typing import Any

from vllm.distributed.weight_transfer import WeightTransferEngineFactory

from actors.lifeline import end_with_actor

WORKER_EXTENSION = "actors.weights.vllm_worker.WorkerExtension"
FILE_BACKEND, IPC_BACKEND = "slipstream_file", "slipstream_ipc"
BACKENDS = {"file": FILE_BACKEND, "ipc": IPC_BACKEND, "nccl": "nccl"}
"""vLLM's name of the weight-transfer engine for each `weights.transport`; `nccl` is vLLM's own engine."""
RELOAD_LOGGER = "vllm.model_executor.model_loader.reload.layerwise"


class WorkerExtension:
    """Runs `prepare_worker` in every worker, before the worker loads its model.

    vLLM calls no method of an extension when a worker starts, but creating the worker calls `__new__`.
    """

    def __new__(cls, *_: Any, **__: Any) -> WorkerExtension:
        """Prepare this process, then create the worker."""
        prepare_worker()
        return super().__new__(cls)


def prepare_worker() -> None:
    """Register the weight-transfer engines, drop false warnings, and tie this process to its actor.

    Later calls in the same process change nothing.
    """
    register_engines()
    logging.getLogger(RELOAD_LOGGER).addFilter(is_unexpected)
    end_with_actor()


def register_engines() -> None:
    """Make Slipstream's weight-transfer engines known to vLLM under `FILE_BACKEND` and `IPC_BACKEND`."""
    # vLLM's factory refuses a name that is registered, and has no public way to ask.
    if FILE_BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(FILE_BACKEND, "actors.weights.vllm_loader", "FileTransferEngine")
        WeightTransferEngineFactory.register_engine(IPC_BACKEND, "actors.weights.device_loader", "IpcTransferEngine")


def is_unexpected(record: logging.LogRecord) -> bool:
    """Filter log records: False for vLLM's warning about rotary tables and tied heads.

    No weights are published for these, so every load would cause the warning. `FileTransferEngine.receive_weights`
    checks the other parameters.
    """
    text = record.getMessage()
    return not (text.endswith("Failed to load weights") and ("RotaryEmbedding" in text or "LMHead" in text))
