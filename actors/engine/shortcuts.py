"""Batches vLLM's per-token Python bookkeeping.

With hundreds of short sequences and a small model, this bookkeeping takes an eighth of an engine step. `patch_for_cpu`
patches an engine that runs in this process. The engine's outputs stay the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.engine.detokenizer import IncrementalDetokenizer
from vllm.v1.engine.output_processor import OutputProcessor, OutputProcessorOutput
from vllm.v1.outputs import LogprobsLists

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.engine import EngineCoreOutput
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.request import Request

MOST_HELD = 64
"""Largest number of outputs of one sequence that are held back; one takes about a kilobyte."""
DECODING = {"num_lookahead_tokens": 0}
"""Keyword arguments with which vLLM's scheduler calls `allocate_slots` for a sequence that decodes."""


def patch_for_cpu(llm: LLMEngine) -> None:
    """Patch `llm`, which has no request yet."""
    core: Any = llm.engine_core
    keep_blocks(core.engine_core.scheduler.kv_cache_manager)
    processor: Any = llm.output_processor
    processor.process_outputs = HeldOutputs(processor).process_outputs


def keep_blocks(manager: KVCacheManager) -> None:
    """Allocate key-value cache blocks for a decoding sequence only when its last block is full.

    Changes nothing for a manager that shares blocks between sequences or frees blocks of a running sequence.
    """
    kinds = manager.coordinator.single_type_managers
    if manager.enable_caching or len(kinds) != 1 or type(kinds[0]) is not FullAttentionManager:
        return
    blocks_of, block_size, allocate = kinds[0].req_to_blocks, kinds[0].block_size, manager.allocate_slots

    def allocate_slots(request: Request, num_new_tokens: int, **named: Any) -> KVCacheBlocks | None:
        if num_new_tokens == 1 and named == DECODING:
            blocks = blocks_of.get(request.request_id, ())
            if request.num_computed_tokens < len(blocks) * block_size:
                return manager.empty_kv_cache_blocks
        return allocate(request, num_new_tokens, **named)

    manager.allocate_slots = allocate_slots


class HeldOutputs:
    """Collects the outputs of several engine steps before vLLM's output processor gets them.

    A sequence's outputs are passed on, joined into one, when the sequence ends, when `MOST_HELD` outputs are held, or
    when the weights change. Sequences with stop strings are never held back, because the processor looks for the
    strings in the text. Only for requests with the output kind FINAL_ONLY.
    """

    def __init__(self, processor: OutputProcessor) -> None:
        self._processor, self._process = processor, processor.process_outputs
        self._held: dict[str, list[EngineCoreOutput]] = {}
        self._version: str | None = None
        """Version of the weights that sampled the held outputs."""

    def process_outputs(
        self, outputs: list[EngineCoreOutput], *, weight_version: str | None = None, **named: Any
    ) -> OutputProcessorOutput:
        """Hold outputs back, or pass them on; replaces `OutputProcessor.process_outputs`."""
        if weight_version != self._version:
            # No held output ends its sequence or needs a search for stop strings, so the processor returns nothing.
            self._process([_joined(parts) for parts in self._held.values()], weight_version=self._version, **named)
            self._held.clear()
            self._version = weight_version
        ready = []
        for output in outputs:
            parts = self._held.get(output.request_id)
            if parts is not None:
                parts.append(output)
                if output.finish_reason is not None or len(parts) == MOST_HELD:
                    ready.append(_joined(self._held.pop(output.request_id)))
            elif output.finish_reason is None and self._can_wait(output.request_id):
                self._held[output.request_id] = [output]
            else:
                ready.append(output)
        return self._process(ready, weight_version=weight_version, **named)

    def _can_wait(self, request_id: str) -> bool:
        state = self._processor.request_states.get(request_id)
        return state is not None and type(state.detokenizer) is IncrementalDetokenizer


def _joined(parts: Sequence[EngineCoreOutput]) -> EngineCoreOutput:
    """Join consecutive outputs of a sequence into the last one, which is changed and returned."""
    last = parts[-1]
    if len(parts) > 1:
        last.new_token_ids = list(chain.from_iterable(part.new_token_ids for part in parts))
        logprobs = [part.new_logprobs for part in parts if part.new_logprobs is not None]
        last.new_logprobs = _joined_logprobs(logprobs) if logprobs else None
        last.prefill_stats = parts[0].prefill_stats
    return last


def _joined_logprobs(parts: Sequence[LogprobsLists]) -> LogprobsLists:
    # A step has columns for the request that asked for most of them, so further columns belong to other requests.
    width = min(part.logprobs.shape[1] for part in parts)
    return LogprobsLists(
        logprob_token_ids=np.concatenate([part.logprob_token_ids[:, :width] for part in parts]),
        logprobs=np.concatenate([part.logprobs[:, :width] for part in parts]),
        sampled_token_ranks=np.concatenate([part.sampled_token_ranks for part in parts]),
    )
