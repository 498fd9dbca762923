"""A rank's shard of a batch as flat tensors, and the cuts that are made in it.

Scored tokens (those with `loss_mask` True) of all trajectories lie on one axis [M], in trajectory order. Everything
that is per token (log-probabilities, advantages, values) lives on it. A microbatch is a run of whole trajectories that
fits a token budget; its scored tokens are a slice of [M]. Where to cut is known on the host: no device is waited for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

from buffer.trajectory import Trajectory, TrajectoryGroup
from learner.batches.packing import even_cuts, fewest_parts
from learner.batches.prefix_sharing import SharedPrefixes, common_lengths, is_worthwhile


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
    shared: SharedPrefixes | None = None
    """What the sequences have in common; None: nothing to speak of."""

    @property
    def inputs(self) -> tuple[Tensor, Tensor, tuple[int, ...], Tensor, SharedPrefixes | None]:
        """What a network is called with."""
        return self.token_ids, self.position_ids, self.boundaries, self.targets, self.shared


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
    group_offsets: tuple[int, ...]
    """[num_groups + 1] the first trajectory of every group, and their number."""
    scored_offsets: tuple[int, ...]
    """[num_sequences + 1] the first scored token of every trajectory on [M], and M."""
    needed: tuple[int, ...]
    """[num_sequences] how many of its first tokens matter: the state of the last scored one tells no score."""
    common: tuple[int, ...]
    """[num_sequences] of those, how many it begins with like the trajectory before it."""

    @classmethod
    def from_groups(
        cls, groups: Sequence[TrajectoryGroup], staleness: Sequence[int], policy_version: int, device: torch.device
    ) -> TrainingBatch:
        """Flatten the groups; tensors land on `device`."""
        trajectories = tuple(trajectory for group in groups for trajectory in group.trajectories)
        group_index = [index for index, group in enumerate(groups) for _ in group.trajectories]
        lengths = [int(t.loss_mask.sum()) for t in trajectories]
        behavior = np.concatenate([t.behavior_logprobs[t.loss_mask] for t in trajectories])
        versions = np.concatenate([t.token_versions[t.loss_mask] for t in trajectories])
        needed = tuple(_needed(t) for t in trajectories)
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
            group_offsets=tuple(accumulate((len(group.trajectories) for group in groups), initial=0)),
            scored_offsets=tuple(accumulate(lengths, initial=0)),
            needed=needed,
            common=tuple(common_lengths([t.token_ids for t in trajectories], needed)),
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
        per_part = len(self.staleness) // num_parts
        return [range(*self.group_offsets[i * per_part :: per_part][:2]) for i in range(num_parts)]

    def num_microbatches(self, part: range, tokens_per_microbatch: int) -> int:
        """How few microbatches of whole trajectories hold `part`; a trajectory above the budget stands alone."""
        return fewest_parts(*self._lengths(part), tokens_per_microbatch)

    def microbatches(
        self, part: range, tokens_per_microbatch: int, at_least: int = 1, attention_crossover_tokens: float = math.inf
    ) -> list[MicroBatch]:
        """`part` in order, packed into few microbatches of about equal cost.

        Args:
            part: trajectories.
            tokens_per_microbatch: budget of each, of computed tokens.
            at_least: how many, although fewer would do; more than there are trajectories count as so many.
            attention_crossover_tokens: as `even_cuts` has it; infinite: cost is tokens.
        """
        lengths, common = self._lengths(part)
        number = max(fewest_parts(lengths, common, tokens_per_microbatch), at_least)
        cuts = even_cuts(lengths, common, tokens_per_microbatch, number, attention_crossover_tokens)
        return [self._pack(range(part.start + start, part.start + stop)) for start, stop in pairwise(cuts)]

    def scored_slice(self, part: range) -> slice:
        """Where the scored tokens of the trajectories in `part` lie on [M]."""
        return slice(self.scored_offsets[part.start], self.scored_offsets[part.stop])

    @property
    def device(self) -> torch.device:
        """Where the tensors live."""
        return self.sequence_index.device

    def _lengths(self, part: range) -> tuple[list[int], Sequence[int]]:
        """Tokens of each trajectory, and how many of them cost nothing after the one before it."""
        lengths = [trajectory.num_tokens for trajectory in self.trajectories[part.start : part.stop]]
        # On CUDA attention holds every token of every sequence, computed once or not.
        if self.device.type == "cpu" and is_worthwhile(sum(self.common), self.num_tokens):
            return lengths, self.common[part.start : part.stop]
        return lengths, [0] * len(lengths)

    def _pack(self, part: range) -> MicroBatch:
        of_part = slice(part.start, part.stop)
        chosen = self.trajectories[of_part]
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
            shared=SharedPrefixes.of(lengths, self.needed[of_part], self.common[of_part], self.device),
        )


def _needed(trajectory: Trajectory) -> int:
    scored = np.flatnonzero(trajectory.loss_mask)
    return int(scored[-1]) if len(scored) else 0


def occurrence_ranges(groups: Sequence[TrajectoryGroup]) -> str:
    """The prompt occurrences of `groups` (what stands before the dot of a group_id) for a log: `3-5,9`."""
    numbers = {int(group.group_id.partition(".")[0]) for group in groups}
    starts = sorted(number for number in numbers if number - 1 not in numbers)
    ends = sorted(number for number in numbers if number + 1 not in numbers)
    return ",".join(f"{start}-{end}" if end > start else f"{start}" for start, end in zip(starts, ends, strict=True))
