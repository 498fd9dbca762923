"""The training loop: next batch, annotate, advantages, steps, publish, checkpoint, report.

One `Trainer` per rank. Rank 0 also owns the weight store, the checkpoints' names, the event files and the talk with the
buffer about evaluations. The learner is the run's clock: when `run` returns, the run is over.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from concurrent.futures import Future, wait
from dataclasses import asdict, replace
from pathlib import Path

import torch

from buffer.transport.connection import Connection
from buffer.transport.messages import CheckpointCommitted, Manifest, NoMoreBatches, Shard
from learner.algorithms.base import AdvantageInputs, Algorithm
from learner.algorithms.metrics import MetricSums, importance_weights, reference_kl, summarize
from learner.batches.batch import TrainingBatch
from learner.batches.prefetch import Prefetch
from learner.checkpoints.checkpoint import (
    POLICY_PREFIX,
    CheckpointError,
    CheckpointWriteError,
    check_same_adapters,
    read_state,
    sound_checkpoint,
)
from learner.config import LearnerConfig, LoraConfig, ModelConfig, OptimizerConfig
from learner.distributed.collectives import all_reduce_max, all_reduce_sum, any_rank, rank_and_world_size
from learner.distributed.deepspeed_engine import TrainingEngine
from learner.models.policy import PolicyModel
from learner.monitoring.bad_batch import save_bad_batch
from learner.monitoring.logprob_check import LogprobCheck, OlderGroups, say_hello
from learner.monitoring.observer import Observer
from learner.monitoring.step_results import NetworkStep, StepResults
from learner.monitoring.stop_conditions import BadStepsError, DistanceWatch, NoSignalError, SignalWatch, StepWatch
from learner.monitoring.tensorboard import batch_metrics
from learner.networks import Networks
from learner.passes import Annotations, PassAbandonedError, critic_step, policy_step, score_batch
from learner.weights.store import WeightStore

logger = logging.getLogger(__name__)


class Trainer:
    """One rank of the learner.

    Args:
        config: the run.
        model: the policy to start from.
        algorithm: advantages and losses.
        run_dir: checkpoints, weights and event files go here.
        buffer: connection to the buffer.
        store: where versions are published; rank 0 only.
        device: where the networks live.
        stopping: set from outside to end the run soon, with a checkpoint: a batch none of whose optimizer steps is made
            is abandoned between two microbatches, another one finished.

    Raises:
        CheckpointError: when there are checkpoints, none of which this learner can go on from.
    """

    def __init__(
        self,
        config: LearnerConfig,
        model: ModelConfig,
        algorithm: Algorithm,
        *,
        run_dir: Path,
        buffer: Connection,
        store: WeightStore | None,
        device: torch.device,
        stopping: threading.Event,
    ) -> None:
        self.config, self.model_config, self.algorithm = config, model, algorithm
        self.buffer, self.store, self.device, self.stopping = buffer, store, device, stopping
        self.rank, self.world_size = rank_and_world_size()
        self.checkpoints, self.bad_batches = run_dir / "checkpoints", run_dir / "bad_batches"
        self.networks = Networks.load(config, model, algorithm, device)
        self._kl_coef = algorithm.kl_coef
        """The adaptive coefficient; algorithms whose coefficient is not adaptive ignore it."""
        self._saved_version = self._resume()
        """Of the newest checkpoint; -1 before the first."""
        self.version = max(self._saved_version, 0)
        self.observer = Observer(
            buffer, run_dir / "tensorboard", self.version, rank=self.rank, world_size=self.world_size
        )
        self._prefetch = Prefetch(
            buffer,
            self.rank,
            self.world_size,
            device,
            config.batch_timeout_seconds,
            self.networks.policy.attention_crossover_tokens,
        )
        self._publication: Future[Manifest] | None = None
        self._logprobs = LogprobCheck(config.logprob_tolerance, OlderGroups())
        self._step_watch, self._distance_watch = StepWatch(config.max_bad_steps), DistanceWatch()
        self._signal_watch = SignalWatch(
            compares_groups=algorithm.min_group_size > 1, max_batches=config.max_batches_without_signal
        )
        self._shard: Shard | None = None
        self._num_failed_checkpoints = 0
        self._abandons = False
        """Whether the pass under way may be abandoned: no optimizer step of its batch has been made."""

    def run(self) -> None:
        """Train to the last version, or until `stopping` is set; leaves a checkpoint of where it ended.

        Raises:
            RunStoppedError: when the run must not go on: see `learner/monitoring/stop_conditions.py` and
                `learner/monitoring/logprob_check.py`.
            CheckpointWriteError: when the last checkpoint cannot be written.
        """
        try:
            self._say_hello()
            while self.version < self.config.total_steps:
                started = time.monotonic()
                batch = self._next_batch()
                if batch is None or not self._make_version(batch, started):
                    break
                if self._is_due(self.config.checkpoint_every) or self._num_failed_checkpoints:
                    self._checkpoint()
            self._finish()
        finally:
            self._prefetch.close()
            self.observer.close()

    def _make_version(self, batch: TrainingBatch, started: float) -> bool:
        """Train on a batch that was asked for at `started`, publish, report. False when it was abandoned."""
        wait_seconds = time.monotonic() - started
        try:
            metrics, steps = self._train_on(batch)
        except PassAbandonedError:
            logger.info("policy %d: the batch under way is abandoned; a resumed run trains on it", self.version)
            return False
        trained = time.monotonic()
        if self.version < self.config.total_steps:
            # It comes while this version is published, reported and saved.
            self._prefetch.ask(self.version)
        self._publish()
        metrics["learner/wait_seconds"] = wait_seconds
        metrics["learner/train_seconds"] = trained - started - wait_seconds
        metrics["learner/publish_seconds"] = time.monotonic() - trained
        metrics["learner/failed_checkpoints"] = float(self._num_failed_checkpoints)
        metrics |= self._step_watch.see(self.version, steps)
        metrics |= self._distance_watch.see(self.version, steps[-1].importance)
        no_signal = self._signal_watch.see(batch)
        metrics["reward/batches_without_signal"] = float(self._signal_watch.num_batches)
        self.observer.report(batch, metrics, self.version)
        if self._is_due(self.config.evaluate_every) and self.version < self.config.total_steps:
            self.observer.request_evaluation(self.version)
        if self._step_watch.exhausted:
            self._stop_with_bad_batch(metrics)
        if no_signal is not None:
            self._checkpoint(may_fail=False)
            raise NoSignalError(f"{no_signal}; learner.max_batches_without_signal is {self._signal_watch.num_batches}")
        return True

    def _stop_with_bad_batch(self, metrics: dict[str, float]) -> None:
        assert self._shard is not None
        try:
            path = save_bad_batch(self.bad_batches, self.rank, self._shard, metrics)
            saved = f"look at the last one with: python -m learner.monitoring.bad_batch {path}"
        except OSError as error:
            saved = f"the last one could not be saved: {error}"
        raise BadStepsError(
            f"policy {self.version}: {self.config.max_bad_steps} batches in a row had a loss or gradient that was not"
            f" finite (learner.max_bad_steps); {saved}"
        )

    # --- one batch ---------------------------------------------------------------------------------------------------

    def _next_batch(self) -> TrainingBatch | None:
        """This rank's shard, or None when the run is to stop.

        Waits for: the buffer to have a full batch. Unblocked by: actors delivering groups, or `stopping`. Gives up
        after: `batch_timeout_seconds`.
        """
        future = self._prefetch.ask(self.version)
        while not self.stopping.is_set():
            if wait([future], timeout=0.5).done:
                break
            self.observer.heartbeat(self.version, "groups from the actors")
        received = future.result() if future.done() else None
        # All ranks or none: a rank that stopped would leave the others waiting in their first collective.
        if any_rank(received is None, self.device):
            return None
        assert received is not None
        if isinstance(received, NoMoreBatches):
            # Every rank is told the same, so all of them write the checkpoint.
            if self._saved_version != self.version:
                self._checkpoint(may_fail=False)
            raise NoSignalError(f"policy {self.version}: {received.reason}")
        self._shard = received.shard
        # A second witness beside the ledger of what these weights were trained on.
        logger.info("policy %d trains on groups %s", self.version, received.occurrences)
        return received.batch

    def _train_on(self, batch: TrainingBatch) -> tuple[dict[str, float], list[StepResults]]:
        """Make all optimizer steps of one batch. Returns the metrics of the last one, and every step's results.

        Raises:
            PassAbandonedError: when the run is to end and no step was made yet.
        """
        self.observer.heartbeat(self.version)
        self._abandons = True
        if not self._logprobs.agreed:
            self._logprobs.compare(batch, self._score(self.networks.policy, batch))
        annotations = self._annotate(batch)
        metrics, steps = batch_metrics(batch), list[StepResults]()
        for part in batch.split(self.config.updates_per_batch):
            shown, results = self._step(batch, part, annotations)
            metrics |= shown
            steps.append(results)
            if results.reference_kl is not None:
                kl = results.reference_kl
                self._kl_coef = self.algorithm.adapt_kl_coef(self._kl_coef, kl.per_sequence, kl.num_sequences)
        # A batch counts as skipped when any of its steps was, not only the last one.
        if any(step.policy and step.policy.was_skipped for step in steps):
            metrics["policy/skipped"] = 1.0
        if any(step.critic and step.critic.was_skipped for step in steps):
            metrics["value/skipped"] = 1.0
        if self.networks.refresh_reference(self.version, self.config.updates_per_batch):
            logger.info("policy %d is the reference from now on", self.version)
        return metrics, steps

    def _score(self, network: TrainingEngine | PolicyModel, batch: TrainingBatch) -> torch.Tensor:
        return score_batch(network, batch, self.config.tokens_per_microbatch, self._abandoning)

    def _abandoning(self) -> bool:
        return self._abandons and self.stopping.is_set()

    def _annotate(self, batch: TrainingBatch) -> Annotations:
        """Everything about the batch that its optimizer steps hold fixed."""
        networks, scored = self.networks, self.config.updates_per_batch > 1 or self.algorithm.needs_proximal
        proximal = self._score(networks.policy, batch) if scored else None
        reference = self._score(networks.reference, batch) if networks.reference is not None else None
        values = self._score(networks.critic, batch) if networks.critic is not None else None
        kl_coef = self.algorithm.kl_coef_at(self.version, self._kl_coef)
        outputs = self.algorithm.advantages(
            AdvantageInputs(
                rewards=batch.rewards,
                group_index=batch.group_index,
                sequence_index=batch.sequence_index,
                behavior_logprobs=batch.behavior_logprobs,
                values=values,
                proximal_logprobs=proximal,
                ref_logprobs=reference,
                kl_coef=kl_coef,
                reduce=all_reduce_sum,
            )
        )
        return Annotations(outputs.advantages, outputs.returns, values, proximal, reference, kl_coef)

    def _step(
        self, batch: TrainingBatch, part: range, annotations: Annotations
    ) -> tuple[dict[str, float], StepResults]:
        """Make one optimizer step of the policy, and of the critic where there is one; the version goes up by one.

        A step whose loss or gradient is not finite is skipped: the new version has the weights of the previous one.

        Returns: metrics to display, and the results that the run is controlled by; both are equal on every rank.
        """
        kl_coef = self.algorithm.kl_coef_at(self.version, self._kl_coef)
        annotations = replace(annotations, kl_coef=kl_coef)
        networks, sums = self.networks, MetricSums()
        shown: dict[str, float] = {"policy/kl_coef": kl_coef} if networks.reference is not None else {}
        critic = policy = None
        if networks.critic is not None:
            sums = sums + critic_step(
                networks.critic,
                self.algorithm,
                batch=batch,
                part=part,
                annotations=annotations,
                tokens_per_microbatch=self.config.tokens_per_microbatch,
                stopping=self._abandoning,
            )
            critic = self._apply(networks.critic, self.config.critic_optimizer)
            shown |= _optimizer_metrics("value", critic)
        if self.version >= self.config.critic_warmup_steps or networks.critic is None:
            sums = sums + policy_step(
                networks.policy,
                self.algorithm,
                batch=batch,
                part=part,
                annotations=annotations,
                tokens_per_microbatch=self.config.tokens_per_microbatch,
                stopping=self._abandoning,
            )
            policy = self._apply(networks.policy, self.config.optimizer)
            shown |= _optimizer_metrics("policy", policy)
        self.version += 1
        totals = sums.totals(reduce_sum=all_reduce_sum, reduce_max=all_reduce_max)
        results = StepResults(
            policy=policy, critic=critic, importance=importance_weights(totals), reference_kl=reference_kl(totals)
        )
        return shown | summarize(totals), results

    def _apply(self, network: TrainingEngine, optimizer: OptimizerConfig) -> NetworkStep:
        # The batch has an effect from here on: abandoned now, a part of it would be trained on twice.
        self._abandons = False
        rate = optimizer.rate(self.version, self.config.total_steps)
        return NetworkStep(gradient_norm=network.step(rate), learning_rate=rate)

    # --- versions, checkpoints, evaluations --------------------------------------------------------------------------

    def _say_hello(self) -> None:
        # Also a barrier: another rank's batch request that arrived before the hello would be refused.
        older = say_hello(self.buffer, self.version, self.config.updates_per_batch, self.device, self.rank)
        self._logprobs = LogprobCheck(self.config.logprob_tolerance, older)
        self._publish()
        self._await_publication()
        if self.version == 0:
            self.observer.request_evaluation(0)

    def _publish(self) -> None:
        """Every rank gathers; rank 0 copies into the store, which announces the version while training goes on."""
        adapters = self.config.lora.publishes_adapters
        gathered = self.networks.policy.gathered(adapters=adapters)
        policy = ((name.removeprefix(POLICY_PREFIX), tensor) for name, tensor in gathered)
        if self.store is None:
            deque(policy, maxlen=0)
            return
        self._await_publication()
        # Adapters are far smaller than the rounding of the weights they are added to.
        dtype = torch.float32 if adapters else getattr(torch, self.config.publish_dtype)
        self._publication = self.store.publish(self.version, policy, dtype)

    def _await_publication(self) -> None:
        """One version is written at a time, and one that can't be written ends the run instead of starving the actors.

        Waits for: the store's writer. Gives up after: 600 s.
        """
        if self._publication is not None:
            self._publication.result(timeout=600.0)

    def _checkpoint(self, *, may_fail: bool = True) -> None:
        """Write a checkpoint and tell the buffer. One that cannot be written is tried again after the next version."""
        try:
            self.networks.save(
                self.checkpoints,
                self.version,
                model=self.model_config,
                state={"config": asdict(self.config), "algorithm": {"kl_coef": self._kl_coef}},
                keep=self.config.keep_checkpoints,
            )
        except CheckpointWriteError as error:
            if not may_fail:
                raise
            self._num_failed_checkpoints += 1
            logger.error("policy %d has no checkpoint, the next version is tried: %s", self.version, error)
            return
        self._saved_version, self._num_failed_checkpoints = self.version, 0
        if self.rank == 0:
            self.buffer.call(CheckpointCommitted(self.version), timeout_seconds=60.0)

    def _resume(self) -> int:
        """Load the newest sound checkpoint. Returns its version, -1 when there is none."""
        found, problem = -1, ""
        if self.rank == 0:
            try:
                checkpoint = sound_checkpoint(self.checkpoints)
                found = -1 if checkpoint is None else int(checkpoint.name)
            except CheckpointError as error:
                problem = str(error)
        if any_rank(bool(problem), self.device):
            raise CheckpointError(problem or "rank 0 found no sound checkpoint; its log names them")
        version = int(all_reduce_max(torch.tensor([found], device=self.device))[0])
        if version >= 0:
            checkpoint = self.checkpoints / f"{version:08d}"
            state = read_state(checkpoint)
            check_same_adapters(checkpoint, LoraConfig(**state["config"].get("lora", {})), self.config.lora)
            self.networks.restore(checkpoint)
            self._kl_coef = float(state["algorithm"]["kl_coef"])
        return version

    def _finish(self) -> None:
        # First, because a publication may wait for actors that are being ended as well.
        if self._saved_version != self.version:
            self._checkpoint(may_fail=False)
        self._await_publication()
        if self.version >= self.config.total_steps:
            self.observer.last_evaluation(self.version, self.config.evaluation_timeout_seconds, self.stopping)
        self.observer.say_goodbye(self.version)

    def _is_due(self, every: int) -> bool:
        """Whether one of the versions of the last batch was a multiple of `every`."""
        return every > 0 and self.version // every != (self.version - self.config.updates_per_batch) // every


def _optimizer_metrics(name: str, step: NetworkStep) -> dict[str, float]:
    return {
        f"{name}/gradient_norm": step.gradient_norm,
        f"{name}/learning_rate": step.learning_rate,
        f"{name}/skipped": float(step.was_skipped),
    }
