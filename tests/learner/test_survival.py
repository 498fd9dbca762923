"""The training loop under failures, with a real buffer: steps skipped, runs ended, batches abandoned, rollbacks."""

import errno
import itertools
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import learner.checkpoints.checkpoint
import tests.learner.scripted_run
from buffer.ledger.ledger_file import FILE_NAME, LedgerFile
from buffer.trajectory import TrajectoryGroup
from buffer.transport.messages import TensorEntry
from learner.algorithms.base import Algorithm, LossInputs, LossOutputs, ValueLossInputs
from learner.algorithms.grpo import GRPO
from learner.algorithms.ppo import PPO
from learner.checkpoints.checkpoint import CheckpointError, CheckpointWriteError
from learner.checkpoints.manifest import newest_checkpoint
from learner.monitoring.bad_batch import load_bad_batch
from learner.monitoring.stop_conditions import BadStepsError, NoSignalError
from tests.learner.samples import make_group
from tests.learner.scripted_run import GROUPS_PER_BATCH, ScriptedRun
from tests.learner.test_train import Runs, assert_trained_once, scalars, start_run

__all__ = ["start_run"]
pytestmark = pytest.mark.usefixtures("one_rank")

Event = Callable[[str], bool]


@dataclass(frozen=True, kw_only=True)
class Watched(PPO):
    """PPO that calls `event` with the network's name before each loss; True makes that loss NaN."""

    event: Event

    def loss(self, inputs: LossInputs) -> LossOutputs:
        return self._ask("policy", super().loss(inputs))

    def value_loss(self, inputs: ValueLossInputs) -> LossOutputs:
        return self._ask("value", super().value_loss(inputs))

    def _ask(self, name: str, outputs: LossOutputs) -> LossOutputs:
        poison: Tensor | float = float("nan") if self.event(name) else 1.0
        return LossOutputs(outputs.loss * poison, outputs.metrics)


class Published:
    """Records the version that is being trained; pass it to `learn` as `on_publish`."""

    version = 0

    def __call__(self, version: int) -> None:
        self.version = version


def published_weights(manifests: list[Any]) -> list[tuple[TensorEntry, ...]]:
    return [manifest.tensors for manifest in manifests]


@pytest.mark.parametrize("network", ["policy", "value"])
def test_a_step_that_is_not_finite_is_skipped_and_the_run_goes_on(start_run: Runs, network: str):
    run, published = start_run(), Published()
    run.start_actor()
    algorithm = Watched(event=lambda name: name == network and published.version == 2)
    trainer, manifests = run.learn(algorithm, 4, on_publish=published)
    assert trainer.version == 4
    assert_trained_once(run, 4, max_staleness=2)
    weights = published_weights(manifests)
    # After a skipped step the version number goes up and the weights stay the same.
    assert (weights[3] == weights[2]) is (network == "policy")
    assert len({weights[0], weights[1], weights[2], weights[4]}) == 4
    assert scalars(run, f"{network}/skipped") == {1: 0, 2: 0, 3: 1, 4: 0}
    assert scalars(run, "learner/bad_steps") == {1: 0, 2: 0, 3: 1, 4: 1}


def test_too_many_of_them_in_a_row_end_the_run_with_the_batch_on_disk(start_run: Runs):
    run, published = start_run(), Published()
    run.start_actor()
    algorithm = Watched(event=lambda name: published.version >= 2)
    with pytest.raises(
        BadStepsError, match=r"policy 4: 2 batches in a row .*python -m learner\.monitoring\.bad_batch .*/00000003"
    ):
        run.learn(algorithm, 9, on_publish=published, max_bad_steps=2, checkpoint_every=2)
    shard, groups = load_bad_batch(run.directory / "bad_batches" / "00000003-rank-0.msgpack")
    assert shard.policy_version == 3 and len(groups) == GROUPS_PER_BATCH
    # Without the faulty loss the run continues from its last checkpoint.
    run.learn(PPO(), 5, checkpoint_every=2)
    assert run.audit().problems == () and run.audit().counts["done"] == 5 * GROUPS_PER_BATCH


