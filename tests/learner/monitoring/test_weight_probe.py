"""The weight probe against a slow reference, and its rounds against a buffer that the test plays."""

import logging
import math
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor

from buffer.trajectory import TrajectoryGroup
from buffer.transport.messages import Message, Probe, ProbeReport, ProbeReports, ProbeRequest
from learner.batches.batch import TrainingBatch
from learner.monitoring import weight_probe
from learner.monitoring.logprob_check import LogprobCheck, LogprobMismatchError, OlderGroups
from learner.monitoring.weight_probe import Comparison, WeightProbe, canary_of, compare
from tests.learner.samples import CPU, make_batch, make_group, make_trajectory

pytestmark = pytest.mark.usefixtures("one_rank")

TOLERANCE = 0.02


# --- the comparison ---


def slow_mean(left: list[float], right: list[float]) -> float:
    total = 0.0
    for one, other in zip(left, right, strict=True):
        total += one - other if one > other else other - one
    return total / len(left)


@pytest.mark.parametrize("seed", range(20))
def test_the_comparison_is_the_slow_one(seed: int):
    rng = np.random.default_rng(seed)
    kept = {int(version): -rng.exponential(2.0, 16) for version in rng.choice(99, 7, replace=False)}
    version = list(kept)[seed % 7]
    reported = (list(kept.values())[(seed * 3) % 7] + rng.normal(0, 0.01, 16)).tolist()

    means = {number: slow_mean(reported, logprobs.tolist()) for number, logprobs in kept.items()}
    found = compare(kept, version, reported)

    assert found.difference == pytest.approx(means[version], abs=1e-12)
    assert found.best_difference == pytest.approx(min(means.values()), abs=1e-12)
    assert means[found.best_version] == min(means.values())


@pytest.mark.parametrize(
    ("found", "is_alarm"),
    [
        (Comparison(0.5, 7, 0.5), True),  # far off, and no version is nearer
        (Comparison(0.0399, 7, 0.0399), False),  # rounding of another dtype
        (Comparison(0.01, 2, 0.004), True),  # within the tolerance, but another version is much nearer
        (Comparison(0.01, 2, 0.006), False),  # a little nearer is chance
        (Comparison(1e-4, 2, 1e-7), False),  # the versions hardly differ
        (Comparison(math.nan, 7, math.nan), True),
    ],
)
def test_what_is_an_alarm(found: Comparison, is_alarm: bool):
    assert found.is_alarm(TOLERANCE) is is_alarm


@pytest.mark.parametrize(("noise", "step"), [(1e-6, 1e-3), (0.012, 0.03)], ids=["same dtype", "another dtype"])
def test_stuck_weights_are_found_and_fresh_ones_are_not(noise: float, step: float):
    """A policy drifts; an actor's numbers carry the noise of its kernels and dtype. None of 200 fresh ones alarms."""
    rng = np.random.default_rng(0)
    kept = dict(enumerate(np.cumsum(np.vstack([-rng.exponential(1.0, 16), rng.normal(0, step, (60, 16))]), axis=0)))
    for number in range(200):
        version = 20 + number % 40
        kernels = rng.normal(0, noise, 16)
        assert not compare(kept, version, (kept[version] + kernels).tolist()).is_alarm(TOLERANCE)
        stuck = compare(kept, version, (kept[version - 20] + kernels).tolist())
        assert stuck.is_alarm(TOLERANCE)
        assert abs(stuck.best_version - (version - 20)) <= 2


# --- the canary ---


def test_the_canary_is_the_end_of_a_prompt_and_what_was_sampled_after_it():
    short = make_trajectory(0, range(3, 9), [False] * 4 + [True] * 2)
    long = make_trajectory(1, [*range(100, 130), *range(3, 43)], [False] * 30 + [True] * 40)
    [canary] = canary_of(make_batch([TrajectoryGroup("g", 0, (short, long))], 5)).trajectories
    assert canary.token_ids.tolist() == [100, 101, 102, 103, *range(118, 130), *range(3, 19)]
    assert canary.loss_mask.tolist() == [False] * 16 + [True] * 16
    assert canary.newest_version == 5


def test_the_canary_is_what_could_most_easily_have_been_sampled_otherwise():
    mask = [False] * 2 + [True] * 4
    certain = make_trajectory(0, range(3, 9), mask, logprobs=[0, 0, -0.1, -0.1, -0.1, -0.1])
    uncertain = make_trajectory(1, range(4, 10), mask, logprobs=[0, 0, -0.5, -0.5, -0.5, -0.5])
    rare = make_trajectory(2, range(5, 11), mask, logprobs=[0, 0, -30, 0, 0, 0])
    for order in ((certain, uncertain), (uncertain, certain)):
        group = TrajectoryGroup("g", 0, order)
        assert canary_of(make_batch([group])).trajectories[0].token_ids[0] == 4
    still = make_trajectory(3, range(6, 12), mask, logprobs=[0, 0, -0.6, -0.6, -0.6, -0.6])
    assert canary_of(make_batch([TrajectoryGroup("g", 0, (rare, still))])).trajectories[0].token_ids[0] == 6


