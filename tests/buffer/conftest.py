"""Builders that every test of the buffer shares."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from buffer.config import BufferConfig
from buffer.trajectory import FinishReason, Trajectory, TrajectoryGroup, VersionSpan
from buffer.transport.packed_group import PackedGroup, pack_group

ConfigMaker = Callable[..., BufferConfig]
GroupMaker = Callable[..., PackedGroup]


def _trajectory(group_id: str, prompt_id: int, number: int, version: int, num_tokens: int, verdict: str) -> Trajectory:
    mask = np.arange(num_tokens) >= 1
    return Trajectory(
        trajectory_id=f"{group_id}.{number}",
        group_id=group_id,
        prompt_id=prompt_id,
        token_ids=np.arange(num_tokens, dtype=np.int32) + number,
        loss_mask=mask,
        behavior_logprobs=np.where(mask, -0.5, 0.0).astype(np.float32),
        policy_versions=(VersionSpan(0, version),),
        reward=float(number % 2),
        reward_breakdown={"correct": float(number % 2)},
        verdict=verdict,
        finish_reason=FinishReason.STOP,
        actor_id="actor-0",
    )


@pytest.fixture
def make_group() -> GroupMaker:
    def make(
        group_id: str,
        prompt_id: int,
        version: int = 0,
        num_tokens: int = 5,
        size: int = 2,
        verdicts: Sequence[str] = (),
    ) -> PackedGroup:
        verdicts = verdicts or [("wrong", "correct")[i % 2] for i in range(size)]
        trajectories = tuple(
            _trajectory(group_id, prompt_id, i, version, num_tokens, verdict) for i, verdict in enumerate(verdicts)
        )
        return pack_group(TrajectoryGroup(group_id, prompt_id, trajectories))

    return make


@pytest.fixture
def run_dir() -> Iterator[Path]:
    # Shorter than tmp_path, because the path of an ipc socket is limited to 107 characters.
    with tempfile.TemporaryDirectory(prefix="run-") as directory:
        yield Path(directory)


@pytest.fixture
def make_config(run_dir: Path) -> ConfigMaker:
    def make(**changes: object) -> BufferConfig:
        settings: dict[str, object] = {
            "run_dir": str(run_dir),
            "address": f"ipc://{run_dir}/buffer",
            "num_prompts": 10,
            "data_fingerprint": "abc",
            "groups_per_batch": 2,
            "max_staleness": 1,
            "durability": "memory",
        }
        return BufferConfig(**(settings | changes))  # type: ignore[arg-type]

    return make
