"""Evaluates one version on the held-out prompts, with one completion each.

Owned by `actors/actor.py`, which keeps the version in the engine meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import numpy as np

import verifier.base
from actors.config import ActorConfig
from actors.rollouts.completer import Completer
from actors.rollouts.deadlines import GroupDeadlines, OverdueError
from actors.rollouts.trajectories import TextTokenizer, task_prompt_ids
from actors.tasks.task import Problem, Task
from verifier.base import Verdict
from verifier.scoring.pool import ScoringPool

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Results:
    """Means over the held-out prompts."""

    num_prompts: int
    pass_at_1: float
    reward_mean: float
    completion_tokens_mean: float


class Evaluator:
    """Runs one evaluation at a time.

    Args:
        config: of the actor.
        task: the held-out prompts.
        tokenizer: the model's.
        pool: scores completions; None for a multi-turn task.
        completer: samples and scores.
        check_engine: called when the named work took too long; raises if the engine is hung.
        clock: seconds of a monotonic clock.
    """

    def __init__(
        self,
        config: ActorConfig,
        task: Task,
        tokenizer: TextTokenizer,
        pool: ScoringPool | None,
        completer: Completer,
        check_engine: Callable[[str], Awaitable[None]],
        clock: Callable[[], float],
    ) -> None:
        self._config, self._task, self._tokenizer, self._pool = config, task, tokenizer, pool
        self._completer, self._check_engine, self._clock = completer, check_engine, clock
        self._deadlines: GroupDeadlines | None = None
        """Of the evaluation under way."""

    def check(self) -> None:
        """Cancel the work on all prompts whose time is over."""
        if self._deadlines is not None:
            self._deadlines.check()

    async def evaluate(self, version: int) -> Results:
        """Evaluate the weights in the engine, which are those of `version`."""
        problems = self._task.held_out[: self._config.evaluation_prompts]
        deadlines = self._deadlines = GroupDeadlines(self._config.sample_timeout_seconds, self._clock)
        results = await asyncio.gather(*(self._evaluate_one(problem, version, deadlines) for problem in problems))
        self._deadlines = None
        rewards, correct, lengths = np.array(results).T
        return Results(len(results), float(correct.mean()), float(rewards.mean()), float(lengths.mean()))

    async def _evaluate_one(
        self, problem: Problem, version: int, deadlines: GroupDeadlines
    ) -> tuple[float, float, float]:
        """Return the reward, 1 for a correct answer, and the number of sampled tokens."""
        prompt_ids = task_prompt_ids(self._task, problem, self._tokenizer)
        if len(prompt_ids) >= self._config.max_tokens:
            # The prompt does not fit the context. It counts as wrong: leaving it out would overstate pass@1.
            if self._task.is_multi_turn:
                return 0.0, 0.0, 0.0
            assert self._pool is not None
            [score] = await self._pool.score_group(
                [verifier.base.Completion(text="", gold=problem.gold, truncated=True)]
            )
            return score.reward, 0.0, 0.0
        max_new_tokens = self._config.evaluation_max_new_tokens or self._config.max_new_tokens
        work = self._completer.complete(
            problem,
            prompt_ids,
            f"evaluation-{version}-{problem.prompt_id}",
            # Use the same seeds at every version, so that the curve shows only the policy's changes.
            seed_key=f"evaluation-{problem.prompt_id}",
            num_samples=1,
            temperature=self._config.evaluation_temperature,
            max_new_tokens=max_new_tokens,
            seeded=True,
        )
        try:
            [(completion, score)] = await deadlines.complete(work, self._completer.most_tokens(max_new_tokens))
        except OverdueError as error:
            logger.warning("held-out prompt %d took %s; it counts as wrong", problem.prompt_id, error)
            await self._check_engine(f"held-out prompt {problem.prompt_id}")
            return 0.0, 0.0, 0.0
        return score.reward, float(score.verdict is Verdict.CORRECT), float(completion.num_sampled)
