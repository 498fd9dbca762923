"""Completions of a prompt, and how prompt, completions and scores become one group of trajectories."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

import verifier.base
from actors.tasks.task import Problem, Task
from buffer.curriculum_config import Stage, prompts_of
from buffer.trajectory import FinishReason, Trajectory, TrajectoryGroup, VersionSpan
from verifier.base import Score

if TYPE_CHECKING:
    from actors.engine.engine import SampledCompletion


class PromptsTooLongError(ValueError):
    """No prompt of the task leaves room for an answer in the model's context."""


class TextTokenizer(Protocol):
    """The part of a Hugging Face tokenizer that a rollout uses."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the token ids of `text`."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Return the text of `token_ids`."""

    def get_added_vocab(self) -> dict[str, int]:
        """Return the ids of the special and added tokens, by their text."""


class Completion:
    """The tokens after a prompt: the turns that the policy sampled, and the environment's observations between them."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.loss_mask: list[bool] = []
        """True on sampled tokens, False on observations."""
        self.logprobs: list[float] = []
        """Behavior log-probability (log mu) of each sampled token; 0 on observations."""
        self.versions: list[VersionSpan] = []
        """(start, version) spans: starts are positions in `token_ids`, and neighbors differ in version."""
        self.finish_reason = FinishReason.STOP
        """Finish reason of the last turn; LENGTH also when the context has no room for another turn."""
        self.num_turns = 0

    @property
    def num_tokens(self) -> int:
        """Sampled and observed tokens."""
        return len(self.token_ids)

    @property
    def num_sampled(self) -> int:
        """Sampled tokens."""
        return sum(self.loss_mask)

    def append_turn(self, choice: SampledCompletion) -> None:
        """Append the tokens of a turn exactly as they were sampled, with the token that ended the turn."""
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
        """Append tokens of the environment, which are not trained on."""
        self.token_ids += token_ids
        self.loss_mask += [False] * len(token_ids)
        self.logprobs += [0.0] * len(token_ids)


def single_turn(choice: SampledCompletion) -> Completion:
    """Make a completion of one turn."""
    completion = Completion()
    completion.append_turn(choice)
    return completion


def completions_to_score(
    problem: Problem, sampled: Sequence[SampledCompletion], tokenizer: TextTokenizer, prefill: str = ""
) -> list[verifier.base.Completion]:
    """Return completions as the verifier reads them: text without special tokens, gold, whether the text is truncated.

    The text begins with `prefill`, the part of the template that starts every answer.
    """
    return [
        verifier.base.Completion(
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
    completions: Sequence[Completion],
    scores: Sequence[Score],
    actor_id: str,
) -> TrajectoryGroup:
    """Build the group to deliver. The loss mask is False on prompt and observations; log mu is 0 there."""
    now = time.time()
    return TrajectoryGroup(
        group_id,
        problem.prompt_id,
        tuple(
            Trajectory(
                trajectory_id=f"{group_id}.{index}",
                group_id=group_id,
                prompt_id=problem.prompt_id,
                token_ids=np.array([*prompt_ids, *completion.token_ids], dtype=np.int32),
                loss_mask=np.array([False] * len(prompt_ids) + completion.loss_mask, dtype=np.bool_),
                behavior_logprobs=np.array([0.0] * len(prompt_ids) + completion.logprobs, dtype=np.float32),
                policy_versions=_spans(completion.versions, offset=len(prompt_ids)),
                reward=score.reward,
                reward_breakdown=score.breakdown,
                verdict=score.verdict.value,
                finish_reason=completion.finish_reason,
                num_turns=completion.num_turns,
                actor_id=actor_id,
                created_at=now,
            )
            for index, (completion, score) in enumerate(zip(completions, scores, strict=True))
        ),
    )


def split_stops(stop: Sequence[str], tokenizer: TextTokenizer) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Split `stop` into (stop strings, stop token ids).

    Special tokens stop by id, because they do not appear in the decoded text.
    """
    special = tokenizer.get_added_vocab()
    return (
        tuple(text for text in stop if text not in special),
        tuple(special[text] for text in stop if text in special),
    )


def _spans(versions: Sequence[VersionSpan], offset: int) -> tuple[VersionSpan, ...]:
    """Return spans with starts counted from the start of the prompt and versions that never decrease.

    After a rollback of the learner, a completion continues with an older version. The earlier tokens then get the older
    version too, so that staleness is never understated.
    """
    oldest_from_here: list[VersionSpan] = []
    for span in reversed(versions):
        version = min(span.version, oldest_from_here[-1].version) if oldest_from_here else span.version
        oldest_from_here.append(VersionSpan(offset + span.start, version))
    return tuple(reversed(oldest_from_here))


def check_prompts_fit(
    task: Task, tokenizer: TextTokenizer, *, max_tokens: int, max_new_tokens: int, stages: Sequence[Stage] = ()
) -> None:
    """Refuse a task without a single prompt that leaves room for an answer: every lease would be returned.

    Args:
        task: its training problems are checked.
        tokenizer: the model's.
        max_tokens: the model's context length, in tokens.
        max_new_tokens: largest number of tokens of a completion.
        stages: the curriculum; the problems of each stage are checked separately.

    Raises:
        PromptsTooLongError: with the length of the shortest prompt and the way out.
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
        # Usually the first prompt returns here.
        if shortest + max_new_tokens <= max_tokens:
            return
    raise PromptsTooLongError(
        f"none of the {len(problems)} training prompts{where} leaves room for max_new_tokens={max_new_tokens} in"
        f" model.max_tokens={max_tokens}: the shortest has {shortest} tokens; raise model.max_tokens or lower"
        " max_new_tokens"
    )


def task_prompt_ids(task: Task, problem: Problem, tokenizer: TextTokenizer) -> list[int]:
    """Encode the prompt as token ids.

    The tokenizer adds no special tokens, because templates contain them as text.
    """
    return tokenizer.encode(task.prompt(problem), add_special_tokens=False)
