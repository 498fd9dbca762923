import math
import re
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from buffer.transport.messages import Manifest, Peer
from buffer.weights.shared_memory import Segment
from learner.algorithms.base import Algorithm, LossInputs, LossOutputs
from learner.algorithms.corrections import VTrace
from learner.algorithms.grpo import GRPO
from learner.algorithms.ppo import PPO
from learner.batch_trainer import BatchTrainer
from learner.batches.batch import TrainingBatch
from learner.batches.prefetch import Prefetch
from learner.checkpoints.manifest import newest_checkpoint
from learner.monitoring.logprob_check import LogprobMismatchError
from learner.monitoring.tensorboard import LAYOUT
from learner.networks import Networks
from learner.weights.store import WeightStore
from tests.learner.samples import plain_model
from tests.learner.scripted_run import GROUPS_PER_BATCH, ScriptedRun

pytestmark = pytest.mark.usefixtures("one_rank")

Runs = Callable[..., ScriptedRun]


@pytest.fixture
def start_run(tmp_path: Path, socket_folder: Path, model_folder: Path) -> Iterator[Runs]:
    runs: list[ScriptedRun] = []

    def start(name: str = "run", **settings: int) -> ScriptedRun:
        directory, sockets = tmp_path / name, socket_folder / name
        directory.mkdir()
        sockets.mkdir()
        runs.append(ScriptedRun(directory, sockets, model_folder, **settings))
        return runs[-1]

    yield start
    for run in runs:
        run.close()


def scalars(run: ScriptedRun, name: str) -> dict[int, float]:
    return {event.step: event.value for event in event_file(run).Scalars(name)}


def event_file(run: ScriptedRun) -> EventAccumulator:
    return EventAccumulator(str(run.directory / "tensorboard")).Reload()


def assert_trained_once(run: ScriptedRun, num_batches: int, max_staleness: int) -> None:
    """Assert that every batch was trained on, each group once and within the bound, and that all groups are done."""
    ledger = run.audit()
    assert ledger.problems == ()
    assert (ledger.counts["used"], ledger.counts["done"]) == (0, num_batches * GROUPS_PER_BATCH)
    assert ledger.staleness_max <= max_staleness


@pytest.mark.parametrize("algorithm", [GRPO(), PPO(correction=VTrace())], ids=["grpo", "ppo-vtrace"])
def test_a_run_trains_publishes_evaluates_and_ends_with_a_checkpoint(
    start_run: Runs, model_folder: Path, algorithm: Algorithm
):
    run = start_run(max_staleness=2)
    run.start_actor()
    trainer, manifests = run.learn(algorithm, 5, evaluate_every=2)
    assert trainer.version == 5
    assert [manifest.policy_version for manifest in manifests] == [0, 1, 2, 3, 4, 5]
    assert len({manifest.tensors for manifest in manifests}) == 6
    assert_trained_once(run, 5, max_staleness=2)
    norms = scalars(run, "policy/gradient_norm")
    assert sorted(norms) == [1, 2, 3, 4, 5]
    assert all(0 < norm < math.inf for norm in norms.values())
    assert scalars(run, "evaluation/pass_at_1").keys() >= {0, 5}
    assert max(scalars(run, "staleness/max").values()) == run.audit().staleness_max
    shown = event_file(run).Tags()["scalars"]
    charts = [tag for page in LAYOUT.values() for _, tags in page.values() for tag in tags]
    assert [tag for tag in charts if not any(re.fullmatch(tag, name) for name in shown)] == []
    names = {entry.name for entry in manifests[0].tensors}
    assert names == {name for name, _ in plain_model(model_folder).named_parameters()}
    trained = AutoModelForCausalLM.from_pretrained(run.directory / "checkpoints" / "00000005" / "policy").state_dict()
    base = plain_model(model_folder).state_dict()
    assert any(not torch.equal(trained[name], base[name]) for name in base)


