"""vLLM behind four verbs: start, sample, load weights, stop.

Many prompts are in flight at once; new weights are loaded in the middle of generation and every completion comes back
with the runs of tokens that each policy version sampled. Log-probabilities are those of the distribution that was
sampled from, at the sampling temperature.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch._dynamo.config
from numpy.typing import NDArray

from actors.config import ActorConfig
from actors.engine.thread import EngineThread
from actors.weights.interface import FetchedVersion
from actors.weights.vllm_worker import BACKENDS, WORKER_EXTENSION
from buffer.trajectory import FinishReason, VersionSpan

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine

MIN_BATCHED_TOKENS = 2048
"""Tokens of one engine step on a CPU; more helps neither prefill nor decoding there."""
SHORT_CONTEXT, SMALL_BLOCK = 256, 32
"""Tokens. On a CPU contexts up to the first are cached in blocks of the second, the fewest there, which they do not
leave half empty; longer ones are faster in vLLM's own of 128."""
SHUTDOWN_SECONDS = 10.0
"""What an engine has in flight is worthless once its actor ends."""
IN_THIS_PROCESS = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
"""On a CPU vLLM gives its worker a process, to set its threads there; ours are set for all of them."""
NO_VERSION = -1
"""What the weights are called that the engine starts with; no trajectory may come from them."""


@dataclass(frozen=True, slots=True, eq=False)
class SampledCompletion:
    """What the engine sampled after a prompt."""

    token_ids: NDArray[np.int32]
    """[T] int32, the end-of-sequence token included."""
    logprobs: NDArray[np.float32]
    """[T] float32: log mu."""
    versions: tuple[VersionSpan, ...]
    """Runs of (start, version), starts counted within the completion."""
    finish_reason: FinishReason


