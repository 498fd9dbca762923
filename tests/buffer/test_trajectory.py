import dataclasses
from typing import Any

import numpy as np
import pytest

from buffer.trajectory import FinishReason, Trajectory, TrajectoryGroup, VersionSpan
from buffer.transport.packed_group import PackedGroup, check_group, pack_group, read_group_header
from buffer.transport.schema import WireError


def fields(**changes: Any) -> dict[str, Any]:
    return {
        "trajectory_id": "0.0.0",
        "group_id": "0.0",
        "prompt_id": 7,
        "token_ids": np.array([5, 6, 7], np.int32),
        "loss_mask": np.array([False, True, True]),
        "behavior_logprobs": np.array([0.0, -0.5, -1.0], np.float32),
        "policy_versions": (VersionSpan(0, 3), VersionSpan(2, 4)),
        "reward": 1.0,
        "reward_breakdown": {},
        "verdict": "correct",
        "finish_reason": FinishReason.STOP,
    } | changes


def test_a_sound_trajectory_knows_its_versions_and_length():
    trajectory = Trajectory(**fields())
    assert (trajectory.num_tokens, trajectory.oldest_version, trajectory.newest_version) == (3, 3, 4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        trajectory.reward = 0.0  # type: ignore[misc]


def received(group: TrajectoryGroup) -> PackedGroup:
    """The group as the buffer receives it from a sender that checks nothing."""
    packed = pack_group(group)
    received = read_group_header(packed.header_frame, packed.arrays_frame)
    check_group(received)
    return received


@pytest.mark.parametrize(
    ("changes", "complaint", "complaint_of_frames"),
    [
        ({"token_ids": np.array([5, 6], np.int32)}, "lengths", "bytes of arrays"),
        ({"token_ids": np.array([5, 6, 7], np.int64)}, "int64", "bytes of arrays"),
        ({"token_ids": np.array([], np.int32)}, "empty", "bytes of arrays"),
        ({"token_ids": np.array([5, -6, 7], np.int32)}, "token id -6 is negative", ""),
        ({"loss_mask": np.array([False, False, False])}, "selects no token", ""),
        ({"loss_mask": np.array([True, True, True])}, "no token precedes it", ""),
        ({"behavior_logprobs": np.array([0, np.nan, -1], np.float32)}, "finite and <= 0, found nan", ""),
        ({"behavior_logprobs": np.array([0, -np.inf, -1], np.float32)}, "found -inf", ""),
        ({"behavior_logprobs": np.array([0, np.inf, -1], np.float32)}, "found inf", ""),
        ({"behavior_logprobs": np.array([0, 0.25, -1], np.float32)}, "found 0.25", ""),
        ({"behavior_logprobs": np.array([-1, -1, -1], np.float32)}, "must be 0 where loss_mask is False", ""),
        ({"reward": float("nan")}, "reward nan", "number nan"),
        ({"policy_versions": ()}, "must be .* spans", "oldest_version"),
        ({"policy_versions": (VersionSpan(0, 3), VersionSpan(2, 2))}, r"\(2, 2\)\] must be .* never decrease", ""),
        ({"policy_versions": (VersionSpan(1, 3), VersionSpan(1, 4))}, "starts increase", ""),
        ({"policy_versions": (VersionSpan(3, 3),)}, "to less than 3", ""),
        ({"policy_versions": (VersionSpan(0, -1),)}, "versions are >= 0", "number -1"),
        ({"policy_versions": (VersionSpan(-1, 3),)}, "increase from 0", "number -1"),
    ],
)
def test_a_broken_trajectory_is_refused_where_it_is_made_and_where_it_arrives(
    changes: dict[str, Any], complaint: str, complaint_of_frames: str
):
    with pytest.raises(ValueError, match=complaint):
        Trajectory(**fields(**changes))
    sound, broken = Trajectory(**fields()), Trajectory(**fields())
    for name, value in changes.items():
        object.__setattr__(broken, name, value)
    group = TrajectoryGroup("0.0", 7, (sound, sound))
    received(group)
    for trajectories in ((broken, sound), (sound, broken)):
        object.__setattr__(group, "trajectories", trajectories)
        with pytest.raises(WireError, match=complaint_of_frames or complaint):
            received(group)


def test_arrays_of_a_trajectory_have_one_dimension():
    with pytest.raises(ValueError, match="shape"):
        Trajectory(**fields(token_ids=np.array([[5, 6, 7]], np.int32)))


def test_a_group_counts_from_its_oldest_token():
    older = Trajectory(**fields(policy_versions=(VersionSpan(0, 1),), reward=-0.5))
    group = TrajectoryGroup("0.0", 7, (Trajectory(**fields()), older))
    assert (group.oldest_version, group.num_tokens, group.rewards) == (1, 6, (1.0, -0.5))


@pytest.mark.parametrize("stranger", [{"group_id": "1.0"}, {"prompt_id": 8}])
def test_a_group_takes_no_stranger(stranger: dict[str, Any]):
    with pytest.raises(ValueError, match="belongs to group"):
        TrajectoryGroup("0.0", 7, (Trajectory(**fields(**stranger)),))


def test_a_group_is_not_empty():
    with pytest.raises(ValueError, match="no trajectory"):
        TrajectoryGroup("0.0", 7, ())
