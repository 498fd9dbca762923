"""The actor's side of `benchmarks/offpolicy.py`: the system's engine, prompts, verifier and trajectories."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Awaitable, Coroutine, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from transformers import AutoTokenizer

from actors.config import ActorConfig
from actors.engine.engine import Engine, SampledCompletion
from actors.engine.environment import prepare_environment
from actors.rollouts.trajectories import build_group, completions_to_score, single_turn, task_prompt_ids
from actors.tasks.task import Problem
from actors.weights.client import LocalWeights
from buffer.config import read_section
from buffer.ledger.prompt_order import epoch_order
from buffer.transport.messages import (
    Manifest,
)
from buffer.transport.packed_group import PackedGroup, pack_group
from launch.config.plan import RunPlan
from verifier.base import RewardSpec, Score, Verdict
from verifier.config import VerifierConfig
from verifier.scoring.pool import ScoringPool

Result = TypeVar("Result")


class Generator:
    """Samples and scores batches of any version. Engine and verifier are loaded once for all runs. A `Sampler`.

    Args:
        plan: the plan of any run of the study; model, task and sampling are the same in all of them.
    """

    def __init__(self, plan: RunPlan) -> None:
        run, self._task = plan.sections, plan.task
        self._config = read_section(ActorConfig, run["actor"], "actor")
        self._groups_per_batch = int(run["groups_per_batch"])
        prepare_environment(self._config)
        verifier = read_section(VerifierConfig, run["verifier"], "verifier")
        self._pool = ScoringPool([RewardSpec(**spec) for spec in run["reward"]], **asdict(verifier))
        self._tokenizer = AutoTokenizer.from_pretrained(self._config.model_path)
        self._runner = asyncio.Runner()
        self._engine = self._wait_for(self._start())
        self._base: dict[tuple[int, int], tuple[PackedGroup, ...]] = {}
        """Cached batches of version 0, which is the same in every run, by (seed, first occurrence)."""
        self._base_pass_at_1: float | None = None
        self.begin(0)

    async def _start(self) -> Engine:
        engine = Engine(self._config)
        await engine.start()
        return engine

    def begin(self, seed: int) -> None:
        """Begin a run. The seed decides the order of the prompts and the sampling."""
        prompts = np.arange(len(self._task.train))
        self._order = epoch_order(prompts, shuffle=True, seed=seed, stage=1, epoch=0).tolist()
        self._seed, self._loaded = seed, ""
        self._manifest: Manifest | None = None

    def load(self, manifest: Manifest) -> None:
        """Sample with this version from now on. Its weights are loaded when they are first needed."""
        self._manifest = manifest

    def groups(self, first_occurrence: int) -> tuple[PackedGroup, ...]:
        """Sample and score one batch: the prompts from `first_occurrence` on."""
        key = (self._seed, first_occurrence)
        if self._is_base and key in self._base:
            return self._base[key]
        occurrences = range(first_occurrence, first_occurrence + self._groups_per_batch)
        groups = tuple(self._wait_for(self._on_loaded([self._group(occurrence) for occurrence in occurrences])))
        if self._is_base:
            self._base[key] = groups
        return groups

    def evaluate(self) -> float:
        """Measure pass@1 on held-out prompts, with the same sampling seeds at every version and in every run."""
        if self._is_base and self._base_pass_at_1 is not None:
            return self._base_pass_at_1
        problems = self._task.held_out[: self._config.evaluation_prompts]
        correct = self._wait_for(self._on_loaded([self._is_solved(problem) for problem in problems]))
        share = sum(correct) / len(correct)
        if self._is_base:
            self._base_pass_at_1 = share
        return share

    @property
    def _is_base(self) -> bool:
        return self._manifest is not None and self._manifest.policy_version == 0

    def close(self) -> None:
        """End the engine and the verifier."""
        self._engine.close()
        self._pool.close()
        self._runner.close()

    async def _on_loaded(self, work: Sequence[Awaitable[Result]]) -> list[Result]:
        """Load the current version if needed, then run all of `work` at the same time."""
        assert self._manifest is not None
        if self._loaded != self._manifest.publication:
            await self._engine.load(LocalWeights(self._manifest, Path(self._manifest.path)))
            self._loaded = self._manifest.publication
        return list(await asyncio.gather(*work))

    async def _group(self, occurrence: int) -> PackedGroup:
        problem = self._task.train[self._order[occurrence % len(self._order)]]
        seed = zlib.crc32(f"{self._seed}:{occurrence}".encode())
        prompt_ids, sampled, scores = await self._complete(
            problem, str(occurrence), num_samples=self._config.samples_per_group, seed=seed
        )
        completions = [single_turn(choice) for choice in sampled]
        return pack_group(build_group(f"{occurrence}.0", problem, prompt_ids, completions, scores, "actor-0"))

    async def _is_solved(self, problem: Problem) -> bool:
        name = f"evaluation-{problem.prompt_id}"
        _, _, [score] = await self._complete(problem, name, num_samples=1, seed=zlib.crc32(name.encode()))
        return score.verdict is Verdict.CORRECT

    async def _complete(
        self, problem: Problem, name: str, *, num_samples: int, seed: int
    ) -> tuple[list[int], list[SampledCompletion], list[Score]]:
        prompt_ids = task_prompt_ids(self._task, problem, self._tokenizer)
        sampled = await self._engine.sample(
            prompt_ids,
            num_samples=num_samples,
            temperature=self._config.temperature,
            max_new_tokens=self._config.max_new_tokens,
            request_id=f"{self._loaded}-{name}",
            seed=seed,
        )
        return (
            prompt_ids,
            sampled,
            await self._pool.score_group(
                completions_to_score(problem, sampled, self._tokenizer, self._task.template.prefill)
            ),
        )

    def _wait_for(self, work: Coroutine[Any, Any, Result]) -> Result:
        return self._runner.run(work)
