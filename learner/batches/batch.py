"""A rank's shard of a batch as flat tensors, and how it is cut into minibatches and microbatches.

The scored tokens (`loss_mask` True) of all trajectories are on one axis [M], in trajectory order. All per-token
tensors (log-probabilities, advantages, values) are on this axis. A microbatch holds consecutive whole trajectories
within a token budget, so its scored tokens are a slice of [M]. Cuts are computed from lengths on the host, without
waiting for the device.
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
from learner.batches.prefix_sharing import SharedPrefixes, find_shared_prefix_lengths, is_worthwhile


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The packed sequences of one forward pass, and the place of their scored tokens in the batch."""

    token_ids: Tensor
    """[N] int64."""
    position_ids: Tensor
    """[N] int64, restarting at 0 with every sequence."""
    boundaries: tuple[int, ...]
    """Start offset of every sequence, and N."""
    targets: Tensor
    """[M] int64: indices into N of the scored tokens."""
    scored: slice
    """The same tokens on the batch's axis [M]."""
    shared: SharedPrefixes | None = None
    """Prefixes that are computed once; None: every token is computed."""

    @property
    def inputs(self) -> tuple[Tensor, Tensor, tuple[int, ...], Tensor, SharedPrefixes | None]:
        """The arguments of a network's forward pass."""
        return self.token_ids, self.position_ids, self.boundaries, self.targets, self.shared


@dataclass(frozen=True, slots=True)
class TrainingBatch:
    """One rank's shard of a batch: whole groups, in the order of the `Shard` message."""

    policy_version: int
    trajectories: tuple[Trajectory, ...]
    staleness: tuple[int, ...]
    """Versions, one per group, as computed by the buffer when it sent the batch."""
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
    """[num_groups + 1] index of the first trajectory of every group, then the number of trajectories."""
    scored_offsets: tuple[int, ...]
    """[num_sequences + 1] index on [M] of the first scored token of every trajectory, then M."""
    num_computed: tuple[int, ...]
    """[num_sequences] leading tokens to run through the model; the last scored token's hidden state is never used."""
    shared_prefix_lengths: tuple[int, ...]
    """[num_sequences] length of the prefix shared with the previous trajectory, at most `num_computed` of both."""

    @classmethod
    def from_groups(
        cls, groups: Sequence[TrajectoryGroup], staleness: Sequence[int], policy_version: int, device: torch.device
    ) -> TrainingBatch:
        """Flatten the groups into tensors on `device`."""
        trajectories = tuple(trajectory for group in groups for trajectory in group.trajectories)
        group_index = [index for index, group in enumerate(groups) for _ in group.trajectories]
        lengths = [int(t.loss_mask.sum()) for t in trajectories]
        behavior = np.concatenate([t.behavior_logprobs[t.loss_mask] for t in trajectories])
        versions = np.concatenate([t.token_versions[t.loss_mask] for t in trajectories])
        num_computed = tuple(_num_computed(t) for t in trajectories)
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
            num_computed=num_computed,
            shared_prefix_lengths=tuple(find_shared_prefix_lengths([t.token_ids for t in trajectories], num_computed)),
        )

    @property
    def num_tokens(self) -> int:
        """All tokens of all trajectories, prompts included."""
        return sum(t.num_tokens for t in self.trajectories)

    @property
    def num_scored_tokens(self) -> int:
        """Number of scored tokens, M."""
        return len(self.sequence_index)

    def split(self, num_parts: int) -> list[range]:
        """Return the trajectories of each of `num_parts` minibatches with equally many groups."""
        per_part = len(self.staleness) // num_parts
        return [range(*self.group_offsets[i * per_part :: per_part][:2]) for i in range(num_parts)]

    def num_microbatches(self, part: range, tokens_per_microbatch: int) -> int:
        """Return the smallest number of microbatches for `part`.

        A trajectory above the budget is a microbatch of its own.
        """
        return fewest_parts(*self._lengths(part), tokens_per_microbatch)

    def microbatches(
        self, part: range, tokens_per_microbatch: int, at_least: int = 1, attention_crossover_tokens: float = math.inf
    ) -> list[MicroBatch]:
        """Pack the trajectories in `part`, in order, into few microbatches of about equal cost.

        Args:
            part: the trajectories of a minibatch.
            tokens_per_microbatch: budget of computed tokens per microbatch.
            at_least: lower bound on the number of microbatches, up to one per trajectory.
            attention_crossover_tokens: as in `even_cuts`; infinite: the cost is the number of tokens.
        """
        lengths, shared = self._lengths(part)
        number = max(fewest_parts(lengths, shared, tokens_per_microbatch), at_least)
        cuts = even_cuts(lengths, shared, tokens_per_microbatch, number, attention_crossover_tokens)
        return [self._pack(range(part.start + start, part.start + stop)) for start, stop in pairwise(cuts)]

    def scored_slice(self, part: range) -> slice:
        """Return the slice of [M] with the scored tokens of the trajectories in `part`."""
        return slice(self.scored_offsets[part.start], self.scored_offsets[part.stop])

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        return self.sequence_index.device

    def _lengths(self, part: range) -> tuple[list[int], Sequence[int]]:
        """Return the tokens of each trajectory, and how many of them cost nothing after the previous trajectory."""
        lengths = [trajectory.num_tokens for trajectory in self.trajectories[part.start : part.stop]]
        # On CUDA attention needs memory for every token of every sequence, also for the tokens of shared prefixes.
        if self.device.type == "cpu" and is_worthwhile(sum(self.shared_prefix_lengths), self.num_tokens):
            return lengths, self.shared_prefix_lengths[part.start : part.stop]
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
            shared=SharedPrefixes.of(
                lengths, self.num_computed[of_part], self.shared_prefix_lengths[of_part], self.device
            ),
        )


def _num_computed(trajectory: Trajectory) -> int:
    scored = np.flatnonzero(trajectory.loss_mask)
    return int(scored[-1]) if len(scored) else 0


def occurrence_ranges(groups: Sequence[TrajectoryGroup]) -> str:
    """List the prompt occurrences of `groups` for a log, as in `3-5,9`: the number before the dot of each group_id."""
    numbers = {int(group.group_id.partition(".")[0]) for group in groups}
    starts = sorted(number for number in numbers if number - 1 not in numbers)
    ends = sorted(number for number in numbers if number + 1 not in numbers)
    return ",".join(f"{start}-{end}" if end > start else f"{start}" for start, end in zip(starts, ends, strict=True))
