"""vLLM as the actor uses it: start, sample, load weights, close.

Many prompts are in flight at once. New weights are loaded in the middle of generation, and every completion says which
of its tokens each policy version sampled. Log-probabilities are those of the distribution that was sampled from, at the
sampling temperature.
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
from buffer.transport.messages import MOST_PROBED_TOKENS

if TYPE_CHECKING:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

MIN_BATCHED_TOKENS = 2048
"""Smallest token budget of one engine step on a CPU; a larger one speeds up neither prefill nor decoding."""
SHORT_CONTEXT, SMALL_BLOCK = 256, 32
"""Tokens. On a CPU, contexts of up to `SHORT_CONTEXT` use cache blocks of `SMALL_BLOCK`, the smallest size, because
larger blocks would stay half empty. Longer contexts are faster with vLLM's default block size of 128."""
SHUTDOWN_SECONDS = 10.0
"""Longest wait for the engine step under way when the actor ends."""
IN_THIS_PROCESS = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
"""Runs the worker in the actor's process. By default vLLM on a CPU starts a separate process, to set its number of
threads; the actor sets the number in its own environment."""
NO_VERSION = -1
"""Version of the weights that the engine starts with; no trajectory may come from them."""


@dataclass(frozen=True, slots=True, eq=False)
class SampledCompletion:
    """The tokens that the engine sampled in one request."""

    token_ids: NDArray[np.int32]
    """[T] int32, with the end-of-sequence token."""
    logprobs: NDArray[np.float32]
    """[T] float32: behavior log-probabilities (log mu)."""
    versions: tuple[VersionSpan, ...]
    """(start, version) spans; starts are positions in `token_ids`."""
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class ScoredTokens:
    """The log-probabilities of given tokens."""

    policy_version: int
    """The version of the weights, as the engine names it."""
    logprobs: tuple[float, ...]