def equal_rewards(*arguments: Any, **named: Any) -> TrajectoryGroup:
    group = make_group(*arguments, **named)
    members = tuple(replace(t, reward=-1.0, reward_breakdown={"answer": -1.0}) for t in group.trajectories)
    return replace(group, trajectories=members)


@pytest.mark.parametrize("algorithm", [GRPO(), PPO()], ids=["grpo", "ppo"])
def test_a_storm_of_equal_rewards_ends_the_run_when_told_so(
    start_run: Runs, monkeypatch: pytest.MonkeyPatch, algorithm: Algorithm
):
    monkeypatch.setattr(tests.learner.scripted_run, "make_group", equal_rewards)
    run = start_run()
    run.start_actor()
    with pytest.raises(NoSignalError, match=r"2 batches in a row: all rewards .* are equal \(mean -1"):
        run.learn(algorithm, 9, max_batches_without_signal=2)
    assert newest_checkpoint(run.directory / "checkpoints") == run.directory / "checkpoints" / "00000002"
    assert_trained_once(run, 2, max_staleness=2)
    assert scalars(run, "reward/batches_without_signal") == {1: 1, 2: 2}


def test_an_interrupt_in_the_middle_of_a_step_abandons_it(start_run: Runs):
    run, published = start_run(), Published()
    run.start_actor()
    asked = itertools.count()

    def interrupt(name: str) -> bool:
        if published.version == 2:
            next(asked)
            run.stopping.set()
        return False

    trainer, _ = run.learn(Watched(event=interrupt), 5, on_publish=published, tokens_per_microbatch=30)
    # The batch of sixteen trajectories was abandoned after one microbatch of the critic.
    assert trainer.version == 2 and next(asked) == 1
    assert newest_checkpoint(run.directory / "checkpoints") == run.directory / "checkpoints" / "00000002"
    run.stopping.clear()
    trainer, manifests = run.learn(PPO(), 5)
    assert manifests[0].policy_version == 2 and trainer.version == 5
    assert_trained_once(run, 5, max_staleness=2)


def test_a_batch_that_has_had_an_effect_is_finished_before_the_end(start_run: Runs):
    """The critic has made its step when the policy's pass begins. If abandoned then, the critic would train twice."""
    run, published = start_run(updates=2, max_staleness=2), Published()
    run.start_actor()

    def interrupt(name: str) -> bool:
        if published.version == 2 and name == "policy":
            run.stopping.set()
        return False

    trainer, _ = run.learn(Watched(event=interrupt), 8, on_publish=published)
    assert trainer.version == 4
    run.stopping.clear()
    run.learn(PPO(), 8)
    assert run.audit().problems == () and run.audit().counts["done"] == 4 * GROUPS_PER_BATCH


