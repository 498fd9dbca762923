"""The trajectory: one prompt with one sampled completion. A group holds all trajectories sampled together for a prompt.

Actors make trajectories, the buffer stores them, the learner trains on them. Both types are frozen and check their
fields when they are made, so a broken trajectory raises in the actor that made it and never reaches a loss. The buffer
applies the same rules, `check_tokens` and `check_versions`, to every group that it receives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_LOWEST_FLOAT32 = float(np.finfo(np.float32).min)


class FinishReason(StrEnum):
    """Why sampling ended. STOP: the end-of-sequence token or a stop string; LENGTH: a length limit."""

    STOP = "stop"
    LENGTH = "length"


class VersionSpan(NamedTuple):
    """Tokens from index `start` up to the next span were sampled by policy version `version`."""

    start: int
    """Index into `token_ids`."""
    version: int


@dataclass(frozen=True, slots=True, eq=False)
class Trajectory:
    """One prompt with one sampled completion, and what the learner needs for the off-policy correction.

    Raises:
        ValueError: when an array has the wrong type or length, the reward is not finite, or `check_tokens` or
            `check_versions` finds a broken rule.
    """

    trajectory_id: str
    group_id: str
    prompt_id: int
    token_ids: NDArray[np.int32]
    """[T] int32: prompt tokens, then completion tokens; with several turns, observation tokens between them."""
    loss_mask: NDArray[np.bool_]
    """[T] bool: True on tokens the policy sampled, False on prompt and observation tokens."""
    behavior_logprobs: NDArray[np.float32]
    """[T] float32: log mu of each sampled token, 0 where `loss_mask` is False."""
    policy_versions: tuple[VersionSpan, ...]
    """The version that sampled each token. Several spans: new weights were loaded during sampling."""
    reward: float
    reward_breakdown: dict[str, float]
    """The reward's terms, by name."""
    verdict: str
    """The verifier's verdict: correct, wrong, no_answer, truncated, timeout, crash or error."""
    finish_reason: FinishReason
    num_turns: int = 1
    actor_id: str = ""
    created_at: float = 0.0
    """Unix time in seconds, by the actor's clock. For display only."""

    def __post_init__(self) -> None:
        where = f"trajectory {self.trajectory_id}"
        _check_array(self.token_ids, np.int32, where, "token_ids")
        _check_array(self.loss_mask, np.bool_, where, "loss_mask")
        _check_array(self.behavior_logprobs, np.float32, where, "behavior_logprobs")
        lengths = (len(self.token_ids), len(self.loss_mask), len(self.behavior_logprobs))
        if len(set(lengths)) != 1:
            raise ValueError(
                f"{where}: token_ids, loss_mask and behavior_logprobs have lengths {lengths}; make them equal"
            )
        check_tokens(self.token_ids, self.loss_mask, self.behavior_logprobs, (0,), where)
        check_versions(self.policy_versions, self.num_tokens, where)
        if not math.isfinite(self.reward):
            raise ValueError(f"{where}: reward {self.reward} is not finite")

    @property
    def num_tokens(self) -> int:
        """T: prompt, completion and observation tokens."""
        return len(self.token_ids)

    @property
    def oldest_version(self) -> int:
        """The lowest version of any span; staleness counts from this version."""
        return self.policy_versions[0].version

    @property
    def token_versions(self) -> NDArray[np.int64]:
        """[T] int64: the version that sampled each token. Meaningless where `loss_mask` is False."""
        starts = [span.start for span in self.policy_versions]
        numbers = np.array([span.version for span in self.policy_versions], dtype=np.int64)
        runs = np.searchsorted(starts, np.arange(self.num_tokens), side="right") - 1
        versions: NDArray[np.int64] = numbers[np.maximum(runs, 0)]
        return versions

    @property
    def newest_version(self) -> int:
        """The highest version of any span."""
        return self.policy_versions[-1].version


