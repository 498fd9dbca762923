"""From a lease to a scored group: prompt, completions, scores, trajectories."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from actors.tasks.task import Problem, Task
from buffer.curriculum_config import Stage, prompts_of
from buffer.trajectory import FinishReason, Trajectory, TrajectoryGroup, VersionSpan
from verifier.base import Completion, Score

if TYPE_CHECKING:
    from actors.engine.engine import SampledCompletion


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


class Continuation:
    """What follows a prompt: the turns of the policy, and between them what an environment showed it."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.loss_mask: list[bool] = []
        """True on sampled tokens, False on observations."""
        self.logprobs: list[float] = []
        """log mu, 0 on observations."""
        self.versions: list[VersionSpan] = []
        """Runs of (start, version), starts counted within the continuation; neighbors differ."""
        self.finish_reason = FinishReason.STOP
        """Of the last turn; LENGTH too where the context had no room for another."""
        self.num_turns = 0

    @property
    def num_tokens(self) -> int:
        """Observations included."""
        return len(self.token_ids)

    @property
    def num_sampled(self) -> int:
        """Tokens that the policy sampled."""
        return sum(self.loss_mask)

    def append_turn(self, choice: SampledCompletion) -> None:
        """The tokens of a turn as they were sampled, the one that ended it included."""
        start = self.num_tokens
        self.token_ids += choice.token_ids.tolist()
        self.loss_mask += [True] * len(choice.token_ids)
        self.logprobs += choice.logprobs.tolist()
        for span in choice.versions:
            if not self.versions or span.version != self.versions[-1].version:
                self.versions.append(VersionSpan(start + span.start, span.version))
        self.finish_reason = choice.finish_reason
        self.num_turns += 1

    def append_observation(self, token_ids: Sequence[int]) -> None:
        """Tokens that the policy reads and did not write."""
        self.token_ids += token_ids
        self.loss_mask += [False] * len(token_ids)
        self.logprobs += [0.0] * len(token_ids)


def single_turn(choice: SampledCompletion) -> Continuation:
    """A completion in one turn."""
    continuation = Continuation()
    continuation.append_turn(choice)
    return continuation


def completions_to_score(
    problem: Problem, sampled: Sequence[SampledCompletion], tokenizer: TextTokenizer, prefill: str = ""
) -> list[Completion]:
    """What the verifier sees: text without special tokens, the gold, and whether the length limit cut it off.

    The template's `prefill`, with which the prompt began the answer, is part of that text.
    """
    return [
        Completion(
            text=prefill + tokenizer.decode(choice.token_ids.tolist(), skip_special_tokens=True),
            gold=problem.gold,
            truncated=choice.finish_reason is FinishReason.LENGTH,
            num_tokens=len(choice.token_ids),
        )
        for choice in sampled
    ]


def build_group(
    group_id: str,
    problem: Problem,
    prompt_ids: Sequence[int],
    continuations: Sequence[Continuation],
    scores: Sequence[Score],
    actor_id: str,
) -> TrajectoryGroup:
    """The group as it is sent: prompt and observations masked, every sampled token with log mu and its version."""
    now = time.time()
    return TrajectoryGroup(
        group_id,
        problem.prompt_id,
        tuple(
            Trajectory(
                trajectory_id=f"{group_id}.{index}",
                group_id=group_id,
                prompt_id=problem.prompt_id,
                token_ids=np.array([*prompt_ids, *continuation.token_ids], dtype=np.int32),
                loss_mask=np.array([False] * len(prompt_ids) + continuation.loss_mask, dtype=np.bool_),
                behavior_logprobs=np.array([0.0] * len(prompt_ids) + continuation.logprobs, dtype=np.float32),
                policy_versions=_spans(continuation.versions, offset=len(prompt_ids)),
                reward=score.reward,
                reward_breakdown=score.breakdown,
                verdict=score.verdict.value,
                finish_reason=continuation.finish_reason,
                num_turns=continuation.num_turns,
                actor_id=actor_id,
                created_at=now,
            )
            for index, (continuation, score) in enumerate(zip(continuations, scores, strict=True))
        ),
    )


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


def check_prompts_fit(
    task: Task, tokenizer: TextTokenizer, *, max_tokens: int, max_new_tokens: int, stages: Sequence[Stage] = ()
) -> None:
    """Refuse data of which not one prompt leaves room for an answer: every lease would be given back for ever.

    Args:
        task: the problems.
        tokenizer: the model's.
        max_tokens: the model's context.
        max_new_tokens: of a completion at most.
        stages: the curriculum; each is looked at by itself.

    Raises:
        PromptsTooLongError: with the shortest prompt's length and the way out.
    """
    if not stages:
        _check_any_fits(task, task.train, tokenizer, max_tokens, max_new_tokens, "")
    for number, stage in enumerate(stages, start=1):
        problems = [task.train[i] for i in prompts_of(stage, task.levels)]
        where = f" of curriculum stage {number}"
        _check_any_fits(task, problems, tokenizer, max_tokens, stage.max_new_tokens or max_new_tokens, where)


def _check_any_fits(
    task: Task, problems: Sequence[Problem], tokenizer: TextTokenizer, max_tokens: int, max_new_tokens: int, where: str
) -> None:
    shortest = math.inf
    for problem in problems:
        shortest = min(shortest, len(task_prompt_ids(task, problem, tokenizer)))
        # In sound data this is the first one.
        if shortest + max_new_tokens <= max_tokens:
            return
    raise PromptsTooLongError(
        f"none of the {len(problems)} training prompts{where} leaves room for max_new_tokens={max_new_tokens} in"
        f" model.max_tokens={max_tokens}: the shortest has {shortest} tokens; raise model.max_tokens or lower"
        " max_new_tokens"
    )


def task_prompt_ids(task: Task, problem: Problem, tokenizer: TextTokenizer) -> list[int]:
    """Token ids of the prompt; templates write special tokens out, so none are added."""
    return tokenizer.encode(task.prompt(problem), add_special_tokens=False)