def test_several_updates_per_batch_with_a_reference(start_run: Runs, monkeypatch: pytest.MonkeyPatch):
    run = start_run(max_staleness=4, updates=2)
    events: list[str] = []

    class Recorded(Prefetch):
        def ask(self, policy_version: int) -> Any:
            events.append(f"ask {policy_version}")
            return super().ask(policy_version)

    monkeypatch.setattr("learner.train.Prefetch", Recorded)
    run.start_actor(temperature=0.7)
    algorithm = PPO(kl="reward", kl_coef=0.01)
    trainer, manifests = run.learn(
        algorithm,
        6,
        temperature=0.7,
        checkpoint_every=2,
        on_publish=lambda version: events.append(f"publish {version}"),
    )
    assert trainer.version == 6
    # The learner asks for a batch after its version exists and before that version is published.
    assert list(dict.fromkeys(events)) == [
        *("publish 0", "ask 0", "ask 2", "publish 2", "ask 4", "publish 4", "publish 6"),
    ]
    # Published once per batch; both optimizer steps count.
    assert [manifest.policy_version for manifest in manifests] == [0, 2, 4, 6]
    assert_trained_once(run, 3, max_staleness=4)
    assert sorted(scalars(run, "value/gradient_norm")) == [2, 4, 6]
    assert scalars(run, "policy/reference_kl_k3")[6] > scalars(run, "policy/reference_kl_k3")[2] > 0
    assert sorted(path.name for path in (run.directory / "checkpoints").iterdir()) == ["00000004", "00000006"]


@pytest.mark.parametrize("algorithm", [GRPO(), PPO(correction=VTrace())], ids=["grpo", "ppo-vtrace"])
def test_a_batch_of_groups_of_two_sizes_trains(start_run: Runs, algorithm: Algorithm):
    """Such batches occur when the curriculum's next stage samples larger groups."""
    run = start_run(max_staleness=2, updates=2)
    run.start_actor(sizes=(2, 5))
    run.learn(algorithm, 2)
    assert_trained_once(run, 1, max_staleness=2)
    norms = scalars(run, "policy/gradient_norm")
    assert all(0 < norm < math.inf for norm in norms.values()) and norms


def test_while_the_critic_warms_up_the_policy_stays(start_run: Runs):
    run = start_run()
    run.start_actor()
    _, manifests = run.learn(PPO(), 4, critic_warmup_steps=2)
    weights = [manifest.tensors for manifest in manifests]
    assert weights[0] == weights[1] == weights[2] != weights[3] != weights[4]
    assert sorted(scalars(run, "policy/gradient_norm")) == [3, 4]
    assert sorted(scalars(run, "value/gradient_norm")) == [1, 2, 3, 4]


def test_an_interrupted_run_leaves_a_checkpoint_and_goes_on_from_it(start_run: Runs):
    run = start_run()
    run.start_actor()

    def interrupt(version: int) -> None:
        if version == 2:
            run.stopping.set()

    trainer, before = run.learn(PPO(), 5, on_publish=interrupt)
    assert trainer.version == 2
    assert newest_checkpoint(run.directory / "checkpoints") == run.directory / "checkpoints" / "00000002"
    run.stopping.clear()
    trainer, manifests = run.learn(PPO(), 5)
    assert trainer.version == 5
    assert manifests[0].tensors == before[-1].tensors
    assert [manifest.policy_version for manifest in manifests] == [2, 3, 4, 5]
    assert_trained_once(run, 5, max_staleness=2)
    assert sorted(scalars(run, "policy/gradient_norm")) == [1, 2, 3, 4, 5]


def test_what_a_crashed_learner_trained_after_its_checkpoint_is_trained_again(start_run: Runs):
    run = start_run()
    run.start_actor()

    def crash(version: int) -> None:
        if version == 4:
            raise RuntimeError("the machine died")

    with pytest.raises(RuntimeError, match="the machine died"):
        run.learn(GRPO(), 6, checkpoint_every=2, on_publish=crash)
    trainer, manifests = run.learn(GRPO(), 6, checkpoint_every=2)
    assert trainer.version == 6 and manifests[0].policy_version == 2
    assert run.audit().counters["rolled_back"] >= 2 * GROUPS_PER_BATCH
    ledger = run.audit()
    assert ledger.problems == () and ledger.counts["done"] == 6 * GROUPS_PER_BATCH