class Engine:
    """One vLLM engine in its own thread. Call `start` first.

    Args:
        config: the actor's.
        transport: as `weights.transport`.
        rendezvous_seconds: as `weights.rendezvous_seconds`: longest wait until the NCCL group is complete.
        cores: cores for the engine thread and the threads that it starts; the actor's other threads may use any core.
            Empty: all cores.
    """

    def __init__(
        self,
        config: ActorConfig,
        transport: str = "file",
        rendezvous_seconds: float = 300.0,
        cores: Sequence[int] = (),
    ) -> None:
        self._config, self._transport = config, transport
        self._recomputes = config.kv_cache == "recompute"
        self._rendezvous_seconds = rendezvous_seconds
        self._joined: dict[str, Any] | None = None
        """The NCCL group that this engine is a member of."""
        self._thread = EngineThread(self._make, cores)

    def _make(self) -> LLMEngine:
        """Create vLLM's engine. Runs in the engine thread."""
        from vllm.platforms import current_platform

        if current_platform.is_cpu():
            # vLLM's sampler compiles two functions even in eager mode, which takes seconds and never pays off.
            torch._dynamo.config.disable = True
            os.environ["TORCH_COMPILE_DISABLE"] = "1"

        from vllm.v1.engine.llm_engine import LLMEngine
        from vllm.v1.executor import Executor

        from actors.engine.shortcuts import patch_for_cpu

        if current_platform.is_cpu():
            from actors.engine.cpu_memory import ignore_page_cache

            ignore_page_cache()
        settings = _engine_arguments(self._config, self._transport, current_platform.is_cpu()).create_engine_config()
        llm = LLMEngine(settings, Executor.get_class(settings), log_stats=False, multiprocess_mode=False)
        patch_for_cpu(llm)
        return llm

    async def start(self) -> None:
        """Wait until the engine is ready and warm it up."""
        await self._thread.call(lambda llm: llm.set_weight_version(str(NO_VERSION)))
        await self.sample([1, 2, 3], num_samples=1, temperature=1.0, max_new_tokens=4, request_id="warm-up")

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
        """Sample `num_samples` completions of one prompt. Waits for: the end of the last one."""
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
            # The actor decodes finished completions. vLLM needs the text only to find stop strings.
            detokenize=bool(stop),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        output = await self._thread.generate(request_id, prompt_ids, parameters)
        if len(output.outputs) != num_samples:
            raise RuntimeError(f"the engine returned no complete output for request {request_id}")
        return [_completion(choice) for choice in sorted(output.outputs, key=lambda choice: choice.index)]

    async def score(
        self, token_ids: Sequence[int], num_scored: int, temperature: float, request_id: str
    ) -> ScoredTokens | None:
        """Return the log-probabilities of the last `num_scored` tokens, each given those before it.

        Every token takes a request of its own, because vLLM does not apply the temperature to a prompt's
        log-probabilities. Returns None when weights were loaded in between.
        """
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        async def score_one(position: int) -> tuple[int, float]:
            token = token_ids[position]
            parameters = SamplingParams(
                temperature=temperature,
                max_tokens=1,
                logprobs=1,
                logprob_token_ids=[token],
                flat_logprobs=True,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            output = await self._thread.generate(f"{request_id}.{position}", token_ids[:position], parameters)
            [choice] = output.outputs
            # The sampled token comes first, the wanted one second.
            if choice.logprobs.token_ids[1] != token:
                raise RuntimeError(f"the engine scored token {choice.logprobs.token_ids[1]}, not {token}")
            return int(choice.weight_versions[0].version), choice.logprobs.logprobs[1]

        positions = range(len(token_ids) - num_scored, len(token_ids))
        scored = await asyncio.gather(*(score_one(position) for position in positions))
        versions, logprobs = zip(*scored, strict=True)
        return ScoredTokens(versions[0], logprobs) if len(set(versions)) == 1 else None

    async def load(self, weights: FetchedVersion) -> None:
        """Replace the weights in the middle of generation; tokens that are already sampled keep their version.

        Requests in flight are paused, not aborted, and continue with the new weights. With `actor.kv_cache=keep` they
        continue with their old key-value cache; with `recompute`, the new weights compute the cache again.

        Raises:
            RuntimeError: the NCCL group was not complete in time, or the engine failed.
        """
        async with self._rendezvous_timeout(weights):
            await self._thread.call(lambda llm: self._load(llm, weights))

    def _load(self, llm: LLMEngine, weights: FetchedVersion) -> None:
        self._thread.freeze(llm)
        if self._recomputes:
            # Every request returns to the waiting queue and loses its cache; none is aborted.
            llm.reset_prefix_cache(reset_running_requests=True)
        self._join(llm, weights.init_info())
        llm.collective_rpc("start_weight_update")
        llm.collective_rpc("update_weights", kwargs={"update_info": weights.update_info()})
        llm.collective_rpc("finish_weight_update")
        llm.set_weight_version(str(weights.policy_version))
        # Skipped after an error, because the error ends the actor.
        self._thread.thaw(llm)

    def _join(self, llm: LLMEngine, group: dict[str, Any] | None) -> None:
        """Join `group` and leave an earlier one. Does nothing if the engine is already in `group`. None: no group."""
        if group == self._joined:
            return
        if self._joined is not None:
            llm.collective_rpc("shutdown_weight_transfer_engine")
        llm.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": group or {}})
        self._joined = group

    @asynccontextmanager
    async def _rendezvous_timeout(self, weights: FetchedVersion) -> AsyncIterator[None]:
        """Give up the load after `rendezvous_seconds` if there is an NCCL group; without a group there is no limit."""
        if weights.init_info() is None:
            yield
            return
        seconds = self._rendezvous_seconds
        try:
            async with asyncio.timeout(seconds):
                yield
        except TimeoutError as error:
            raise RuntimeError(
                f"policy {weights.policy_version}: the learner's group was not complete within"
                f" weights.rendezvous_seconds={seconds}; it takes no members between two starts of the learner"
            ) from error

    async def reload_from_folder(self, folder: str) -> None:
        """Load a Hugging Face folder with vLLM's own loader, to compare the checksums."""
        await self._thread.call(lambda llm: self._reload(llm, folder))

    def _reload(self, llm: LLMEngine, folder: str) -> None:
        self._thread.freeze(llm)
        llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        self._thread.thaw(llm)

    async def checksums(self) -> dict[str, str]:
        """Return the digest of every parameter in the engine, by name, over all workers."""
        found: list[dict[str, str]] = await self._thread.call(
            lambda llm: llm.collective_rpc("compute_weight_checksums")
        )
        return {name: digest for worker in found for name, digest in worker.items()}

    async def is_responsive(self, seconds: float) -> bool:
        """Return whether the engine ends its present step within `seconds`; a hung one does not."""
        try:
            async with asyncio.timeout(seconds):
                await self._thread.call(lambda _: None)
        except TimeoutError:
            return False
        return True

    def close(self) -> None:
        """End the engine and its processes. Waits for: the step under way. Gives up after: `SHUTDOWN_SECONDS`."""
        self._thread.close(SHUTDOWN_SECONDS)


def _engine_arguments(config: ActorConfig, transport: str, on_cpu: bool) -> EngineArgs:
    from vllm.config import WeightTransferConfig
    from vllm.config.kernel import IrOpPriorityConfig
    from vllm.engine.arg_utils import EngineArgs

    kernels, executor = IrOpPriorityConfig(), None
    if on_cpu and config.tensor_parallel_size == 1:
        from actors.engine.cpu_kernels import use_fused_kernels

        kernels, executor = use_fused_kernels(), IN_THIS_PROCESS
    return EngineArgs(
        model=config.model_path,
        dtype=config.dtype,
        max_model_len=config.max_tokens,
        # A weight probe never waits for the rollouts to end.
        max_num_seqs=config.max_groups_in_flight * config.samples_per_group + MOST_PROBED_TOKENS,
        tensor_parallel_size=config.tensor_parallel_size,
        gpu_memory_utilization=config.gpu_memory_utilization,
        # On a CPU, compilation costs a run more time than it saves.
        enforce_eager=on_cpu,
        # A chunked prompt of a request with a seed ends vLLM's CPU worker, which cannot set the generators back.
        enable_chunked_prefill=not on_cpu,
        max_num_batched_tokens=max(config.max_tokens, MIN_BATCHED_TOKENS) if on_cpu else None,
        logprobs_mode="processed_logprobs",
        seed=config.seed,
        # A prefix that one version computed must not serve a later version.
        enable_prefix_caching=False,
        disable_log_stats=True,
        weight_transfer_config=WeightTransferConfig(backend=BACKENDS[transport]),
        worker_extension_cls=WORKER_EXTENSION,
        block_size=SMALL_BLOCK if on_cpu and config.max_tokens <= SHORT_CONTEXT else None,
        ir_op_priority=kernels,
        distributed_executor_backend=executor,
    )


def _completion(choice: object) -> SampledCompletion:
    token_ids = np.asarray(choice.token_ids, dtype=np.int32)  # type: ignore[attr-defined]
    flat = choice.logprobs  # type: ignore[attr-defined]
    # At each position the sampled token comes first. Rounding may leave its log-probability slightly above 0.
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
