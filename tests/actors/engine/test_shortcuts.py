"""vLLM's engine allocates the same blocks and returns the same outputs with the patches as without."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.detokenizer import IncrementalDetokenizer
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    SlidingWindowSpec,
)
from vllm.v1.outputs import LogprobsLists
from vllm.v1.request import Request

from actors.engine.shortcuts import MOST_HELD, HeldOutputs, keep_blocks

BLOCK = 4


def parameters(**more: Any) -> SamplingParams:
    return SamplingParams(
        logprobs=0, flat_logprobs=True, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY, **more
    )


# --- blocks ---


def manager(*specs: KVCacheSpec, caching: bool = False) -> KVCacheManager:
    groups = [KVCacheGroupSpec([f"layer {index}"], spec) for index, spec in enumerate(specs or [full()])]
    config = KVCacheConfig(num_blocks=24, kv_cache_tensors=[], kv_cache_groups=groups)
    return KVCacheManager(config, 64, BLOCK, BLOCK, enable_caching=caching)


def full() -> FullAttentionSpec:
    return FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)


def sliding() -> SlidingWindowSpec:
    return SlidingWindowSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32, sliding_window=BLOCK)


def scheduled(made: KVCacheManager, seed: int) -> list[object]:
    """The manager's answers to a scheduler that decodes, preempts and ends sequences at random."""
    rng, answers = random.Random(seed), []
    running: list[Request] = []
    for number in range(120):
        if len(running) < 6 and rng.random() < 0.3:
            prompt = [1] * rng.randint(1, 11)
            request = Request(f"r{number}", prompt, parameters(max_tokens=40), None)
            blocks = made.allocate_slots(request, len(prompt), full_sequence_must_fit=True)
            answers.append(blocks and blocks.get_block_ids())
            if blocks is not None:
                request.num_computed_tokens = len(prompt)
                running.append(request)
        for request in list(running):
            request.append_output_token_ids(7)
            blocks = made.allocate_slots(request, 1, num_lookahead_tokens=0)
            answers.append(blocks and blocks.get_block_ids())
            request.num_computed_tokens += 1
            if blocks is None or request.num_tokens > 40 or rng.random() < 0.05:
                made.free(request)
                running.remove(request)
        answers.append(made.block_pool.get_num_free_blocks())
    return answers


@pytest.mark.parametrize("seed", range(10))
def test_the_blocks_are_the_same(seed: int) -> None:
    shortened = manager()
    calls = counted(shortened)
    keep_blocks(shortened)

    answers = scheduled(shortened, seed)

    assert answers == scheduled(manager(), seed)
    assert None in answers, "the scheduler never ran out of blocks"
    assert len(calls) < len(answers) / 2


def counted(made: KVCacheManager) -> list[str]:
    """Grows with every call of the manager's original method."""
    calls, allocate = [], made.allocate_slots

    def allocate_slots(request: Request, *arguments: Any, **named: Any) -> Any:
        calls.append(request.request_id)
        return allocate(request, *arguments, **named)

    made.allocate_slots = allocate_slots  # type: ignore[method-assign]
    return calls


@pytest.mark.parametrize("made", [manager(caching=True), manager(sliding()), manager(full(), sliding())])
def test_a_cache_that_is_shared_or_given_back_is_left_alone(made: KVCacheManager) -> None:
    before = made.allocate_slots
    keep_blocks(made)
    assert made.allocate_slots == before


# --- outputs ---


