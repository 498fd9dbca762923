"""Whole runs with the weight probe: the first check, its cost, and an actor whose weights stay old."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from learner import batch_trainer
from learner.algorithms.grpo import GRPO
from learner.batches.batch import TrainingBatch
from learner.config import LoraConfig
from learner.monitoring import weight_probe
from learner.monitoring.logprob_check import LogprobCheck
from tests.learner.scripted_run import ScriptedRun

pytestmark = pytest.mark.usefixtures("one_rank")

Runs = Callable[..., ScriptedRun]


@pytest.fixture
def start_run(tmp_path: Path, socket_folder: Path, model_folder: Path) -> Iterator[Runs]:
    runs: list[ScriptedRun] = []

    def start(**settings: int) -> ScriptedRun:
        runs.append(ScriptedRun(tmp_path, socket_folder, model_folder, **settings))
        return runs[-1]

    yield start
    for run in runs:
        run.close()


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_probe, "PAUSE_PER_COST", 0.0)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The version of every batch that was scored without a gradient, the canary left out."""
    found: list[int] = []
    score = batch_trainer.score_batch

    def counted(network: Any, batch: TrainingBatch, *arguments: Any) -> Any:
        if batch.trajectories[0].group_id != "canary":
            found.append(batch.policy_version)
        return score(network, batch, *arguments)

    monkeypatch.setattr(batch_trainer, "score_batch", counted)
    return found


def scalars(run: ScriptedRun, name: str) -> list[float]:
    events = EventAccumulator(str(run.directory / "tensorboard")).Reload()
    return [event.value for event in events.Scalars(name)] if name in events.Tags()["scalars"] else []


def test_the_first_check_costs_one_pass_and_no_more(start_run: Runs, passes: list[int]):
    run = start_run()
    run.start_actor()
    run.learn(GRPO(), 4)
    assert passes == [0]


def test_with_several_updates_the_checks_pass_is_the_proximal_one(start_run: Runs, passes: list[int]):
    run = start_run(updates=2, max_staleness=4)
    run.start_actor()
    run.learn(GRPO(), 6)
    assert passes == [0, 2, 4]


def test_when_no_batch_can_tell_the_probe_finishes_the_check_at_no_pass(
    start_run: Runs, passes: list[int], monkeypatch: pytest.MonkeyPatch
):
    """As behind a slow learner, whose groups are all a version old."""
    monkeypatch.setattr(LogprobCheck, "can_tell", lambda *_: False)
    run = start_run()
    run.start_actor()
    trainer, _ = run.learn(GRPO(), 8)
    assert trainer._logprobs.agreed
    assert passes == []


def test_a_wrong_temperature_is_refused_also_when_no_batch_can_tell(start_run: Runs, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(LogprobCheck, "can_tell", lambda *_: False)
    run = start_run()
    run.start_actor(temperature=0.7)
    with pytest.raises(weight_probe.LogprobMismatchError, match=r"actor-0: over .* temperature"):
        run.learn(GRPO(), 20)


@pytest.mark.parametrize("lora", [LoraConfig(), LoraConfig(4), LoraConfig(4, publish="merged")], ids=str)
def test_a_right_actor_agrees_after_a_resume_too(start_run: Runs, lora: LoraConfig):
    run = start_run()
    run.start_actor()
    run.learn(GRPO(), 5, lora=lora)
    trainer, _ = run.learn(GRPO(), 12, lora=lora)
    assert trainer._logprobs.agreed
    differences = scalars(run, "weights/logprob_probe")
    assert len(differences) >= 2 and max(differences) < 1e-4
    assert set(scalars(run, "weights/logprob_alarms")) == {0.0}


@pytest.mark.parametrize("lora", [LoraConfig(), LoraConfig(4)], ids=str)
def test_weights_that_never_arrive_are_an_alarm(start_run: Runs, caplog: pytest.LogCaptureFixture, lora: LoraConfig):
    run = start_run()
    run.start_actor(stuck_after=2)
    run.learn(GRPO(), 12, lora=lora)
    assert scalars(run, "weights/logprob_alarms")[-1] == 1.0
    assert max(scalars(run, "weights/logprob_probe")) > 1e-4
    [warning] = [r.message for r in caplog.records if r.name.endswith("weight_probe") and r.levelno >= logging.WARNING]
    assert "actor-0" in warning
