"""Masking of tokens that are too stale, for buffer.on_stale=mask. Pure functions of packed groups."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from buffer.trajectory import Trajectory, TrajectoryGroup
from buffer.transport.packed_group import PackedGroup, pack_group, unpack_group


def newest_sampled_version(packed: PackedGroup) -> int:
    """Return the highest version of any token in the group's loss masks.

    Masking only older tokens leaves at least one token of this version.

    Raises:
        WireError: when the contents break a rule of `Trajectory`.
    """
    return max(int(t.token_versions[t.loss_mask].max()) for t in unpack_group(packed).trajectories)


def mask_older_tokens(packed: PackedGroup, oldest_version: int) -> PackedGroup:
    """Remove tokens of versions below `oldest_version` from the group's loss masks.

    A trajectory without remaining tokens is removed from the group, because the learner can learn nothing from it. At
    least one trajectory must have a token of `oldest_version` or newer.
    """
    group = unpack_group(packed)
    masked = [_masked(trajectory, oldest_version) for trajectory in group.trajectories]
    return pack_group(TrajectoryGroup(group.group_id, group.prompt_id, tuple(t for t in masked if t is not None)))


def _masked(trajectory: Trajectory, oldest_version: int) -> Trajectory | None:
    mask = trajectory.loss_mask & (trajectory.token_versions >= oldest_version)
    if not mask.any():
        return None
    logprobs = np.where(mask, trajectory.behavior_logprobs, np.float32(0))
    return replace(trajectory, loss_mask=mask, behavior_logprobs=logprobs)