def test_the_canary_ends_where_an_observation_begins():
    turns = make_trajectory(0, range(3, 12), [False, False, True, True, True, False, True, True, True])
    [canary] = canary_of(make_batch([TrajectoryGroup("g", 0, (turns,))])).trajectories
    assert canary.token_ids.tolist() == [3, 4, 5, 6, 7]
    assert canary.loss_mask.tolist() == [False, False, True, True, True]


# --- rounds ---


@dataclass
class Buffer:
    """Answers a request at once, with the reports that the test adds."""

    reports: list[ProbeReport] = field(default_factory=list)
    num_unanswered: int = 0
    probes: list[Probe] = field(default_factory=list)
    silent: bool = False

    def request(self, message: Message, timeout_seconds: float | None = None) -> Future[Message]:
        assert isinstance(message, ProbeRequest)
        self.probes.append(message.probe)
        answer: Future[Message] = Future()
        if not self.silent:
            mine = tuple(report for report in self.reports if report.probe_id == message.probe.probe_id)
            answer.set_result(ProbeReports(mine, self.num_unanswered, len(mine) + self.num_unanswered))
        return answer


class Policy:
    """Log-probabilities that change by `STEP` with every version."""

    STEP = 0.1

    def __init__(self) -> None:
        self.version, self.num_scored = 0, 0

    def __call__(self, batch: TrainingBatch) -> Tensor:
        self.num_scored += 1
        return torch.tensor(self.at(self.version, batch.num_scored_tokens), dtype=torch.float32)

    def at(self, version: int, num_tokens: int) -> list[float]:
        return [-1.0 - position / 8 - self.STEP * version for position in range(num_tokens)]


class Run:
    """A learner of one rank that publishes version after version."""

    def __init__(self, older: OlderGroups | None = None) -> None:
        self.buffer, self.policy = Buffer(), Policy()
        self.check = LogprobCheck(TOLERANCE, older or OlderGroups())
        self.probe = WeightProbe(self.buffer, self.policy, tolerance=TOLERANCE, rank=0, device=CPU)  # type: ignore[arg-type]
        self.batch = make_batch([make_group("g", 0, size=4)], 0)
        self.probe.begin(self.batch)

    def publish(self) -> dict[str, float]:
        self.policy.version += 1
        return self.probe.see(self.policy.version, self.check)

    def answer(self, actor: str, names: int, has: int | None = None, shift: float = 0.0) -> None:
        """Report for the round under way: the actor names version `names` and has the weights of `has`."""
        probe = self.buffer.probes[-1]
        logprobs = self.policy.at(names if has is None else has, probe.num_scored)
        shifted = tuple(logprob - shift for logprob in logprobs)
        self.buffer.reports.append(ProbeReport(actor, probe.probe_id, names, shifted, 0.0))

    def round(self, *answers: tuple[str, int | None]) -> dict[str, float]:
        """A whole round: (actor, version of the weights that it really has; None: the one it names) per answer."""
        self.publish()
        for actor, has in answers:
            self.answer(actor, self.policy.version, has)
        asked = self.publish()
        assert asked == {"weights/logprob_alarms": asked["weights/logprob_alarms"]}
        return self.publish()


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_probe, "PAUSE_PER_COST", 0.0)


def test_a_round_shows_the_worst_actor_and_finishes_the_first_check():
    run = Run()
    run.publish()
    run.answer("a", 1)
    run.answer("b", 1, shift=0.01)
    run.publish()
    assert not run.check.agreed
    shown = run.publish()
    assert shown["weights/logprob_probe"] == pytest.approx(0.01, abs=1e-6)
    assert (shown["weights/logprob_probe_version"], shown["weights/logprob_alarms"]) == (1.0, 0.0)
    assert run.check.agreed


def test_weights_that_never_arrive_are_an_alarm_that_names_actor_and_version(caplog: pytest.LogCaptureFixture):
    run = Run()
    run.check.agreed = True
    assert run.round(("a", None), ("b", None))["weights/logprob_alarms"] == 0.0
    shown = run.round(("a", None), ("b", 1))
    assert shown["weights/logprob_alarms"] == 1.0
    assert shown["weights/logprob_probe"] == pytest.approx(0.3, abs=1e-6)
    [warning] = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.startswith("b names policy 4 but samples with other weights")
    assert "from those under policy 1;" in warning
    # The alarm is said once, goes on in the metric, and ends when the actor computes the right thing again.
    assert run.round(("a", None), ("b", 1))["weights/logprob_alarms"] == 1.0
    assert run.publish()["weights/logprob_alarms"] == 1.0
    assert sum(record.levelno == logging.WARNING for record in caplog.records) == 1
    caplog.set_level(logging.INFO)
    run.answer("b", run.policy.version)
    run.publish()
    assert run.publish()["weights/logprob_alarms"] == 0.0
    assert any("b: its log-probabilities" in record.message for record in caplog.records)


def test_an_actor_that_left_is_forgotten():
    run = Run()
    run.check.agreed = True
    alarms = [run.round(("a", None), ("b", 0))["weights/logprob_alarms"]]
    alarms += [run.round(("a", None))["weights/logprob_alarms"] for _ in range(6)]
    assert alarms[0] == 1.0 and alarms[-1] == 0.0


