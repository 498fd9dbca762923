"""A rank's shard of a batch as flat tensors, and the cuts that are made in it.

Scored tokens (those with `loss_mask` True) of all trajectories lie on one axis [M], in trajectory order. Everything
that is per token (log-probabilities, advantages, values) lives on it. A microbatch is a run of whole trajectories that
fits a token budget; its scored tokens are a slice of [M].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from buffer.trajectory import Trajectory, TrajectoryGroup


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Packed sequences of one forward pass, and where their scored tokens lie in the batch."""

    token_ids: Tensor
    """[N] int64."""
    position_ids: Tensor
    """[N] int64, restarting at 0 with every sequence."""
    boundaries: tuple[int, ...]
    """Start offset of every sequence, and N."""
    targets: Tensor
    """[m] int64: indices into N of the scored tokens."""
    scored: slice
    """The same tokens on the batch's axis [M]."""


@dataclass(frozen=True, slots=True)
class TrainingBatch:
    """One rank's share of a batch: whole groups, in issue order."""

    policy_version: int
    trajectories: tuple[Trajectory, ...]
    staleness: tuple[int, ...]
    """Versions, one per group, as computed by the buffer when it handed the batch out."""
    group_index: Tensor
    """[num_sequences] int64."""
    sequence_index: Tensor
    """[M] int64: the trajectory of each scored token."""
    rewards: Tensor
    """[num_sequences] float32."""
    behavior_logprobs: Tensor
    """[M] float32."""
    token_versions: Tensor
    """[M] int64: the version that sampled each token."""
    of_one_version: Tensor
    """[M] bool: whether one version sampled the whole trajectory."""

    @classmethod
    def from_groups(
        cls, groups: Sequence[TrajectoryGroup], staleness: Sequence[int], policy_version: int, device: torch.device
    ) -> TrainingBatch:
        """Flatten the groups; tensors land on `device`."""
        trajectories = tuple(trajectory for group in groups for trajectory in group.trajectories)
        group_index = [index for index, group in enumerate(groups) for _ in group.trajectories]
        lengths = [int(t.loss_mask.sum()) for t in trajectories]
        behavior = np.concatenate([t.behavior_logprobs[t.loss_mask] for t in trajectories])
        versions = np.concatenate([_versions(t)[t.loss_mask] for t in trajectories])
        return cls(
            policy_version=policy_version,
            trajectories=trajectories,
            staleness=tuple(staleness),
            group_index=torch.tensor(group_index, device=device),
            sequence_index=torch.repeat_interleave(torch.tensor(lengths)).to(device),
            rewards=torch.tensor([t.reward for t in trajectories], dtype=torch.float32, device=device),
            behavior_logprobs=torch.from_numpy(behavior).to(device),
            token_versions=torch.from_numpy(versions).to(device),
            of_one_version=torch.repeat_interleave(
                torch.tensor([len(t.policy_versions) == 1 for t in trajectories]), torch.tensor(lengths)
            ).to(device),
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of the forward pass, prompts included."""
        return sum(t.num_tokens for t in self.trajectories)

    @property
    def num_scored_tokens(self) -> int:
        """M."""
        return len(self.sequence_index)

    def split(self, num_parts: int) -> list[range]:
        """Trajectory ranges of `num_parts` minibatches of equally many groups."""
        num_groups = len(self.staleness)
        firsts = [0, *(np.flatnonzero(np.diff(self.group_index.cpu().numpy())) + 1).tolist(), len(self.trajectories)]
        per_part = num_groups // num_parts
        return [range(firsts[i * per_part], firsts[(i + 1) * per_part]) for i in range(num_parts)]

    def microbatches(self, part: range, tokens_per_microbatch: int) -> list[MicroBatch]:
        """Whole trajectories of `part`, in order, packed up to the token budget; a longer one stands alone."""
        cuts, used = [part.start], 0
        for index in part:
            length = self.trajectories[index].num_tokens
            if used and used + length > tokens_per_microbatch:
                cuts.append(index)
                used = 0
            used += length
        cuts.append(part.stop)
        return [self._pack(range(start, stop)) for start, stop in pairwise(cuts)]

    def scored_slice(self, part: range) -> slice:
        """Where the scored tokens of the trajectories in `part` lie on [M]."""
        bounds = torch.searchsorted(self.sequence_index, torch.tensor([part.start, part.stop]).to(self.device))
        return slice(int(bounds[0]), int(bounds[1]))

    @property
    def device(self) -> torch.device:
        """Where the tensors live."""
        return self.sequence_index.device

    def _pack(self, part: range) -> MicroBatch:
        chosen = self.trajectories[part.start : part.stop]
        lengths = [t.num_tokens for t in chosen]
        boundaries = np.concatenate([[0], np.cumsum(lengths)])
        token_ids = np.concatenate([t.token_ids for t in chosen]).astype(np.int64)
        positions = np.concatenate([np.arange(length) for length in lengths])
        targets = np.flatnonzero(np.concatenate([t.loss_mask for t in chosen]))
        return MicroBatch(
            token_ids=torch.from_numpy(token_ids).to(self.device),
            position_ids=torch.from_numpy(positions).to(self.device),
            boundaries=tuple(boundaries.tolist()),
            targets=torch.from_numpy(targets).to(self.device),
            scored=self.scored_slice(part),
        )


def occurrence_ranges(groups: Sequence[TrajectoryGroup]) -> str:
    """The prompt occurrences of `groups` (what stands before the dot of a group_id) for a log: `3-5,9`."""
    numbers = {int(group.group_id.partition(".")[0]) for group in groups}
    starts = sorted(number for number in numbers if number - 1 not in numbers)
    ends = sorted(number for number in numbers if number + 1 not in numbers)
    return ",".join(f"{start}-{end}" if end > start else f"{start}" for start, end in zip(starts, ends, strict=True))


def _versions(trajectory: Trajectory) -> NDArray[np.int64]:
    """[T] the version that sampled each token; meaningless where the loss mask is False."""
    starts = [span.start for span in trajectory.policy_versions]
    numbers = np.array([span.version for span in trajectory.policy_versions], dtype=np.int64)
    runs = np.searchsorted(starts, np.arange(trajectory.num_tokens), side="right") - 1
    versions: NDArray[np.int64] = numbers[np.maximum(runs, 0)]
    return versions