class Sampled:
    """Random outputs of an engine's steps; equal seeds give equal outputs."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)

    def output(self, name: str, *, ends: FinishReason | None = None, num_tokens: int = 1) -> EngineCoreOutput:
        tokens = [self._rng.randrange(50) for _ in range(num_tokens)]
        # Some steps have further columns, for another request that asks for more log-probabilities.
        width = self._rng.choice([1, 1, 2])
        column = np.array([[token, *[0] * (width - 1)] for token in tokens], dtype=np.int64)
        logprobs = np.array([[-self._rng.random() for _ in range(width)] for _ in tokens], dtype=np.float32)
        ranks = np.array([self._rng.randrange(9) for _ in tokens], dtype=np.int64)
        return EngineCoreOutput(
            name, tokens, new_logprobs=LogprobsLists(column, logprobs, ranks) if tokens else None, finish_reason=ends
        )


def processor() -> OutputProcessor:
    return OutputProcessor(None, log_stats=False)


def add(made: OutputProcessor, name: str) -> None:
    request = EngineCoreRequest(name, [1, 2], None, parameters(), None, 0.0, None, None, None)
    request.external_req_id = name
    made.add_request(request, None)


def finished(result: Any) -> list[tuple[object, ...]]:
    return [
        (
            output.request_id,
            output.finished,
            choice.index,
            list(choice.token_ids),
            choice.logprobs.logprobs,
            choice.logprobs.token_ids,
            choice.logprobs.ranks,
            choice.logprobs.start_indices,
            choice.logprobs.end_indices,
            choice.cumulative_logprob,
            choice.weight_versions,
            choice.finish_reason,
        )
        for output in result.request_outputs
        for choice in output.outputs
    ]


def steps(made: OutputProcessor, process: Any, seed: int) -> list[list[tuple[object, ...]]]:
    """The outputs of an engine whose sequences begin, end and are aborted, and whose weights change."""
    rng, sampled = random.Random(seed), Sampled(seed)
    running: dict[str, int] = {}
    version, found = 0, []
    for number in range(300):
        if len(running) < 5:
            running[f"r{number}"] = rng.choice([1, 2, 5, MOST_HELD, MOST_HELD + 1, 3 * MOST_HELD])
            add(made, f"r{number}")
        if rng.random() < 0.02:
            version += 1
        outputs = []
        if rng.random() < 0.02:
            name = rng.choice(sorted(running))
            made.abort_requests([name], internal=True)
            # The step under way still returns a token of the aborted sequence.
            outputs.append(sampled.output(name))
            del running[name]
        for name in list(running):
            # Some sequences are not scheduled in this step.
            if rng.random() < 0.1:
                continue
            running[name] -= 1
            ends = None if running[name] > 0 else rng.choice([FinishReason.STOP, FinishReason.LENGTH])
            outputs.append(sampled.output(name, ends=ends))
            if ends is not None:
                del running[name]
        found.append(finished(process(outputs, engine_core_timestamp=None, weight_version=str(version))))
    return found


@pytest.mark.parametrize("seed", range(10))
def test_every_step_brings_the_same_outputs(seed: int) -> None:
    plain, shortened = processor(), processor()

    found = steps(shortened, HeldOutputs(shortened).process_outputs, seed)

    assert found == steps(plain, plain.process_outputs, seed)
    spans = [choice[-2] for step in found for choice in step]
    assert any(len(versions) > 1 for versions in spans), "no sequence had tokens of two versions"


def test_outputs_of_many_tokens_and_of_an_error_are_joined() -> None:
    plain, shortened = processor(), processor()
    held = HeldOutputs(shortened)
    results = []
    for made, process in ((plain, plain.process_outputs), (shortened, held.process_outputs)):
        sampled = Sampled(0)
        add(made, "a")
        process([sampled.output("a", num_tokens=3)], weight_version="1")
        process([sampled.output("a", num_tokens=2)], weight_version="1")
        results.append(
            finished(process([sampled.output("a", ends=FinishReason.ERROR, num_tokens=0)], weight_version="1"))
        )
    assert results[0] == results[1]
    assert len(results[0][0][3]) == 5  # type: ignore[arg-type]


def test_the_processor_works_once_for_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    made = processor()
    seen: list[int] = []
    process = made.process_outputs

    def spied(outputs: list[EngineCoreOutput], **named: Any) -> Any:
        seen.extend(len(output.new_token_ids) for output in outputs)
        return process(outputs, **named)

    monkeypatch.setattr(made, "process_outputs", spied)
    held, sampled = HeldOutputs(made), Sampled(0)
    add(made, "a")
    for _ in range(MOST_HELD + 3):
        held.process_outputs([sampled.output("a")], weight_version="1")
    held.process_outputs([sampled.output("a")], weight_version="2")
    held.process_outputs([sampled.output("a", ends=FinishReason.STOP)], weight_version="2")
    assert seen == [MOST_HELD, 3, 2]


def test_text_is_looked_at_after_every_token() -> None:
    """A stop string ends its sequence at once, and the engine is told to abort it."""

    class Spelling(IncrementalDetokenizer):
        def update(self, new_token_ids: list[int], stop_terminated: bool) -> str | None:
            super().update(new_token_ids, stop_terminated)
            return "stop" if len(self.token_ids) == 3 else None

    made = processor()
    held, sampled = HeldOutputs(made), Sampled(0)
    add(made, "a")
    made.request_states["a"].detokenizer = Spelling()
    results = [held.process_outputs([sampled.output("a")], weight_version="1") for _ in range(3)]
    assert [result.reqs_to_abort for result in results] == [[], [], ["a"]]
    assert finished(results[-1])[0][-1] == "stop"
