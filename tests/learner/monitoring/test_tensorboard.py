import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from buffer.trajectory import TrajectoryGroup
from buffer.transport.messages import ActorTotals, EvaluationReport, Peer, StageStatus, Status, Wait
from learner.batches.batch import TrainingBatch
from learner.monitoring.tensorboard import Reporter, StepClock, batch_metrics
from tests.learner.samples import CPU, make_trajectory


def batch() -> TrainingBatch:
    """A batch for version 7: one group with rewards 1 and -0.5, and one with equal rewards."""
    scored = [False, True, True, True]
    first = (
        make_trajectory(0, [5] * 4, scored, group="a", reward=1.0, verdict="correct", versions=((0, 3), (2, 6))),
        make_trajectory(1, [5, 5], [False, True], group="a", reward=-0.5, versions=((0, 5),)),
    )
    second = (
        make_trajectory(0, [5] * 4, scored, group="b", reward=-1.0, verdict="truncated", versions=((0, 7),)),
        make_trajectory(1, [5] * 4, scored, group="b", reward=-1.0, verdict="odd", versions=((0, 4), (1, 5), (3, 7))),
    )
    groups = [TrajectoryGroup("a", 0, first), TrajectoryGroup("b", 0, second)]
    return TrainingBatch.from_groups(groups, [4, 3], 7, CPU)


def test_batch_metrics_are_what_one_counts_by_hand():
    metrics = batch_metrics(batch())
    assert metrics == pytest.approx(
        {
            "reward/mean": -0.375,
            "reward/std": math.sqrt((1.375**2 + 0.125**2 + 2 * 0.625**2) / 4),
            "reward/completion_tokens_mean": 2.5,
            "reward/completion_tokens_max": 3.0,
            "reward/turns_mean": 1.0,
            "reward/groups_without_signal": 0.5,
            "reward/part_answer": -0.375,
            "reward/fraction_correct": 0.25,
            "reward/fraction_wrong": 0.25,
            "reward/fraction_truncated": 0.25,
            "reward/fraction_odd": 0.25,
            "reward/fraction_no_answer": 0.0,
            "reward/fraction_timeout": 0.0,
            "reward/fraction_crash": 0.0,
            "reward/fraction_error": 0.0,
            "staleness/mean": 3.5,
            "staleness/max": 4.0,
            "staleness/in_flight_mean": (3 + 0 + 0 + 3) / 4,
            "staleness/queued_mean": (1 + 2 + 0 + 0) / 4,
            "staleness/versions_per_sample_mean": (2 + 1 + 1 + 3) / 4,
        }
    )


def test_the_clock_counts_from_the_end_of_the_first_step(monkeypatch: pytest.MonkeyPatch):
    moments = iter([100.0, 104.0, 110.0])
    monkeypatch.setattr("learner.monitoring.tensorboard.time.monotonic", lambda: next(moments))
    clock = StepClock()
    assert clock.summary() == {}
    clock.step(wait_seconds=60.0, num_samples=1000, num_tokens=1000)
    assert clock.summary() == {}
    clock.step(wait_seconds=1.0, num_samples=8, num_tokens=80)
    assert clock.summary() == {"samples_per_second": 2.0, "tokens_per_second": 20.0, "idle_fraction": 0.25}
    clock.step(wait_seconds=2.0, num_samples=12, num_tokens=40)
    assert clock.summary() == {"samples_per_second": 2.0, "tokens_per_second": 12.0, "idle_fraction": 0.3}


def events(directory: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(directory), size_guidance={"histograms": 0, "scalars": 0})
    accumulator.Reload()
    return accumulator


def scalars(directory: Path, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events(directory).Scalars(name)]


def peer(role: str, version: int, **metrics: float) -> Peer:
    return Peer(role, f"{role}-{version}", version, "", 0.0, metrics)


