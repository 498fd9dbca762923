import dataclasses
from typing import Any

import numpy as np
import pytest

from buffer.trajectory import FinishReason, Trajectory, TrajectoryGroup, VersionSpan


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


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"token_ids": np.array([5, 6], np.int32)}, "lengths"),
        ({"token_ids": np.array([5, 6, 7], np.int64)}, "int64"),
        ({"token_ids": np.array([5, -6, 7], np.int32)}, "negative"),
        ({"token_ids": np.array([[5, 6, 7]], np.int32)}, "shape"),
        ({"token_ids": np.array([], np.int32)}, "empty"),
        ({"loss_mask": np.array([False, False, False])}, "selects no token"),
        ({"loss_mask": np.array([True, True, True])}, "nothing comes before it"),
        ({"behavior_logprobs": np.array([0, np.nan, -1], np.float32)}, "finite and <= 0, found nan"),
        ({"behavior_logprobs": np.array([0, -np.inf, -1], np.float32)}, "finite"),
        ({"behavior_logprobs": np.array([0, 0.25, -1], np.float32)}, "found 0.25"),
        ({"behavior_logprobs": np.array([-1, -1, -1], np.float32)}, "must be 0 where loss_mask is False"),
        ({"reward": float("nan")}, "reward nan"),
        ({"policy_versions": ()}, "empty"),
        ({"policy_versions": (VersionSpan(0, 3), VersionSpan(2, 2))}, "must not decrease"),
        ({"policy_versions": (VersionSpan(1, 3), VersionSpan(1, 4))}, "must not decrease"),
        ({"policy_versions": (VersionSpan(0, -1),)}, "outside"),
        ({"policy_versions": (VersionSpan(-1, 1),)}, "outside"),
        ({"policy_versions": (VersionSpan(3, 1),)}, "outside"),
    ],
)
def test_a_broken_trajectory_cannot_be_made(changes: dict[str, Any], complaint: str):
    with pytest.raises(ValueError, match=complaint):
        Trajectory(**fields(**changes))


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