def fail_first(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Make the first `number` checkpoints fail as on a broken disk. A full one would be waited for at the end."""
    write, calls = learner.checkpoints.checkpoint.write_manifest, itertools.count()

    def write_manifest(folder: Path) -> None:
        if next(calls) < number:
            raise OSError(errno.EIO, "Input/output error")
        write(folder)

    monkeypatch.setattr(learner.checkpoints.checkpoint, "write_manifest", write_manifest)


def test_a_checkpoint_that_cannot_be_written_is_tried_again_and_nothing_counts_as_done(
    start_run: Runs, monkeypatch: pytest.MonkeyPatch
):
    fail_first(monkeypatch, 2)
    run, done = start_run(), {}
    run.start_actor()

    def look(version: int) -> None:
        done[version] = run.audit().counts["done"]

    run.learn(GRPO(), 6, checkpoint_every=2, on_publish=look)
    # The checkpoint due at version 2 is tried at 2, 3 and 4; the next one is due at 6.
    assert [done[version] for version in (3, 4, 5, 6)] == [0, 0, 4 * GROUPS_PER_BATCH, 4 * GROUPS_PER_BATCH]
    assert scalars(run, "learner/failed_checkpoints") == {1: 0, 2: 0, 3: 1, 4: 2, 5: 0, 6: 0}
    assert sorted(path.name for path in (run.directory / "checkpoints").iterdir()) == ["00000004", "00000006"]
    assert_trained_once(run, 6, max_staleness=2)


def test_a_last_checkpoint_that_cannot_be_written_is_an_error(start_run: Runs, monkeypatch: pytest.MonkeyPatch):
    fail_first(monkeypatch, 99)
    run = start_run()
    run.start_actor()
    with pytest.raises(CheckpointWriteError, match="Input/output error"):
        run.learn(GRPO(), 2)
    monkeypatch.undo()
    assert run.audit().counts["done"] == 0 and newest_checkpoint(run.directory / "checkpoints") is None
    run.learn(GRPO(), 2)
    assert_trained_once(run, 2, max_staleness=2)


def test_the_ledger_is_durable_before_a_checkpoint_has_its_name(start_run: Runs, monkeypatch: pytest.MonkeyPatch):
    run, seen = start_run(), list[list[str]]()
    run.start_actor()
    make_durable = LedgerFile.make_durable

    def watched(file: LedgerFile) -> None:
        seen.append(sorted(path.name for path in (run.directory / "checkpoints").glob("*")))
        make_durable(file)

    monkeypatch.setattr(LedgerFile, "make_durable", watched)
    run.learn(GRPO(), 2, checkpoint_every=1)
    # The first is the hello.
    assert seen == [[], ["00000001.incomplete"], ["00000001", "00000002.incomplete"]]


def test_a_learner_ahead_of_the_ledger_refuses_with_one_sentence(
    start_run: Runs, socket_folder: Path, model_folder: Path
):
    run = start_run()
    run.start_actor()
    run.learn(GRPO(), 2)
    run.close()
    for file in run.directory.glob(f"{FILE_NAME}*"):
        file.unlink()
    with_older_ledger = ScriptedRun(run.directory, socket_folder, model_folder)
    try:
        with pytest.raises(
            CheckpointError, match=r"starts at policy 2, but the ledger .* only up to policy 0: .* resume"
        ):
            with_older_ledger.learn(GRPO(), 4)
    finally:
        with_older_ledger.close()
    assert newest_checkpoint(run.directory / "checkpoints") == run.directory / "checkpoints" / "00000002"


def test_behind_a_broken_checkpoint_its_groups_are_sampled_again(start_run: Runs):
    """The groups were done and their contents deleted. Their prompts are leased once more, and none is skipped."""
    run = start_run()
    run.start_actor()
    run.learn(GRPO(), 4, checkpoint_every=2)
    (run.directory / "checkpoints" / "00000004" / "policy_state" / "state" / "mp_rank_00_model_states.pt").write_text(
        ""
    )
    trainer, manifests = run.learn(GRPO(), 6, checkpoint_every=2)
    assert manifests[0].policy_version == 2 and trainer.version == 6
    assert run.audit().counters["resampled"] == 2 * GROUPS_PER_BATCH
    assert run.audit().problems == () and run.audit().counts["done"] == 6 * GROUPS_PER_BATCH
    issued = 6 * GROUPS_PER_BATCH + run.audit().counts["leased"] + run.audit().counts["ready"]
    assert run.audit().issued == issued + run.audit().counts["pending"]
    assert (run.directory / "checkpoints" / "00000004").is_dir()


def test_when_every_checkpoint_is_broken_the_learner_refuses_to_forget_the_run(start_run: Runs):
    run = start_run()
    run.start_actor()
    run.learn(GRPO(), 2)
    shutil.rmtree(run.directory / "checkpoints" / "00000002" / "policy")
    with pytest.raises(CheckpointError, match=r"none of the 1 checkpoints .* sound .*policy/config.json is missing"):
        run.learn(GRPO(), 4)
    assert run.audit().counts["done"] == 2 * GROUPS_PER_BATCH