def test_a_finished_run_that_is_started_again_only_ends(start_run: Runs):
    run = start_run()
    run.start_actor()
    run.learn(GRPO(), 2)
    trainer, manifests = run.learn(GRPO(), 2)
    assert trainer.version == 2 and [manifest.policy_version for manifest in manifests] == [2]
    assert_trained_once(run, 2, max_staleness=2)


def test_an_adaptive_penalty_and_a_moving_reference_go_on_where_they_stopped(start_run: Runs):
    """In turns, a seed determines the weights. A run that stops at version 3 and resumes ends with the same weights."""
    algorithm = PPO(
        **{"kl": "loss", "kl_coef": 0.1, "kl_schedule": "adaptive", "kl_target": 1e-4, "kl_horizon": 100.0},
        reference_refresh_every=2,
    )
    finals, coefficients = [], []
    for name, stops in (("straight", [5]), ("stopped", [3, 5])):
        run = start_run(name, max_staleness=0)
        run.start_actor()
        for stop in stops:

            def stop_there(version: int, last: int = stop, run: ScriptedRun = run) -> None:
                if version == last:
                    run.stopping.set()

            run.stopping.clear()
            trainer, manifests = run.learn(algorithm, 5, on_publish=stop_there)
            assert trainer.version == stop
        finals.append(manifests[-1].tensors)
        coefficients.append(scalars(run, "policy/kl_coef"))
        assert (run.directory / "checkpoints" / "00000005" / "reference.pt").is_file()
    assert finals[0] == finals[1]
    assert coefficients[0] == coefficients[1] and sorted(coefficients[0]) == [1, 2, 3, 4, 5]
    assert coefficients[0][1] == pytest.approx(0.1) and len(set(coefficients[0].values())) == 5
    distances = scalars(run, "policy/reference_kl_k3")
    # The reference is the policy itself right after versions 2 and 4.
    assert distances[1] == distances[3] == distances[5] == 0 < min(distances[2], distances[4])


def test_log_probabilities_of_another_distribution_are_refused_with_the_largest_difference(start_run: Runs):
    run = start_run()
    run.start_actor(shift=0.25)
    with pytest.raises(
        LogprobMismatchError, match=r"policy 0: .* by 0\.2500 on average and by 0\.250\d at most over \d+ tokens"
    ):
        run.learn(GRPO(), 2, logprob_tolerance=0.02)
    assert newest_checkpoint(run.directory / "checkpoints") is None


def test_an_actor_that_samples_at_another_temperature_is_refused(start_run: Runs):
    run = start_run()
    run.start_actor(temperature=1.0)
    with pytest.raises(LogprobMismatchError, match=r"learner\.logprob_tolerance=0\.02.*temperature"):
        run.learn(GRPO(), 2, temperature=0.5, logprob_tolerance=0.02)


def test_a_version_that_cannot_be_written_ends_the_run(start_run: Runs):
    run = start_run()
    run.start_actor()

    def lose_the_folder(version: int) -> None:
        if version == 1:
            shutil.rmtree(run.directory / "weights")

    with pytest.raises(OSError, match=r"policy 1 cannot be published to .*/weights: No such file or directory; make"):
        run.learn(GRPO(), 5, on_publish=lose_the_folder)


def test_without_actors_it_waits_and_says_so_until_it_is_stopped(start_run: Runs):
    run = start_run()

    def stop_when_shown() -> None:
        deadline = time.monotonic() + 60
        while not any(peer.waiting_for == "groups from the actors" for peer in run.status().peers):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        run.stopping.set()

    with ThreadPoolExecutor(1) as executor:
        stopped = executor.submit(stop_when_shown)
        trainer, _ = run.learn(GRPO(), 2)
        stopped.result()
    assert trainer.version == 0