def test_event_files_hold_everything_by_policy_version(tmp_path: Path):
    reporter = Reporter(tmp_path, 0)
    for version in (1, 2):
        reporter.scalars({"reward/mean": version / 2}, version)
        reporter.staleness(batch(), version)
    reporter.evaluation(EvaluationReport("actor-0", 3, 2, 100, 0.75, 0.5, 12.0, 1.5))
    peers = (peer("actor", 1), peer("learner", 2))
    actors = ActorTotals(7000, oldest_version=0, newest_version=2, metrics={"tokens": 40.0, "idle_fraction": 0.25})
    stage = StageStatus(2, 3, 0.75, 200, 11)
    reporter.status(Status({"ready": 4, "dropped:late": 1}, 2, False, peers, (), stage=stage, actors=actors), 2)
    reporter.close()
    assert scalars(tmp_path, "reward/mean") == [(1, 0.5), (2, 1.0)]
    assert scalars(tmp_path, "evaluation/pass_at_1") == [(2, 0.75)]
    assert scalars(tmp_path, "buffer/ready") == [(2, 4.0)]
    assert scalars(tmp_path, "buffer/dropped_late") == [(2, 1.0)]
    assert scalars(tmp_path, "buffer/stage") == [(2, 2.0)]
    assert scalars(tmp_path, "buffer/success") == [(2, 0.75)]
    assert scalars(tmp_path, "buffer/prompts_passed_over") == [(2, 11.0)]
    assert scalars(tmp_path, "actor/tokens") == [(2, 40.0)]
    assert scalars(tmp_path, "actor/idle_fraction") == [(2, 0.25)]
    assert scalars(tmp_path, "weights/actor_versions_behind") == [(2, 2.0)]
    for name, num_values in (("groups", 2), ("in_flight", 4), ("queued", 4)):
        histograms = events(tmp_path).Histograms(f"staleness/{name}")
        assert [(event.step, event.histogram_value.num) for event in histograms] == [(1, num_values), (2, num_values)]


def test_without_actors_nothing_is_said_about_them(tmp_path: Path):
    reporter = Reporter(tmp_path, 0)
    reporter.status(Status({"ready": 4}, 2, False, (peer("learner", 2, idle=0.1),), ()), 2)
    reporter.close()
    names = ("ready", "stage", "success", "prompts_passed_over")
    assert events(tmp_path).Tags()["scalars"] == [*(f"buffer/{name}" for name in names), "waiting/learner-2_seconds"]


def test_with_more_actors_than_a_status_names_only_the_learner_has_curves(tmp_path: Path):
    reporter = Reporter(tmp_path, 0)
    waits = (Wait("learner-1", "3 more groups", 12.0), Wait("actor-1", "a lease", 20.0))
    peers = (peer("learner", 1), peer("actor", 1))
    reporter.status(Status({}, 1, False, peers, (), waits, actors=ActorTotals(7000)), 1)
    reporter.close()
    curves = [name for name in events(tmp_path).Tags()["scalars"] if name.startswith("waiting/")]
    assert curves == ["waiting/learner-1_seconds"]
    (page,) = events(tmp_path).Tensors("waits/text_summary")
    assert "actor-1 waits for a lease" in page.tensor_proto.string_val[0].decode()


def test_who_waits_for_whom_is_a_curve_and_a_page_of_text(tmp_path: Path):
    reporter = Reporter(tmp_path, 0)
    waits = (
        Wait("learner-1", "3 more groups", 12.0),
        Wait("learner-1", "the buffer", 2.0),
        Wait("actor-0", "a lease", 0.5),
    )
    reporter.status(Status({}, 1, False, (peer("learner", 1), peer("actor", 1)), (), waits), 1)
    reporter.status(Status({}, 2, False, (peer("learner", 1),), ()), 2)
    reporter.close()
    assert scalars(tmp_path, "waiting/learner-1_seconds") == [(1, 12.0), (2, 0.0)]
    assert scalars(tmp_path, "waiting/actor-0_seconds") == [(1, 0.5)]
    (page,) = events(tmp_path).Tensors("waits/text_summary")
    assert page.tensor_proto.string_val[0].decode().splitlines() == [
        "- learner-1 waits for 3 more groups, for 12 s",
        "- learner-1 waits for the buffer, for 2 s",
    ]


def test_a_resumed_run_hides_what_it_writes_again_and_nothing_else(tmp_path: Path):
    first = Reporter(tmp_path, 0)
    for version in range(1, 6):
        first.scalars({"reward/mean": 1.0}, version)
    first.close()
    second = Reporter(tmp_path, 3)
    for version in (4, 5):
        second.scalars({"reward/mean": 2.0}, version)
    second.close()
    assert scalars(tmp_path, "reward/mean") == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0)]