def check_tokens(
    token_ids: NDArray[np.int32],
    loss_mask: NDArray[np.bool_],
    behavior_logprobs: NDArray[np.float32],
    starts: Sequence[int],
    where: str,
) -> None:
    """Check the token arrays of one trajectory, or of several concatenated ones at once.

    Args:
        token_ids, loss_mask, behavior_logprobs: [sum of T] as in `Trajectory`, of equal length and not empty.
        starts: the index of each trajectory's first token.
        where: names the trajectory in error messages.

    Raises:
        ValueError: when a mask selects no token or the first one, a token id is negative, or a log-probability is not
            finite, is above 0, or is not 0 where the mask is False.
    """
    if not np.logical_or.reduceat(loss_mask, starts).all():
        raise ValueError(f"{where}: loss_mask selects no token, so there is nothing to learn from")
    if loss_mask.take(starts).any():
        raise ValueError(f"{where}: its first token is in the loss mask, but no token precedes it to predict it from")
    if token_ids.min() < 0:
        raise ValueError(f"{where}: token id {token_ids.min()} is negative")
    # A NaN makes both comparisons false.
    if not (behavior_logprobs.max() <= 0 and behavior_logprobs.min() >= _LOWEST_FLOAT32):
        found = behavior_logprobs[~((behavior_logprobs <= 0) & np.isfinite(behavior_logprobs))][0]
        raise ValueError(f"{where}: behavior_logprobs must be finite and <= 0, found {found}")
    if (behavior_logprobs.astype(bool) > loss_mask).any():
        raise ValueError(f"{where}: behavior_logprobs must be 0 where loss_mask is False")


def check_versions(spans: Sequence[tuple[int, int]], num_tokens: int, where: str) -> None:
    """Check the (start, version) spans of a trajectory of `num_tokens` tokens. `where` names it in error messages.

    Raises:
        ValueError: when there is no span, the starts do not increase or lie outside the trajectory, or the versions
            decrease or are negative.
    """
    last_start, last_version = -1, 0
    in_order = True
    for start, version in spans:
        in_order = in_order and last_start < start and last_version <= version
        last_start, last_version = start, version
    if not in_order or not 0 <= last_start < num_tokens:
        raise ValueError(
            f"{where}: policy_versions {[tuple(span) for span in spans]} must be (start, version) spans whose starts"
            f" increase from 0 or more to less than {num_tokens} and whose versions are >= 0 and never decrease"
        )


def _check_array(array: NDArray[Any], dtype: Any, where: str, name: str) -> None:
    if array.ndim != 1 or array.dtype != dtype:
        raise ValueError(
            f"{where}: {name} is {array.dtype} of shape {array.shape}; it must be one-dimensional {np.dtype(dtype)}"
        )
    if not len(array):
        raise ValueError(f"{where}: {name} is empty")


@dataclass(frozen=True, slots=True, eq=False)
class TrajectoryGroup:
    """The trajectories sampled together for one prompt. Leases, deliveries and batches always concern whole groups.

    Raises:
        ValueError: when the group is empty, or a trajectory belongs to another group or prompt.
    """

    group_id: str
    prompt_id: int
    trajectories: tuple[Trajectory, ...]
    oldest_version: int = field(init=False)
    """The lowest version in any of the trajectories."""

    def __post_init__(self) -> None:
        if not self.trajectories:
            raise ValueError(f"group {self.group_id} holds no trajectory")
        for trajectory in self.trajectories:
            if trajectory.group_id != self.group_id or trajectory.prompt_id != self.prompt_id:
                raise ValueError(
                    f"trajectory {trajectory.trajectory_id} belongs to group {trajectory.group_id} and prompt"
                    f" {trajectory.prompt_id}, not to group {self.group_id} and prompt {self.prompt_id}"
                )
        object.__setattr__(self, "oldest_version", min(t.oldest_version for t in self.trajectories))

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all trajectories, prompts included."""
        return sum(t.num_tokens for t in self.trajectories)

    @property
    def rewards(self) -> tuple[float, ...]:
        """One reward per trajectory, in order of `trajectories`."""
        return tuple(t.reward for t in self.trajectories)
