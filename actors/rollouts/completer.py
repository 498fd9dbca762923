"""Samples the completions of one prompt and scores them."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from actors.config import ActorConfig
from actors.metrics import Meter
from actors.rollouts.episode import run_episode
from actors.rollouts.trajectories import Completion, TextTokenizer, completions_to_score, single_turn, split_stops
from actors.tasks.task import Problem, Task
from verifier.base import Score
from verifier.scoring.pool import ScoringPool

if TYPE_CHECKING:
    from actors.engine.engine import Engine, SampledCompletion


class Completer:
    """Completes prompts of one task, several at a time.

    Args:
        config: context length and seed.
        task: the prompts' task.
        tokenizer: the model's.
        engine: a started engine.
        pool: scores completions; None for a multi-turn task, whose environment gives the rewards.
        meter: counts the requests in the engine.
    """

    def __init__(
        self,
        config: ActorConfig,
        task: Task,
        tokenizer: TextTokenizer,
        engine: Engine,
        pool: ScoringPool | None,
        meter: Meter,
    ) -> None:
        self._config, self._task, self._tokenizer = config, task, tokenizer
        self._engine, self._pool, self._meter = engine, pool, meter
        self._stop, self._stop_token_ids = split_stops(task.stop, tokenizer)

    def most_tokens(self, max_new_tokens: int) -> int:
        """Return the largest number of tokens of one completion, over all its turns."""
        turns = self._task.max_turns if self._task.is_multi_turn else 1
        return min(turns * max_new_tokens, self._config.max_tokens)

    async def complete(
        self,
        problem: Problem,
        prompt_ids: list[int],
        request_id: str,
        *,
        seed_key: str,
        num_samples: int,
        temperature: float,
        max_new_tokens: int,
        seeded: bool,
    ) -> list[tuple[Completion, Score]]:
        """Sample completions of one prompt and score them.

        A single-turn task samples all completions in one request and grades them. A multi-turn task runs an episode per
        completion.

        Args:
            problem: the prompt's problem.
            prompt_ids: token ids of the prompt.
            request_id: unique among the requests in flight.
            seed_key: input of the seeds; the completions of one prompt still get different seeds.
            num_samples: number of completions.
            temperature: sampling temperature.
            max_new_tokens: largest number of tokens of a completion, or of a turn.
            seeded: whether sampling is seeded. The randomness of an environment always is.
        """

        async def one_episode(index: int) -> tuple[Completion, Score]:
            async def sample(token_ids: Sequence[int], turn: int) -> SampledCompletion:
                [choice] = await self._sample(
                    token_ids,
                    f"{request_id}.{index}.{turn}",
                    num_samples=1,
                    temperature=temperature,
                    max_new_tokens=max_new_tokens,
                    seed=self._seed(seed_key, index, turn) if seeded else None,
                )
                return choice

            return await run_episode(
                self._task,
                problem,
                prompt_ids,
                self._tokenizer,
                sample,
                seed=self._seed(seed_key, index),
                max_new_tokens=max_new_tokens,
                max_tokens=self._config.max_tokens,
            )

        if self._task.is_multi_turn:
            return await asyncio.gather(*(one_episode(index) for index in range(num_samples)))
        sampled = await self._sample(
            prompt_ids,
            request_id,
            num_samples=num_samples,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            seed=self._seed(seed_key) if seeded else None,
        )
        prefill = self._task.template.prefill
        assert self._pool is not None
        scores = await self._pool.score_group(completions_to_score(problem, sampled, self._tokenizer, prefill))
        return [(single_turn(choice), score) for choice, score in zip(sampled, scores, strict=True)]

    async def _sample(
        self,
        prompt_ids: Sequence[int],
        request_id: str,
        *,
        num_samples: int,
        temperature: float,
        max_new_tokens: int,
        seed: int | None,
    ) -> list[SampledCompletion]:
        """Sample completions of one prompt with the engine. Cancelling the call aborts the request in the engine."""
        with self._meter.in_flight():
            return await self._engine.sample(
                prompt_ids,
                request_id=request_id,
                stop=self._stop,
                stop_token_ids=self._stop_token_ids,
                num_samples=num_samples,
                temperature=temperature,
                max_new_tokens=max_new_tokens,
                seed=seed,
            )

    def _seed(self, seed_key: str, *parts: int) -> int:
        """Derive a seed from `seed_key` and `parts`.

        Of a group id OCCURRENCE.ATTEMPT only the occurrence counts, so another attempt gets the same seed.
        """
        occurrence = seed_key.split(".", 1)[0]
        return zlib.crc32(":".join(map(str, (self._config.seed, occurrence, *parts))).encode())
