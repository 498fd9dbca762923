"""The training loop: get a batch, train on it, publish, report, checkpoint.

One `Trainer` per rank. Rank 0 also owns the weight store, chooses the checkpoint to resume from, writes the event files
and asks the buffer for evaluations. The run ends when `run` returns.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from concurrent.futures import Future, wait
from dataclasses import asdict
from pathlib import Path

import torch

from buffer.transport.connection import Connection
from buffer.transport.messages import CheckpointBegun, CheckpointCommitted, Manifest, NoMoreBatches, Shard
from learner.algorithms.base import Algorithm
from learner.batch_trainer import BatchTrainer
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
from learner.config import LearnerConfig, LoraConfig, ModelConfig
from learner.distributed.collectives import all_reduce_max, any_rank, rank_and_world_size
from learner.monitoring.bad_batch import save_bad_batch
from learner.monitoring.failed_batch import (
    forget_failed_batch,
    load_failed_batch,
    may_be_the_batchs,
    save_failed_batch,
)
from learner.monitoring.heartbeat import Heartbeats
from learner.monitoring.logprob_check import LogprobCheck, OlderGroups, say_hello
from learner.monitoring.observer import Observer
from learner.monitoring.patient_requests import BatchWait, PatientRequests
from learner.monitoring.stop_conditions import BadStepsError, DistanceWatch, NoSignalError, SignalWatch, StepWatch
from learner.monitoring.weight_probe import WeightProbe
from learner.networks import Networks
from learner.passes import PassAbandonedError
from learner.weights.store import Publisher

logger = logging.getLogger(__name__)

CONFIRMATION = "the buffer to record the checkpoint"
SPACE_SECONDS = 3.0
"""Interval between two attempts to write the last checkpoint to a full disk."""


class Trainer:
    """One rank of the learner.

    Args:
        config: the run.
        model: the policy to start from.
        algorithm: advantages and losses.
        run_dir: folder of the checkpoints, weights and event files.
        buffer: connection to the buffer.
        store: publishes versions; None except on rank 0.
        device: device of the networks.
        stopping: set from outside to end the run soon, with a checkpoint. A batch without an optimizer step so far is
            then abandoned between two microbatches; any other batch is finished.

    Raises:
        CheckpointError: there are checkpoints, but this learner can resume from none of them.
    """

    def __init__(
        self,
        config: LearnerConfig,
        model: ModelConfig,
        algorithm: Algorithm,
        *,
        run_dir: Path,
        buffer: Connection,
        store: Publisher | None,
        device: torch.device,
        stopping: threading.Event,
    ) -> None:
        self.config, self.model_config, self.algorithm = config, model, algorithm
        self.buffer, self.store, self.device, self.stopping = buffer, store, device, stopping
        self.rank, self.world_size = rank_and_world_size()
        self.run_dir = run_dir
        self.checkpoints, self.bad_batches = run_dir / "checkpoints", run_dir / "bad_batches"
        heartbeats = Heartbeats(buffer, self.rank)
        heartbeats.say(-1, activity="loads the model")
        self.networks = Networks.load(config, model, algorithm, device)
        heartbeats.say(-1, activity="loads the newest checkpoint")
        self._batch_trainer = BatchTrainer(config, algorithm, self.networks, stopping, heartbeats.pace.end_piece)
        self._saved_version = self._resume()
        """Version of the newest checkpoint; -1 before the first."""
        self.version = max(self._saved_version, 0)
        self._requests = PatientRequests(
            buffer, lambda what: self.observer.heartbeat(self.version, what), stopping, device
        )
        self.observer = Observer(
            *(buffer, heartbeats, self._requests, run_dir / "tensorboard", self.version),
            rank=self.rank,
            world_size=self.world_size,
        )
        self._prefetch = Prefetch(
            buffer,
            self.rank,
            self.world_size,
            device,
            self.networks.policy.attention_crossover_tokens,
        )
        self._publication: Future[Manifest] | None = None
        self._logprobs = LogprobCheck(config.logprob_tolerance, OlderGroups())
        self._weight_probe = WeightProbe(
            buffer, self._batch_trainer.score, tolerance=config.logprob_tolerance, rank=self.rank, device=device
        )
        self._step_watch, self._distance_watch = StepWatch(config.max_bad_steps), DistanceWatch()
        self._signal_watch = SignalWatch(
            compares_groups=algorithm.min_group_size > 1, max_batches=config.max_batches_without_signal
        )
        self._shard: Shard | None = None
        self._num_failed_checkpoints = 0
        """Consecutive checkpoints that could not be written."""

    def run(self) -> None:
        """Train to the last version, or until `stopping` is set. Leaves a checkpoint of the version reached.

        Raises:
            RunStoppedError: when a stop condition ends the run: see `learner/monitoring/stop_conditions.py` and
                `learner/monitoring/logprob_check.py`.
            CheckpointWriteError: when the last checkpoint cannot be written.
        """
        try:
            if not self._say_hello():
                return
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
        """Train on a batch that was requested at `started`, publish, report. False if the batch was abandoned."""
        wait_seconds = time.monotonic() - started
        try:
            self.observer.heartbeat(self.version, activity=f"trains on the batch for policy {self.version}")
            self._weight_probe.begin(batch)
            metrics, steps = self._batch_trainer.train_on(batch, self.version, self._logprobs)
        except PassAbandonedError:
            logger.info("policy %d: the current batch is abandoned; a resumed run trains on it", self.version)
            return False
        except Exception as error:
            if self._shard is not None and may_be_the_batchs(error, self.world_size):
                groups = [packed.header.group_id for packed in self._shard.groups]
                save_failed_batch(self.run_dir, self.version, groups, error)
            raise
        self.version += len(steps)
        trained = time.monotonic()
        if self.version < self.config.total_steps:
            # The next batch arrives while this version is published, reported and saved.
            self._prefetch.ask(self.version)
        self._publish()
        metrics["learner/wait_seconds"] = wait_seconds
        metrics["learner/train_seconds"] = trained - started - wait_seconds
        metrics["learner/publish_seconds"] = time.monotonic() - trained
        metrics |= self._weight_probe.see(self.version, self._logprobs)
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
            self._last_checkpoint()
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
        """Return this rank's shard of the next batch, or None when the run is about to end.

        Waits for: a full batch in the buffer. Unblocked by: actors that deliver groups, or `stopping`. Gives up when
        the version that the actors wait for could not be published.
        """
        self.observer.doing(self.version, "")
        future, shown = self._prefetch.ask(self.version), BatchWait(self.buffer)
        while not self.stopping.is_set():
            if wait([future], timeout=0.5).done:
                break
            self.observer.heartbeat(self.version, "groups from the actors")
            shown.go_on()
            if self._publication is not None and self._publication.done():
                self._publication.result()
        shown.end()
        received = future.result() if future.done() else None
        self.observer.doing(self.version, f"meets the other ranks at policy {self.version}")
        # All ranks stop or none: if one stopped alone, the others would wait for it in their first collective.
        if any_rank(received is None, self.device):
            return None
        assert received is not None
        if isinstance(received, NoMoreBatches):
            # Every rank gets this answer, so all of them write the checkpoint together.
            if self._saved_version != self.version:
                self._last_checkpoint()
            raise NoSignalError(f"policy {self.version}: {received.reason}")
        self._shard = received.shard
        # The log is a second record, besides the ledger, of the groups that these weights were trained on.
        logger.info("policy %d trains on groups %s", self.version, received.occurrences)
        return received.batch

    # --- versions, checkpoints, evaluations --------------------------------------------------------------------------

    def _say_hello(self) -> bool:
        """Begin with the buffer and publish the first version. False when `stopping` ended the wait for the buffer."""
        self.observer.doing(self.version, f"begins at policy {self.version}")
        # Also a barrier, because the buffer would refuse another rank's batch request that arrived before the hello.
        updates, failed = self.config.updates_per_batch, load_failed_batch(self.run_dir)
        older = say_hello(self._requests, self.version, updates, self.device, failed)
        if older is None:
            return False
        if self.rank == 0:
            forget_failed_batch(self.run_dir)
        self._logprobs = LogprobCheck(self.config.logprob_tolerance, older)
        self._publish()
        self._await_publication()
        if self.version == 0:
            self.observer.request_evaluation(0)
        return True

    def _publish(self) -> None:
        """Publish the version: all ranks gather; rank 0 copies to the store, which announces it in the background."""
        self.observer.doing(self.version, f"publishes policy {self.version}")
        adapters = self.config.lora.publishes_adapters
        gathered = self.networks.policy.gathered(adapters=adapters)
        policy = ((name.removeprefix(POLICY_PREFIX), tensor) for name, tensor in gathered)
        if self.store is None:
            deque(policy, maxlen=0)
            return
        self._await_publication()
        # Adapters stay float32: they are far smaller than the rounding errors of the weights they are added to.
        dtype = torch.float32 if adapters else getattr(torch, self.config.publish_dtype)
        self._publication = self.store.publish(self.version, policy, dtype)

    def _await_publication(self) -> None:
        """Wait until the previous version is written; raise its error, because actors would starve without it.

        Waits for: the store's writer. Unblocked by: its end or its error.
        """
        if self._publication is not None:
            self._publication.result()

    def _checkpoint(self) -> None:
        """Write a checkpoint; a failed one is retried after the next version."""
        try:
            self._write_checkpoint()
        except CheckpointWriteError as error:
            self._num_failed_checkpoints += 1
            logger.error("policy %d has no checkpoint, the next version is tried: %s", self.version, error)

    def _last_checkpoint(self) -> None:
        """Write the checkpoint after which the learner ends.

        Waits for: space, if the disk is full. Gives up after: never; a second signal ends the learner.

        Raises:
            CheckpointWriteError: when it cannot be written for another reason.
        """
        is_said = False
        while True:
            try:
                return self._write_checkpoint()
            except CheckpointWriteError as error:
                if not error.is_disk_full:
                    raise
                if not is_said:
                    logger.error("the last checkpoint waits for space on its disk: %s", error)
                is_said = True
            self.observer.heartbeat(self.version, f"space for the checkpoint of policy {self.version}")
            time.sleep(SPACE_SECONDS)

    def _write_checkpoint(self) -> None:
        """Write a checkpoint of the present version.

        Before the checkpoint gets its name, the buffer makes durable what the checkpoint contains, so that a power cut
        cannot leave weights with groups in them that the ledger hands out again. Afterwards the buffer may delete the
        contents of those groups.
        """
        self.observer.doing(self.version, f"writes the checkpoint of policy {self.version}")
        begun = CheckpointBegun(self.version)
        self.networks.save(
            self.checkpoints,
            self.version,
            model=self.model_config,
            state={"config": asdict(self.config), "algorithm": {"kl_coef": self._batch_trainer.kl_coef}},
            keep=self.config.keep_checkpoints,
            may_be_named=lambda: self._requests.ask_together(begun, CONFIRMATION, until_gone=True) is not None,
        )
        self._saved_version, self._num_failed_checkpoints = self.version, 0
        # Unanswered only when the learner ends: then the next learner's checkpoint makes these groups done.
        self._requests.ask_together(CheckpointCommitted(self.version), CONFIRMATION)

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
            self._batch_trainer.kl_coef = float(state["algorithm"]["kl_coef"])
        return version

    def _finish(self) -> None:
        # The checkpoint comes first, because a publication may wait for actors that are ending too.
        # Policy 0 is the base model, so a run that is stopped there has nothing to save.
        if self._saved_version != self.version and self.version:
            self._last_checkpoint()
        self.observer.doing(self.version, f"publishes policy {self.version}")
        self._await_publication()
        if self.version >= self.config.total_steps:
            self.observer.last_evaluation(self.version, self.config.evaluation_timeout_seconds, self.stopping)
        self.observer.say_goodbye(self.version)

    def _is_due(self, every: int) -> bool:
        """Return whether the last batch made a version that is a multiple of `every`."""
        return every > 0 and self.version // every != (self.version - self.config.updates_per_batch) // every
