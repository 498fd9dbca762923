"""What vLLM's engine does for every token of every sequence, done once for many tokens.

With hundreds of short sequences and a small model that is an eighth of a step. `patch_for_cpu` puts the shortcuts into
an engine of this process; what comes out of it stays the same.
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
"""Outputs of one sequence that are held back, of a kilobyte each."""
DECODING = {"num_lookahead_tokens": 0}
"""What the scheduler asks a running sequence's slots with, beside the number of tokens."""


def patch_for_cpu(llm: LLMEngine) -> None:
    """Put the shortcuts into `llm`, which has no request yet."""
    core: Any = llm.engine_core
    keep_blocks(core.engine_core.scheduler.kv_cache_manager)
    processor: Any = llm.output_processor
    processor.process_outputs = HeldOutputs(processor).process_outputs


def keep_blocks(manager: KVCacheManager) -> None:
    """Look for free blocks of the key-value cache only when a sequence has filled its last one.

    Where blocks are shared or given back while a sequence goes on nothing is changed.
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
    """Holds what the engine's steps put out back from vLLM's output processor until it is needed.

    That is when the sequence ends, when it has `MOST_HELD` outputs, and before other weights sample. Those of sequences
    in whose text stop strings are looked for are never held back. For requests that ask for their last output alone.
    """

    def __init__(self, processor: OutputProcessor) -> None:
        self._processor, self._process = processor, processor.process_outputs
        self._held: dict[str, list[EngineCoreOutput]] = {}
        self._version: str | None = None
        """Of the weights that sampled what is held."""

    def process_outputs(
        self, outputs: list[EngineCoreOutput], *, weight_version: str | None = None, **named: Any
    ) -> OutputProcessorOutput:
        """In the place of the processor's own."""
        if weight_version != self._version:
            # None of them ends its sequence or looks for a stop string, so nothing comes of them yet.
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
    """One output of consecutive ones of a sequence; changes the last of them."""
    last = parts[-1]
    if len(parts) > 1:
        last.new_token_ids = list(chain.from_iterable(part.new_token_ids for part in parts))
        logprobs = [part.new_logprobs[:3] for part in parts if part.new_logprobs is not None]
        last.new_logprobs = LogprobsLists(*map(np.concatenate, zip(*logprobs, strict=True))) if logprobs else None
        last.prefill_stats = parts[0].prefill_stats
    return last
