"""vLLM's workers are prepared when they are created, and importing the modules prepares nothing."""

import logging

from vllm.config import ParallelConfig
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.utils.import_utils import resolve_obj_by_qualname

import actors.engine.engine
import actors.weights.vllm_loader  # noqa: F401
from actors.weights.vllm_worker import BACKENDS, RELOAD_LOGGER, WORKER_EXTENSION, is_unexpected

# All modules of tests are imported before the first test runs.
AFTER_IMPORT = set(WeightTransferEngineFactory._registry), list(logging.getLogger(RELOAD_LOGGER).filters)


class VllmWorker:
    """As vLLM's worker class: its constructor takes arguments and does not call an extension's."""

    def __init__(self, rank: int, *, is_driver: bool) -> None:
        self.rank, self.is_driver = rank, is_driver


class CpuWorker(VllmWorker):
    """vLLM adds the extension to the bases of the class that it has chosen."""


def test_creating_a_worker_registers_the_engines_and_drops_the_false_warnings_once():
    extension = resolve_obj_by_qualname(ParallelConfig(worker_extension_cls=WORKER_EXTENSION).worker_extension_cls)
    CpuWorker.__bases__ = (*CpuWorker.__bases__, extension)
    for rank in range(2):
        worker = CpuWorker(rank, is_driver=True)
        assert (worker.rank, worker.is_driver, isinstance(worker, extension)) == (rank, True, True)
    names = [WeightTransferEngineFactory._registry[BACKENDS[transport]]().__name__ for transport in ("file", "ipc")]
    assert names == ["FileTransferEngine", "IpcTransferEngine"]
    assert logging.getLogger(RELOAD_LOGGER).filters.count(is_unexpected) == 1


def test_only_the_expected_warnings_are_dropped():
    def said(text: str) -> logging.LogRecord:
        return logging.LogRecord(RELOAD_LOGGER, logging.WARNING, "", 0, text, (), None)

    assert not is_unexpected(said("ParallelLMHead: Failed to load weights"))
    assert not is_unexpected(said("Qwen2RotaryEmbedding: Failed to load weights"))
    assert is_unexpected(said("QKVParallelLinear: Failed to load weights"))
    assert is_unexpected(said("LMHead: loaded"))


def test_importing_the_modules_changes_nothing():
    registered, filters = AFTER_IMPORT
    assert registered and not {name for name in registered if name.startswith("slipstream")}
    assert filters == []