def test_before_the_first_check_is_through_a_round_in_which_nobody_agrees_ends_the_run():
    run = Run()
    run.publish()
    run.answer("a", 1, shift=0.5)
    run.publish()
    with pytest.raises(LogprobMismatchError, match=r"a: over \d+ probed tokens .* differ by 0\.5 .*temperature"):
        run.publish()


def test_one_actor_that_agrees_finishes_the_check_and_the_other_is_an_alarm():
    run = Run()
    run.publish()
    run.answer("bad", 1, shift=0.5)
    run.answer("good", 1)
    run.publish()
    assert run.publish()["weights/logprob_alarms"] == 1.0
    assert run.check.agreed


def test_weights_of_an_earlier_learner_are_no_alarm_and_no_agreement():
    """After a rollback to 0 an actor still has the earlier learner's version 2, which is not this learner's."""
    run = Run(OlderGroups(0, newest_version=2))
    run.publish()
    run.publish()
    run.answer("a", 2, shift=0.5)
    run.publish()
    shown = run.publish()
    assert shown == {"weights/logprob_alarms": 0.0}
    assert not run.check.agreed
    assert run.round(("a", None))["weights/logprob_alarms"] == 0.0
    assert run.check.agreed


def test_a_version_that_was_not_scored_says_nothing():
    run = Run()
    run.publish()
    run.answer("a", 99, shift=5.0)
    run.publish()
    assert run.publish() == {"weights/logprob_alarms": 0.0}
    assert not run.check.agreed


def test_nothing_is_scored_in_the_pause_after_a_round(monkeypatch: pytest.MonkeyPatch):
    run = Run()
    monkeypatch.setattr(weight_probe, "PAUSE_PER_COST", 1e12)
    run.round(("a", None))
    scored, asked = run.policy.num_scored, len(run.buffer.probes)
    for _ in range(5):
        run.publish()
    assert (run.policy.num_scored, len(run.buffer.probes)) == (scored, asked)


def test_the_pause_follows_the_cost(monkeypatch: pytest.MonkeyPatch):
    """One percent at most, whatever a scoring pass takes: by a clock that the test moves."""
    now = [0.0]
    monkeypatch.setattr(weight_probe, "PAUSE_PER_COST", 100.0)
    monkeypatch.setattr("learner.monitoring.weight_probe.time.monotonic", lambda: now[0])
    run, cost = Run(), [0.0]
    score = run.policy.__call__

    def slow(batch: TrainingBatch) -> Tensor:
        now[0] += 0.05
        cost[0] += 0.05
        return score(batch)

    run.probe._score = slow
    for _ in range(2000):
        now[0] += 1.0
        run.publish()
        if run.probe._probe is not None and not any(
            r.probe_id == run.buffer.probes[-1].probe_id for r in run.buffer.reports
        ):
            run.answer("a", run.policy.version)
    assert cost[0] > 0.5
    assert cost[0] / now[0] < 0.01


def test_a_round_without_answers_ends(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(weight_probe, "MOST_SECONDS", 0.0)
    monkeypatch.setattr(weight_probe, "PAUSE_PER_COST", 1e12)
    run = Run()
    run.buffer.num_unanswered = 1
    for _ in range(50):
        run.publish()
    assert run.policy.num_scored == weight_probe.MOST_VERSIONS
    assert not run.check.agreed


def test_a_canary_that_says_nothing_any_more_is_replaced_after_the_round(monkeypatch: pytest.MonkeyPatch):
    run = Run()
    run.round(("a", None))
    first = run.buffer.probes[-1].token_ids
    later = make_batch([make_group("h", 1, seed=1)], 3)
    run.probe.begin(later)
    assert run.round(("a", None))["weights/logprob_alarms"] == 0.0
    assert run.buffer.probes[-1].token_ids == first
    # The policy becomes certain: every log-probability is near 0 under every version.
    run.policy.at = lambda version, num_tokens: [-1e-3] * num_tokens  # type: ignore[method-assign]
    run.publish()
    run.probe.begin(later)
    assert run.buffer.probes[-1].token_ids == first
    run.answer("a", run.policy.version)
    monkeypatch.setattr(weight_probe, "PAUSE_PER_COST", 1e12)
    run.publish()
    run.publish()
    run.probe.begin(later)
    run.probe._due = 0.0
    run.publish()
    assert run.buffer.probes[-1].token_ids != first
    assert sorted(run.probe._kept) == [run.policy.version]


def test_a_buffer_that_does_not_answer_is_never_waited_for():
    run = Run()
    run.buffer.silent = True
    for _ in range(5):
        run.publish()
    assert len(run.buffer.probes) == 1


def test_the_learners_memory_of_versions_is_bounded_and_keeps_the_first(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(weight_probe, "MOST_KEPT", 5)
    run = Run()
    run.buffer.num_unanswered = 1
    for _ in range(20):
        run.publish()
    assert sorted(run.probe._kept) == [0, 17, 18, 19, 20]
