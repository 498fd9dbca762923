"""Converts the batch of the benchmarks to the trajectory groups that a learner receives."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from benchmarks.parts.learner.work import GROUP_SIZE, Sequences
from buffer.trajectory import FinishReason, Trajectory, TrajectoryGroup, VersionSpan


def trajectory_groups(data: Sequences, behavior: list[NDArray[np.float32]]) -> list[TrajectoryGroup]:
    """The sequences in groups of one prompt each.

    Args:
        data: the batch.
        behavior: the behavior log-probabilities of each completion's tokens.
    """
    made = []
    for index in range(len(data.token_ids) // GROUP_SIZE):
        members = []
        for i in range(GROUP_SIZE * index, GROUP_SIZE * (index + 1)):
            mask = np.arange(len(data.token_ids[i])) >= data.prompt_lengths[i]
            logprobs = np.zeros(len(mask), dtype=np.float32)
            logprobs[mask] = behavior[i]
            members.append(
                Trajectory(
                    trajectory_id=f"{index}.0.{i}",
                    group_id=f"{index}.0",
                    prompt_id=index,
                    token_ids=data.token_ids[i].astype(np.int32),
                    loss_mask=mask,
                    behavior_logprobs=logprobs,
                    policy_versions=(VersionSpan(0, 0),),
                    reward=float(data.rewards[i]),
                    reward_breakdown={"answer": float(data.rewards[i])},
                    verdict="wrong",
                    finish_reason=FinishReason.STOP,
                    actor_id="actor-0",
                )
            )
        made.append(TrajectoryGroup(f"{index}.0", index, tuple(members)))
    return made


def completion_lengths(data: Sequences) -> list[int]:
    """Number of tokens of each completion."""
    return [len(ids) - prompt for ids, prompt in zip(data.token_ids, data.prompt_lengths, strict=True)]


def split_by_completion(data: Sequences, logprobs: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    """Splits the log-probabilities of all scored tokens into one array per completion."""
    return np.split(logprobs, np.cumsum(completion_lengths(data))[:-1])