def test_a_version_that_cannot_be_published_ends_the_wait_for_groups_that_nobody_can_sample(
    start_run: Runs, monkeypatch: pytest.MonkeyPatch
):
    run = start_run(max_staleness=0)

    def fail_later(store: WeightStore, policy_version: int, segment: Segment, started: float) -> Manifest:
        if policy_version:
            raise OSError("no room")
        return announce(store, policy_version, segment, started)

    announce = WeightStore._announce
    monkeypatch.setattr(WeightStore, "_announce", fail_later)
    run.start_actor()
    # With staleness 0 no group comes before the actor has the version.
    with pytest.raises(OSError, match="no room"):
        run.learn(GRPO(), 5)


def test_a_step_that_takes_long_is_shown_as_training_and_not_as_silence(start_run: Runs):
    run = start_run()
    run.start_actor()
    seen: list[Peer] = []

    class Slow(GRPO):
        def loss(self, inputs: LossInputs) -> LossOutputs:
            deadline = time.monotonic() + 60
            while not seen or seen[-1].activity_seconds < 2.0:
                assert time.monotonic() < deadline
                seen.extend(peer for peer in run.status().peers if peer.activity.startswith("trains"))
                time.sleep(0.05)
            return super().loss(inputs)

    run.learn(Slow(), 1)
    assert {peer.activity for peer in seen} == {"trains on the batch for policy 0"}
    # A heartbeat in the middle of the step: longer at it than silent.
    assert any(peer.silent_seconds < peer.activity_seconds - 0.5 for peer in seen)


def test_a_model_that_takes_long_to_load_is_shown_also_after_a_restart(
    start_run: Runs, monkeypatch: pytest.MonkeyPatch
):
    run = start_run()
    run.start_actor()
    run.learn(GRPO(), 1)
    load, seen = Networks.load, list[Peer]()

    def slow(*arguments: Any) -> Networks:
        deadline = time.monotonic() + 60
        while not seen:
            assert time.monotonic() < deadline
            seen.extend(peer for peer in run.status().peers if peer.activity == "loads the model")
            time.sleep(0.05)
        return load(*arguments)

    monkeypatch.setattr(Networks, "load", slow)
    run.learn(GRPO(), 2)
    assert (seen[0].name, seen[0].policy_version) == ("learner-0", -1)
    assert seen[0].limit_seconds > 3600


def test_an_interrupt_while_waiting_ends_the_run_at_once(start_run: Runs):
    run = start_run()
    run.stopping.set()
    trainer, manifests = run.learn(GRPO(), 2)
    assert trainer.version == 0 and [manifest.policy_version for manifest in manifests] == [0]
    # Nothing was trained, so there is nothing to save.
    assert newest_checkpoint(run.directory / "checkpoints") is None


def test_a_batch_that_ends_the_learner_twice_is_set_aside_and_the_run_goes_on(
    start_run: Runs, monkeypatch: pytest.MonkeyPatch
):
    run = start_run(max_staleness=2)
    run.start_actor()
    train_on, failed_on = BatchTrainer.train_on, []

    def fail(trainer: BatchTrainer, batch: TrainingBatch, *arguments: Any) -> Any:
        groups = {trajectory.group_id for trajectory in batch.trajectories}
        if "5.0" in groups:
            failed_on.append(groups)
            raise IndexError("index out of range in self")
        return train_on(trainer, batch, *arguments)

    monkeypatch.setattr(BatchTrainer, "train_on", fail)
    for _ in range(2):
        with pytest.raises(IndexError):
            run.learn(GRPO(), 4, checkpoint_every=1)
    trainer, _ = run.learn(GRPO(), 4, checkpoint_every=1)
    assert trainer.version == 4
    assert len(failed_on) == 2 and failed_on[0] == failed_on[1]
    found = run.audit()
    assert found.dropped == {"poison": GROUPS_PER_BATCH} and found.holds
    assert not (run.directory / "failed_batch.json").exists()
