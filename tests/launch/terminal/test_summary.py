"""summary.json and the table at the end, from a ledger and the buffer's final status."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from buffer.config import BufferConfig
from buffer.ledger.ledger import Holder, Ledger
from buffer.trajectory import FinishReason, Trajectory, TrajectoryGroup, VersionSpan
from buffer.transport.packed_group import PackedGroup, pack_group
from launch.terminal.summary import print_summary, summarize_run, write_summary
from tests.launch.statuses import LEARNER, peer, report, status


def group(group_id: str, prompt_id: int, version: int) -> PackedGroup:
    trajectory = Trajectory(
        trajectory_id=f"{group_id}.0",
        group_id=group_id,
        prompt_id=prompt_id,
        token_ids=np.array([1, 2], np.int32),
        loss_mask=np.array([False, True]),
        behavior_logprobs=np.array([0.0, -1.0], np.float32),
        policy_versions=(VersionSpan(1, version),),
        reward=1.0,
        reward_breakdown={},
        verdict="correct",
        finish_reason=FinishReason.STOP,
    )
    return pack_group(TrajectoryGroup(group_id, prompt_id, (trajectory,)))


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A run whose four groups were used 0, 0, 1 and 2 versions after they were sampled."""
    ledger = Ledger(BufferConfig(str(tmp_path), "tcp://127.0.0.1:1", 10, "abc", 1, 2, durability="memory"), 0.0)
    with ledger.transaction():
        for used, oldest in enumerate((0, 1, 1, 1)):
            group_id, prompt_id = ledger.issue(Holder("actor-0", "actor-0", used), oldest, 0.0)
            assert ledger.deliver(group(group_id, prompt_id, oldest), 0) == "stored"
            ledger.use([used], used)
    ledger.close()
    return tmp_path


def test_a_summary_takes_rates_from_the_peers_and_staleness_from_the_ledger(trained: Path):
    actors = [peer("actor", f"actor-{i}", idle_fraction=idle) for i, idle in enumerate((0.1, 0.3))]
    late = peer("actor", "actor-2")
    reports = (report(0, 0.4), report(10, 0.7), report(12, 0.9))
    summary = summarize_run(trained, status(LEARNER, *actors, late, reports=reports), 90.5)
    write_summary(summary, trained)
    assert json.loads((trained / "summary.json").read_text()) == {
        "pass_at_1_before": 0.4,
        "pass_at_1_after": 0.9,
        "policy_version": 12,
        "samples_per_second": 210.0,
        "tokens_per_second": 4321.0,
        "actor_idle_fraction": pytest.approx(0.2),
        "learner_idle_fraction": 0.25,
        "staleness_mean": 0.75,
        "staleness_max": 2,
        "wall_seconds": 90.5,
    }


def test_what_was_not_measured_is_absent_and_never_another_versions(trained: Path):
    summary = summarize_run(trained, status(reports=(report(3, 0.5, requested=0), report(10, 0.7))), 1.0)
    assert summary.pass_at_1_before is None
    assert summary.pass_at_1_after is None
    assert summary.samples_per_second is None
    assert summary.actor_idle_fraction is None


def printed(run_dir: Path, *peers: object, checkpoint: Path | None) -> list[str]:
    stream = io.StringIO()
    said = status(*peers, reports=(report(0, 0.4), report(12, 0.9)))  # type: ignore[arg-type]
    print_summary(summarize_run(run_dir, said, 90.5), run_dir, checkpoint, Console(file=stream, width=80))
    return [line.strip("│┃ ").strip() for line in stream.getvalue().splitlines()]


def test_the_table_says_what_came_of_the_run(trained: Path):
    lines = printed(trained, LEARNER, checkpoint=trained / "checkpoints" / "00000012")
    text = "\n".join(lines)
    for expected in (
        *("0.400 before, 0.900 after 12 steps", "210, 4321", "-, 25 %", "0.75 mean, 2 max", "90 s"),
        f"{trained}/checkpoints/00000012/policy",
        f"tensorboard --logdir {trained}/tensorboard",
    ):
        assert expected in text


def test_a_run_without_a_checkpoint_names_none(trained: Path):
    assert not any(line.startswith("checkpoint") for line in printed(trained, checkpoint=None))
