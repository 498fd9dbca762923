"""The training loop: next batch, annotate, advantages, steps, publish, checkpoint, report.

One `Trainer` per rank. Rank 0 also owns the weight store, the checkpoints' names, the event files and the talk with the
buffer about evaluations. The learner is the run's clock: when `run` returns, the run is over.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import asdict
from pathlib import Path

import torch

from buffer.client import Connection
from buffer.wire import (
    BatchRequest,
    CheckpointCommitted,
    Close,
    EvaluationQuery,
    EvaluationReport,
    EvaluationReports,
    EvaluationRequest,
    Heartbeat,
    LearnerHello,
    LearnerWelcome,
    Manifest,
    Message,
    Shard,
    Status,
    StatusRequest,
    unpack_group,
)
from learner.algorithm import AdvantageInputs, Algorithm
from learner.batch import TrainingBatch
from learner.checkpoint import POLICY_PREFIX, load_checkpoint, newest_checkpoint, read_state, save_checkpoint
from learner.config import LearnerConfig, ModelConfig, OptimizerConfig
from learner.engine import TrainingEngine, all_reduce_max, all_reduce_sum, rank_and_world_size
from learner.metrics import MetricSums, summarize
from learner.model import PolicyModel, ValueModel
from learner.publisher import WeightStore
from learner.report import Reporter, StepClock, batch_metrics
from learner.steps import Annotations, critic_step, policy_step, score_batch

logger = logging.getLogger(__name__)


class LogprobMismatchError(RuntimeError):
    """The learner and the actors disagree about the same weights, so every correction would be wrong."""


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
        stopping: set from outside to end the run after the current step, with a checkpoint.
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
        self.checkpoints = run_dir / "checkpoints"
        dtype = getattr(torch, model.dtype)
        load = {"dtype": dtype, "checkpointing": model.gradient_checkpointing}
        policy = PolicyModel.load(model.path, temperature=config.temperature, **load)
        self.policy = self._engine(policy, config.optimizer)
        self.critic = None
        if algorithm.needs_critic:
            self.critic = self._engine(ValueModel.load(model.path, **load), config.critic_optimizer)
        self.reference = None
        if algorithm.needs_reference:
            reference = PolicyModel.load(model.path, dtype=dtype, temperature=config.temperature, checkpointing=False)
            self.reference = reference.to(device).eval().requires_grad_(False)
        self.version = self._resume()
        self.clock = StepClock()
        self.reporter = Reporter(run_dir / "tensorboard", self.version) if self.rank == 0 else None
        self._publication: Future[Manifest] | None = None
        self._checked_logprobs = False
        self._num_older_groups = 0
        """Groups begun before this learner started that may still come."""
        self._evaluated: set[tuple[int, int]] = set()
        self._status: Future[Message] | None = None
        self._shown: dict[str, float] = {}

    def run(self) -> None:
        """Train to the last version, or until `stopping` is set; leaves a checkpoint of where it ended."""
        self._say_hello()
        while self.version < self.config.total_steps:
            started = time.monotonic()
            batch = self._next_batch()
            if batch is None:
                break
            wait_seconds = time.monotonic() - started
            metrics = self._train_on(batch)
            trained = time.monotonic()
            self._publish()
            metrics["learner/wait_seconds"] = wait_seconds
            metrics["learner/train_seconds"] = trained - started - wait_seconds
            metrics["learner/publish_seconds"] = time.monotonic() - trained
            self._report(batch, metrics)
            if self._is_due(self.config.checkpoint_every):
                self._checkpoint()
        self._finish()

    # --- one batch ---------------------------------------------------------------------------------------------------

    def _next_batch(self) -> TrainingBatch | None:
        """This rank's shard, or None when the run is to stop.

        Waits for: the buffer to have a full batch. Unblocked by: actors delivering groups, or `stopping`. Gives up
        after: `batch_timeout_seconds`.
        """
        request = BatchRequest(self.version, self.rank, self.world_size)
        future = self.buffer.request(request, timeout_seconds=self.config.batch_timeout_seconds)
        while not self.stopping.is_set():
            if wait([future], timeout=0.5).done:
                break
            self._heartbeat("groups from the actors")
        shard = future.result() if future.done() else None
        # All ranks or none: a rank that stopped would leave the others waiting in their first collective.
        absent = torch.tensor([int(shard is None)], device=self.device)
        if int(all_reduce_max(absent)[0]):
            return None
        assert isinstance(shard, Shard), shard
        groups = [unpack_group(packed) for packed in shard.groups]
        return TrainingBatch.from_groups(groups, shard.staleness, self.version, self.device)

    def _train_on(self, batch: TrainingBatch) -> dict[str, float]:
        """All optimizer steps of one batch; returns the metrics of the last one."""
        self._heartbeat("")
        if not self._checked_logprobs:
            self._check_logprobs(batch)
        annotations = self._annotate(batch)
        metrics = batch_metrics(batch)
        for part in batch.split(self.config.updates_per_batch):
            metrics |= self._step(batch, part, annotations)
        return metrics

    def _annotate(self, batch: TrainingBatch) -> Annotations:
        """Everything about the batch that its optimizer steps hold fixed."""
        budget = self.config.tokens_per_microbatch
        proximal = score_batch(self.policy, batch, budget) if self.config.updates_per_batch > 1 else None
        reference = score_batch(self.reference, batch, budget) if self.reference is not None else None
        values = score_batch(self.critic, batch, budget) if self.critic is not None else None
        outputs = self.algorithm.advantages(
            AdvantageInputs(
                rewards=batch.rewards,
                group_index=batch.group_index,
                sequence_index=batch.sequence_index,
                behavior_logprobs=batch.behavior_logprobs,
                values=values,
                proximal_logprobs=proximal,
                ref_logprobs=reference,
                reduce=all_reduce_sum,
            )
        )
        return Annotations(outputs.advantages, outputs.returns, values, proximal, reference)

    def _step(self, batch: TrainingBatch, part: range, annotations: Annotations) -> dict[str, float]:
        """One optimizer step of the policy, and of the critic where there is one; the version goes up by one."""
        budget = self.config.tokens_per_microbatch
        sums = MetricSums()
        named: dict[str, float] = {}
        if self.critic is not None:
            sums = sums + critic_step(self.critic, self.algorithm, batch, part, annotations, budget)
            rate = self.config.critic_optimizer.rate(self.version, self.config.total_steps)
            named |= {"value/gradient_norm": self.critic.step(rate), "value/learning_rate": rate}
        if self.version >= self.config.critic_warmup_steps or self.critic is None:
            sums = sums + policy_step(self.policy, self.algorithm, batch, part, annotations, budget)
            rate = self.config.optimizer.rate(self.version, self.config.total_steps)
            named |= {"policy/gradient_norm": self.policy.step(rate), "policy/learning_rate": rate}
        self.version += 1
        return named | summarize(sums.totals(reduce_sum=all_reduce_sum, reduce_max=all_reduce_max))

    def _check_logprobs(self, batch: TrainingBatch) -> None:
        """Refuse to train where the learner and vLLM see different log-probabilities under the same weights.

        Only trajectories sampled under this version alone can tell: tokens after a change of weights are sampled on top
        of the older version's KV cache. Groups begun before this learner started may carry a version's number for other
        weights, those of before a rollback, so until they are used up a disagreement is only reported.
        """
        same = batch.of_one_version & (batch.token_versions == self.version)
        difference = (
            score_batch(self.policy, batch, self.config.tokens_per_microbatch) - batch.behavior_logprobs
        ).abs()
        difference = torch.where(same, difference, 0.0)
        sums = all_reduce_sum(torch.stack([difference.sum().double(), same.sum().double()])).tolist()
        largest = float(all_reduce_max(difference.max().clone()))
        mean = sums[0] / max(sums[1], 1.0)
        if mean > self.config.logprob_tolerance:
            message = (
                f"policy {self.version}: the learner's log-probabilities differ from the actors' by {mean:.4f} on"
                f" average and by {largest:.4f} at most over {int(sums[1])} tokens, more than"
                f" learner.logprob_tolerance={self.config.logprob_tolerance}; check that learner and actors use the"
                " same model, dtype and temperature"
            )
            if self._num_older_groups <= 0:
                raise LogprobMismatchError(message)
            logger.warning("%s (their groups were begun before this learner started; checked again)", message)
        elif sums[1]:
            self._checked_logprobs = True
            if self.rank == 0:
                logger.info("policy %d: log-probabilities agree (largest difference %.2g)", self.version, largest)
        self._num_older_groups -= self.config.groups_per_batch

    # --- versions, checkpoints, evaluations --------------------------------------------------------------------------

    def _say_hello(self) -> None:
        older = torch.zeros(1, device=self.device)
        if self.rank == 0:
            welcome = self.buffer.call(LearnerHello(self.version), timeout_seconds=60.0)
            assert isinstance(welcome, LearnerWelcome)
            logger.info("starting at policy %d; %d groups are ready again", self.version, welcome.num_rolled_back)
            older += welcome.num_outstanding
        # Also a barrier: another rank's batch request that arrived before the hello would be refused.
        self._num_older_groups = int(all_reduce_max(older)[0])
        self._publish()
        self._await_publication()
        if self.rank == 0 and self.version == 0:
            self._request_evaluation()

    def _publish(self) -> None:
        """Every rank gathers; rank 0 hands the copies to the store, which writes them while training goes on."""
        dtype = getattr(torch, self.config.publish_dtype)
        tensors = [(name.removeprefix(POLICY_PREFIX), tensor) for name, tensor in self.policy.gather(dtype)]
        if self.store is not None:
            self._await_publication()
            self._publication = self.store.publish(self.version, tensors)

    def _await_publication(self) -> None:
        """One version is written at a time, and one that can't be written ends the run instead of starving the actors.

        Waits for: the store's writer. Gives up after: 600 s.
        """
        if self._publication is not None:
            self._publication.result(timeout=600.0)

    def _checkpoint(self) -> None:
        save_checkpoint(
            self.checkpoints,
            self.version,
            self.policy,
            self.critic,
            base_path=Path(self.model_config.path),
            dtype=getattr(torch, self.model_config.dtype),
            state={"config": asdict(self.config)},
            keep=self.config.keep_checkpoints,
        )
        if self.rank == 0:
            self.buffer.call(CheckpointCommitted(self.version), timeout_seconds=60.0)

    def _resume(self) -> int:
        checkpoint = newest_checkpoint(self.checkpoints)
        if checkpoint is None:
            return 0
        load_checkpoint(checkpoint, self.policy, self.critic)
        return int(read_state(checkpoint)["policy_version"])

    def _finish(self) -> None:
        self._await_publication()
        saved = newest_checkpoint(self.checkpoints)
        if saved is None or int(saved.name) != self.version:
            self._checkpoint()
        if self.rank == 0 and self.version >= self.config.total_steps:
            self._request_evaluation()
            self.buffer.call(Close(), timeout_seconds=60.0)
            self._await_last_evaluation()
        if self.reporter is not None:
            # The launcher's summary is made from the last heartbeat, so it must have arrived before this process ends.
            self._heartbeat("").result(timeout=10.0)
            self.reporter.close()

    def _request_evaluation(self) -> None:
        self.buffer.call(EvaluationRequest(self.version), timeout_seconds=60.0)

    def _await_last_evaluation(self) -> None:
        """Waits for: an actor's report on the last version. Gives up after: `evaluation_timeout_seconds`."""
        deadline = time.monotonic() + self.config.evaluation_timeout_seconds
        while time.monotonic() < deadline and not self.stopping.is_set():
            self._heartbeat("the last evaluation")
            reports = self.buffer.call(EvaluationQuery(self.version), timeout_seconds=60.0)
            assert isinstance(reports, EvaluationReports)
            if reports.reports:
                self._report_evaluations(reports.reports)
                return
            time.sleep(0.2)
        logger.warning("policy %d was not evaluated in time", self.version)

    # --- reporting ---------------------------------------------------------------------------------------------------

    def _report(self, batch: TrainingBatch, metrics: dict[str, float]) -> None:
        if self.reporter is None:
            return
        self.clock.step(
            wait_seconds=metrics["learner/wait_seconds"],
            num_samples=len(batch.trajectories) * self.world_size,
            num_tokens=batch.num_scored_tokens * self.world_size,
        )
        self._shown = {"reward": metrics["reward/mean"], "staleness": metrics["staleness/mean"], **self.clock.summary()}
        metrics |= {f"learner/{name}": value for name, value in self.clock.summary().items()}
        self.reporter.scalars(metrics, self.version)
        self.reporter.staleness(batch, self.version)
        self._collect_answers()
        if self._is_due(self.config.evaluate_every) and self.version < self.config.total_steps:
            self._request_evaluation()

    def _collect_answers(self) -> None:
        """Answers of the buffer are picked up a step later, so that asking never costs a wait."""
        if self._status is not None and self._status.done():
            status = self._status.result()
            if isinstance(status, Status) and self.reporter is not None:
                self.reporter.status(status, self.version)
                self._report_evaluations(status.reports)
        if self._status is None or self._status.done():
            self._status = self.buffer.request(StatusRequest(), timeout_seconds=60.0)

    def _report_evaluations(self, reports: Sequence[EvaluationReport]) -> None:
        for report in reports:
            key = (report.requested_version, report.policy_version)
            if key not in self._evaluated and self.reporter is not None:
                self._evaluated.add(key)
                self.reporter.evaluation(report)
                logger.info(
                    "policy %d: pass@1 %.3f on %d held-out prompts",
                    report.policy_version,
                    report.pass_at_1,
                    report.num_prompts,
                )

    def _heartbeat(self, waiting_for: str) -> Future[Message]:
        name = f"learner-{self.rank}"
        heartbeat = Heartbeat("learner", name, self.version, waiting_for, self._shown)
        return self.buffer.request(heartbeat, timeout_seconds=60.0)

    def _is_due(self, every: int) -> bool:
        """Whether one of the versions of the last batch was a multiple of `every`."""
        return every > 0 and self.version // every != (self.version - self.config.updates_per_batch) // every

    def _engine(self, network: torch.nn.Module, optimizer: OptimizerConfig) -> TrainingEngine:
        return TrainingEngine(
            network,
            optimizer,
            zero_stage=self.config.zero_stage,
            bfloat16=self.model_config.dtype == "bfloat16",
            cpu_offload=self.config.cpu_offload,
            device=self.device,
        )
