import logging
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest

from buffer.trajectory import TrajectoryGroup
from launch.terminal.display import WARNINGS
from learner.batches.batch import TrainingBatch
from learner.monitoring.observer import TROUBLES
from learner.monitoring.step_results import ImportanceWeights, NetworkStep, StepResults
from learner.monitoring.stop_conditions import BOUNDS, WARN_AFTER, DistanceWatch, SignalWatch, StepWatch
from tests.learner.samples import CPU, make_trajectory

pytestmark = pytest.mark.usefixtures("one_rank")


def batch(*rewards: Sequence[float], verdict: str = "wrong", version: int = 0) -> TrainingBatch:
    """A group per sequence of rewards."""
    groups = [
        TrajectoryGroup(
            f"{number}.0",
            number,
            tuple(
                make_trajectory(
                    i, [1, 2], [False, True], group=f"{number}.0", prompt_id=number, reward=reward, verdict=verdict
                )
                for i, reward in enumerate(group)
            ),
        )
        for number, group in enumerate(rewards)
    ]
    return TrainingBatch.from_groups(groups, [0] * len(groups), version, CPU)


@pytest.mark.parametrize(
    ("compares_groups", "rewards", "teaches"),
    [
        (True, ([0, 0], [0, 0]), False),
        (True, ([1, 1], [0, 0]), False),
        (True, ([1, 1], [0, 1]), True),
        (False, ([1, 1], [0, 0]), True),
        (False, ([-1, -1], [-1, -1]), False),
    ],
)
def test_what_teaches_depends_on_what_the_algorithm_compares(
    compares_groups: bool, rewards: tuple[list[float], ...], teaches: bool
):
    watch = SignalWatch(compares_groups=compares_groups, max_batches=1)
    assert (watch.see(batch(*rewards)) is None) is teaches
    assert watch.num_batches == int(not teaches)


@pytest.mark.parametrize("verdict", ["timeout", "error"])
def test_rewards_that_differ_teach_nothing_when_nothing_was_judged(verdict: str):
    watch = SignalWatch(compares_groups=True, max_batches=1)
    reason = watch.see(batch([0, 1], [1, 0], verdict=verdict))
    assert reason is not None and f"judged no completion ({verdict} 100%)" in reason
    assert watch.see(batch([0, 1], [1, 0], verdict="correct")) is None


def test_a_storm_is_said_once_and_its_end_too(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    watch = SignalWatch(compares_groups=True, max_batches=0)
    for version in range(WARN_AFTER + 3):
        assert watch.see(batch([-1, -1], version=version)) is None
    assert watch.num_batches == WARN_AFTER + 3
    assert watch.see(batch([-1, 1], version=9)) is None
    said = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert said == [
        (
            "WARNING",
            "policy 2: nothing to learn from 3 batches in a row: all rewards within every group are equal (mean -1,"
            " verdict wrong 100%)",
        ),
        ("INFO", "policy 9: there is something to learn again after 6 batches without"),
    ]


def test_the_run_ends_at_the_wanted_number_in_a_row():
    watch = SignalWatch(compares_groups=True, max_batches=2)
    assert watch.see(batch([0, 0])) is None
    assert watch.see(batch([0, 1])) is None
    assert watch.see(batch([0, 0])) is None
    reason = watch.see(batch([0, 0], version=5))
    assert reason is not None and reason.startswith("policy 5: nothing to learn from 2 batches in a row")


def step(*, policy: float = 1.0, critic: float = 1.0) -> StepResults:
    """One step of both networks with these gradient norms."""
    return StepResults(policy=NetworkStep(policy, 0.1), critic=NetworkStep(critic, 0.1))


def test_skipped_steps_are_counted_in_a_row_and_in_all(caplog: pytest.LogCaptureFixture):
    watch, seen = StepWatch(2), []
    for norm in (math.inf, 1.0, math.nan):
        seen.append(watch.see(1, [step(policy=norm)])["learner/bad_steps"])
        assert not watch.exhausted
    assert watch.see(4, [step(critic=math.inf), step()]) == {"learner/bad_steps": 3.0}
    assert watch.exhausted and seen == [1.0, 1.0, 2.0]
    assert "policy 4: the step of the critic was skipped" in caplog.records[-1].getMessage()


def test_a_step_of_one_network_alone_is_counted_too():
    watch = StepWatch(1)
    assert watch.see(1, [StepResults(critic=NetworkStep(1.0, 0.1))]) == {"learner/bad_steps": 0.0}
    assert watch.see(2, [StepResults(policy=NetworkStep(math.nan, 0.1))]) == {"learner/bad_steps": 1.0}


NEAR = ImportanceWeights(effective_sample_size=0.3, mean=2.0, std=1.0)


@pytest.mark.parametrize(
    ("name", "value", "phrase"),
    [
        ("effective_sample_size", 0.29, "effective sample size 0.29 is below 0.3"),
        ("mean", 0.49, "mean weight 0.49 is outside 0.5 to 2.0"),
        ("mean", 2.01, "mean weight 2 is outside 0.5 to 2.0"),
        ("std", 1.01, "weight deviation 1 is above 1.0"),
    ],
)
def test_data_beyond_a_bound_is_said_once_and_so_is_its_return(
    caplog: pytest.LogCaptureFixture, name: str, value: float, phrase: str
):
    caplog.set_level(logging.INFO)
    watch, far = DistanceWatch(), replace(NEAR, **{name: value})
    seen = [watch.see(version, weights) for version, weights in enumerate([NEAR, far, far, NEAR, None])]
    counted = [(metrics.get("importance/warning"), metrics.get("importance/far_batches")) for metrics in seen]
    assert counted == [(0, 0), (1, 1), (1, 2), (0, 2), (None, None)]
    assert [record.getMessage() for record in caplog.records] == [
        f"policy 1: this data is far off-policy: {phrase}; lower max_staleness or the learning rate, or choose another"
        " correction",
        "policy 3: the data is near enough to the policy again",
    ]


def test_all_bounds_may_be_crossed_at_once():
    far = ImportanceWeights(effective_sample_size=0.1, mean=0.2, std=4.0)
    assert DistanceWatch().see(1, far) == {"importance/warning": 3.0, "importance/far_batches": 1.0, **BOUNDS}


def test_the_display_has_words_for_every_trouble_it_is_told_of():
    assert {name.partition("/")[2] for name in TROUBLES} <= WARNINGS.keys()
