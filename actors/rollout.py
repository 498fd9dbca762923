"""From a lease to a scored group: prompt, completions, scores, trajectories."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from actors.prompts import Problem, Task
from buffer.trajectory import FinishReason, Trajectory, TrajectoryGroup, VersionSpan
from verifier.base import Completion, Score

if TYPE_CHECKING:
    from actors.engine import SampledCompletion


class PromptsTooLongError(ValueError):
    """No prompt of the task can be answered within the model's context."""


class TextTokenizer(Protocol):
    """What a rollout needs of a Hugging Face tokenizer."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of `text`."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Text of `token_ids`."""

    def get_added_vocab(self) -> dict[str, int]:
        """Special and added tokens with their ids."""


def completions_to_score(
    problem: Problem, sampled: Sequence[SampledCompletion], tokenizer: TextTokenizer
) -> list[Completion]:
    """What the verifier sees: text without special tokens, the gold, and whether the length limit cut it off."""
    return [
        Completion(
            text=tokenizer.decode(choice.token_ids.tolist(), skip_special_tokens=True),
            gold=problem.gold,
            truncated=choice.finish_reason is FinishReason.LENGTH,
        )
        for choice in sampled
    ]


def build_group(
    group_id: str,
    problem: Problem,
    prompt_ids: Sequence[int],
    sampled: Sequence[SampledCompletion],
    scores: Sequence[Score],
    actor_id: str,
) -> TrajectoryGroup:
    """The group as it is sent: prompt tokens masked, every completion token with log mu and its version."""
    prompt = np.asarray(prompt_ids, dtype=np.int32)
    now = time.time()
    trajectories = []
    for index, (choice, score) in enumerate(zip(sampled, scores, strict=True)):
        loss_mask = np.zeros(len(prompt) + len(choice.token_ids), dtype=np.bool_)
        loss_mask[len(prompt) :] = True
        behavior_logprobs = np.zeros(len(loss_mask), dtype=np.float32)
        behavior_logprobs[len(prompt) :] = choice.logprobs
        trajectories.append(
            Trajectory(
                trajectory_id=f"{group_id}.{index}",
                group_id=group_id,
                prompt_id=problem.prompt_id,
                token_ids=np.concatenate([prompt, choice.token_ids]),
                loss_mask=loss_mask,
                behavior_logprobs=behavior_logprobs,
                policy_versions=_spans(choice.versions, offset=len(prompt)),
                reward=score.reward,
                reward_breakdown=score.breakdown,
                verdict=score.verdict.value,
                finish_reason=choice.finish_reason,
                actor_id=actor_id,
                created_at=now,
            )
        )
    return TrajectoryGroup(group_id, problem.prompt_id, tuple(trajectories))


def split_stops(stop: Sequence[str], tokenizer: TextTokenizer) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """(strings to look for in the text, ids of special tokens, which never show in the text)."""
    special = tokenizer.get_added_vocab()
    return (
        tuple(text for text in stop if text not in special),
        tuple(special[text] for text in stop if text in special),
    )


def _spans(versions: Sequence[VersionSpan], offset: int) -> tuple[VersionSpan, ...]:
    """Spans counted from the start of the prompt, never decreasing.

    After a rollback of the learner a completion goes on with an older version. Its earlier tokens then count as that
    old too: staleness is never understated.
    """
    oldest_from_here: list[VersionSpan] = []
    for span in reversed(versions):
        version = min(span.version, oldest_from_here[-1].version) if oldest_from_here else span.version
        oldest_from_here.append(VersionSpan(offset + span.start, version))
    return tuple(reversed(oldest_from_here))


def check_prompts_fit(task: Task, tokenizer: TextTokenizer, *, max_tokens: int, max_new_tokens: int) -> None:
    """Refuse data of which not one prompt leaves room for an answer: every lease would be given back for ever.

    Raises:
        PromptsTooLongError: with the shortest prompt's length and the way out.
    """
    shortest = math.inf
    for problem in task.train:
        shortest = min(shortest, len(task_prompt_ids(task, problem, tokenizer)))
        # In sound data this is the first one.
        if shortest + max_new_tokens <= max_tokens:
            return
    raise PromptsTooLongError(
        f"none of the {len(task.train)} training prompts leaves room for max_new_tokens={max_new_tokens} in"
        f" model.max_tokens={max_tokens}: the shortest has {shortest} tokens; raise model.max_tokens or lower"
        " max_new_tokens"
    )


def task_prompt_ids(task: Task, problem: Problem, tokenizer: TextTokenizer) -> list[int]:
    """Token ids of the prompt; templates write special tokens out, so none are added."""
    return tokenizer.encode(task.prompt(problem), add_special_tokens=False)