class Engine:
    """One vLLM engine, in a thread of its own; `await engine.start()` before anything else.

    Args:
        config: the actor's.
        transport: how weights come, as `weights.transport` has it.
        meeting_seconds: how long a group that the weights are broadcast to may take to be complete.
        cores: the engine keeps to them; what feeds it goes where there is room. Empty: all.
    """

    def __init__(
        self,
        config: ActorConfig,
        transport: str = "file",
        meeting_seconds: float = 300.0,
        cores: Sequence[int] = (),
    ) -> None:
        self._config, self._transport = config, transport
        self._recomputes = config.kv_cache == "recompute"
        self._meeting_seconds = meeting_seconds
        self._joined: dict[str, Any] | None = None
        """The group that this engine is a member of."""
        self._thread = EngineThread(self._make, cores)

    def _make(self) -> LLMEngine:
        from vllm.platforms import current_platform

        config, on_cpu = self._config, current_platform.is_cpu()
        if on_cpu:
            # Two functions of vLLM's sampler are compiled even in eager mode, for seconds that they never save again.
            torch._dynamo.config.disable = True
            os.environ["TORCH_COMPILE_DISABLE"] = "1"

        from vllm.config import WeightTransferConfig
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine
        from vllm.v1.executor import Executor

        from actors.engine.shortcuts import patch_for_cpu

        if on_cpu:
            from actors.engine.cpu_memory import count_only_what_is_needed

            count_only_what_is_needed()
        cpu_settings: dict[str, Any] = {}
        if on_cpu and config.tensor_parallel_size == 1:
            from actors.engine.cpu_kernels import use_fused_kernels

            cpu_settings = {"ir_op_priority": use_fused_kernels(), "distributed_executor_backend": IN_THIS_PROCESS}
        arguments = EngineArgs(
            model=config.model_path,
            dtype=config.dtype,
            max_model_len=config.max_tokens,
            max_num_seqs=config.max_groups_in_flight * config.samples_per_group,
            tensor_parallel_size=config.tensor_parallel_size,
            gpu_memory_utilization=config.gpu_memory_utilization,
            # Compilation costs a CPU run more time than it saves it.
            enforce_eager=on_cpu,
            # A chunked prompt of a seeded request ends vLLM's CPU worker: its generators cannot be set back.
            enable_chunked_prefill=not on_cpu,
            max_num_batched_tokens=max(config.max_tokens, MIN_BATCHED_TOKENS) if on_cpu else None,
            logprobs_mode="processed_logprobs",
            seed=config.seed,
            # A prefix computed with one version must never serve another one.
            enable_prefix_caching=False,
            disable_log_stats=True,
            weight_transfer_config=WeightTransferConfig(backend=BACKENDS[self._transport]),
            worker_extension_cls=WORKER_EXTENSION,
            block_size=SMALL_BLOCK if on_cpu and config.max_tokens <= SHORT_CONTEXT else None,
            **cpu_settings,
        )
        settings = arguments.create_engine_config()
        llm = LLMEngine(settings, Executor.get_class(settings), log_stats=False, multiprocess_mode=False)
        patch_for_cpu(llm)
        return llm

    async def start(self) -> dict[str, str]:
        """Warm the engine up. Returns the checksums of the weights it has loaded from its folder."""
        await self._thread.call(lambda llm: llm.set_weight_version(str(NO_VERSION)))
        await self.sample([1, 2, 3], num_samples=1, temperature=1.0, max_new_tokens=4, request_id="warm-up")
        return await self.checksums()

    async def sample(
        self,
        prompt_ids: Sequence[int],
        *,
        num_samples: int,
        temperature: float,
        max_new_tokens: int,
        request_id: str,
        stop: Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        seed: int | None = None,
    ) -> list[SampledCompletion]:
        """`num_samples` completions of one prompt; waits until the last one ends."""
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        parameters = SamplingParams(
            n=num_samples,
            temperature=temperature,
            max_tokens=max_new_tokens,
            logprobs=0,
            flat_logprobs=True,
            seed=seed,
            stop=list(stop),
            stop_token_ids=list(stop_token_ids),
            # Text is made once, from the finished tokens; only stop strings need it while sampling.
            detokenize=bool(stop),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        output = await self._thread.generate(request_id, prompt_ids, parameters)
        if len(output.outputs) != num_samples:
            raise RuntimeError(f"the engine returned no complete output for request {request_id}")
        return [_completion(choice) for choice in sorted(output.outputs, key=lambda choice: choice.index)]

    async def load(self, weights: FetchedVersion) -> None:
        """Replace the weights in the middle of generation; sampled tokens keep their version.

        Requests in flight are frozen, not aborted. They go on with the new weights, and with their old key-value cache
        or, where the configuration says so, with one that the new weights compute from their tokens.
        """
        async with self._patience(weights):
            await self._thread.call(lambda llm: self._load(llm, weights))

    def _load(self, llm: LLMEngine, weights: FetchedVersion) -> None:
        self._thread.freeze(llm)
        if self._recomputes:
            # Every request goes back to the waiting queue without its cache, none is aborted.
            llm.reset_prefix_cache(reset_running_requests=True)
        self._join(llm, weights.init_info())
        llm.collective_rpc("start_weight_update")
        llm.collective_rpc("update_weights", kwargs={"update_info": weights.update_info()})
        llm.collective_rpc("finish_weight_update")
        llm.set_weight_version(str(weights.policy_version))
        # Not after an error, which ends the actor.
        self._thread.thaw(llm)

    def _join(self, llm: LLMEngine, group: dict[str, Any] | None) -> None:
        """Become a member of `group`, in the place of an earlier one. None: there is none."""
        if group == self._joined:
            return
        if self._joined is not None:
            llm.collective_rpc("shutdown_weight_transfer_engine")
        llm.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": group or {}})
        self._joined = group

    @asynccontextmanager
    async def _patience(self, weights: FetchedVersion) -> AsyncIterator[None]:
        """Gives up, where weights are broadcast to a group, after its `meeting_seconds`, with an error that says so."""
        if weights.init_info() is None:
            yield
            return
        seconds = self._meeting_seconds
        try:
            async with asyncio.timeout(seconds):
                yield
        except TimeoutError as error:
            raise RuntimeError(
                f"policy {weights.policy_version}: the learner's group was not complete within"
                f" weights.meeting_seconds={seconds}; it takes no members between two starts of the learner"
            ) from error

    async def reload_from_folder(self, folder: str) -> None:
        """Load a Hugging Face folder through vLLM's own loader, to compare checksums with."""
        await self._thread.call(lambda llm: self._reload(llm, folder))

    def _reload(self, llm: LLMEngine, folder: str) -> None:
        self._thread.freeze(llm)
        llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        self._thread.thaw(llm)

    async def checksums(self) -> dict[str, str]:
        """Digest of every parameter as the engine holds it, over all its workers."""
        found: list[dict[str, str]] = await self._thread.call(
            lambda llm: llm.collective_rpc("compute_weight_checksums")
        )
        return {name: digest for worker in found for name, digest in worker.items()}

    def close(self) -> None:
        """End the engine and its processes. Gives up after: `SHUTDOWN_SECONDS`."""
        self._thread.close(SHUTDOWN_SECONDS)


def _completion(choice: object) -> SampledCompletion:
    token_ids = np.asarray(choice.token_ids, dtype=np.int32)  # type: ignore[attr-defined]
    flat = choice.logprobs  # type: ignore[attr-defined]
    # The sampled token stands first at each position; rounding may lift its log-probability just above 0.
    logprobs = np.asarray([flat.logprobs[start] for start in flat.start_indices], dtype=np.float32)
    spans = choice.weight_versions  # type: ignore[attr-defined]
    if not spans:
        raise RuntimeError("the engine did not say which weights sampled its tokens")
    return SampledCompletion(
        token_ids=token_ids,
        logprobs=np.minimum(logprobs, 0.0),
        versions=tuple(VersionSpan(span.start, int(span.version)) for span in spans if span.end > span.start),
        finish_reason=FinishReason.LENGTH if choice.finish_reason == "length" else FinishReason.STOP,  # type: ignore[attr-defined]
    )
