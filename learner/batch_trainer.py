"""Trains on one batch: annotates it, computes advantages, makes its optimizer steps.

The training loop owns a `BatchTrainer` on every rank and calls it once per batch, on all ranks together.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from learner.algorithms.base import AdvantageInputs, Algorithm
from learner.algorithms.metrics import MetricSums, importance_weights, reference_kl, summarize
from learner.batches.batch import TrainingBatch
from learner.config import LearnerConfig, OptimizerConfig
from learner.distributed.collectives import all_reduce_max, all_reduce_sum
from learner.distributed.deepspeed_engine import TrainingEngine
from learner.models.policy import PolicyModel
from learner.monitoring.logprob_check import LogprobCheck
from learner.monitoring.step_results import NetworkStep, StepResults
from learner.monitoring.tensorboard import batch_metrics
from learner.networks import Networks
from learner.passes import Annotations, critic_step, policy_step, score_batch

logger = logging.getLogger(__name__)


class BatchTrainer:
    """The optimizer steps of one rank.

    Args:
        config: the run.
        algorithm: advantages and losses.
        networks: this rank's networks.
        stopping: set from outside to end the run soon. A batch without an optimizer step so far is then abandoned
            between two microbatches; any other batch is finished.
        end_piece: called before each microbatch, when the one before it is finished.
    """

    def __init__(
        self,
        config: LearnerConfig,
        algorithm: Algorithm,
        networks: Networks,
        stopping: threading.Event,
        end_piece: Callable[[], None],
    ) -> None:
        self._config, self._algorithm, self._networks, self._stopping = config, algorithm, networks, stopping
        self._end_piece = end_piece
        self.kl_coef = algorithm.kl_coef
        """The adaptive KL coefficient, saved in checkpoints; algorithms with another schedule ignore it."""
        self._may_abandon = False
        """Whether the current pass may be abandoned: its batch has had no optimizer step yet."""

    def train_on(
        self, batch: TrainingBatch, policy_version: int, check: LogprobCheck
    ) -> tuple[dict[str, float], list[StepResults]]:
        """Make all optimizer steps of a batch, starting from `policy_version`; each makes one version.

        Returns:
            The metrics to display, and the results of every step. The metrics describe this rank's shard of the batch
            and, equal on every rank, the last step.

        Raises:
            PassAbandonedError: the run is about to end and the batch has had no step yet.
            LogprobMismatchError: as `LogprobCheck.compare` does.
        """
        config = self._config
        self._may_abandon = True
        annotations = self._annotate(batch, policy_version, self._checked(batch, check))
        metrics, steps = batch_metrics(batch), list[StepResults]()
        for index, part in enumerate(batch.split(config.updates_per_batch)):
            shown, results = self._step(batch, part, annotations, policy_version + index)
            metrics |= shown
            steps.append(results)
            if results.reference_kl is not None:
                kl = results.reference_kl
                self.kl_coef = self._algorithm.kl_coef_schedule.adapt(self.kl_coef, kl.per_sequence, kl.num_sequences)
        # A batch counts as skipped when any of its steps was, not only the last one.
        if any(step.policy and step.policy.was_skipped for step in steps):
            metrics["policy/skipped"] = 1.0
        if any(step.critic and step.critic.was_skipped for step in steps):
            metrics["value/skipped"] = 1.0
        if self._networks.refresh_reference(policy_version + len(steps), len(steps)):
            logger.info("policy %d is the reference from now on", policy_version + len(steps))
        return metrics, steps

    def score(self, batch: TrainingBatch) -> Tensor:
        """Return the policy's log-probabilities of all scored tokens. Every rank must call it; it is not abandoned."""
        return score_batch(self._networks.policy, batch, self._config.tokens_per_microbatch)

    def _checked(self, batch: TrainingBatch, check: LogprobCheck) -> Tensor | None:
        """Compare the batch if the check is not through. Returns the log-probabilities if that needed them."""
        if check.agreed:
            return None
        if not check.can_tell(batch):
            check.pass_over(batch)
            return None
        logprobs = self._score(self._networks.policy, batch)
        check.compare(batch, logprobs)
        return logprobs

    def _score(self, network: TrainingEngine | PolicyModel, batch: TrainingBatch) -> Tensor:
        return score_batch(network, batch, self._config.tokens_per_microbatch, self._abandoning)

    def _abandoning(self) -> bool:
        """Between two microbatches: note the progress, and return whether to go no further."""
        self._end_piece()
        return self._may_abandon and self._stopping.is_set()

    def _annotate(self, batch: TrainingBatch, policy_version: int, logprobs: Tensor | None) -> Annotations:
        """Compute the constants of all optimizer steps of the batch; `logprobs`: the policy's, if they are known."""
        networks, algorithm = self._networks, self._algorithm
        needs_proximal = self._config.updates_per_batch > 1 or algorithm.needs_proximal
        if needs_proximal and logprobs is None:
            logprobs = self._score(networks.policy, batch)
        proximal = logprobs if needs_proximal else None
        reference = self._score(networks.reference, batch) if networks.reference is not None else None
        values = self._score(networks.critic, batch) if networks.critic is not None else None
        kl_coef = algorithm.kl_coef_schedule.at(policy_version, self.kl_coef)
        outputs = algorithm.advantages(
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
        return Annotations(
            advantages=outputs.advantages,
            returns=outputs.returns,
            old_values=values,
            proximal_logprobs=proximal,
            ref_logprobs=reference,
            kl_coef=kl_coef,
        )

    def _step(
        self, batch: TrainingBatch, part: range, annotations: Annotations, policy_version: int
    ) -> tuple[dict[str, float], StepResults]:
        """Make the optimizer step to version `policy_version` + 1, of the policy and of the critic if there is one.

        A step whose loss or gradient is not finite is skipped: the new version has the weights of the previous one.

        Returns: metrics to display, and the results that decide whether and how the run goes on.
        """
        config, networks, algorithm = self._config, self._networks, self._algorithm
        kl_coef = algorithm.kl_coef_schedule.at(policy_version, self.kl_coef)
        annotations, sums = replace(annotations, kl_coef=kl_coef), MetricSums()
        shown: dict[str, float] = {"policy/kl_coef": kl_coef} if networks.reference is not None else {}
        critic = policy = None
        if networks.critic is not None:
            sums = sums + critic_step(
                networks.critic,
                algorithm,
                batch=batch,
                part=part,
                annotations=annotations,
                tokens_per_microbatch=config.tokens_per_microbatch,
                stopping=self._abandoning,
            )
            critic = self._apply(networks.critic, config.critic_optimizer, policy_version)
            shown |= _optimizer_metrics("value", critic)
        if policy_version >= config.critic_warmup_steps or networks.critic is None:
            sums = sums + policy_step(
                networks.policy,
                algorithm,
                batch=batch,
                part=part,
                annotations=annotations,
                tokens_per_microbatch=config.tokens_per_microbatch,
                stopping=self._abandoning,
            )
            policy = self._apply(networks.policy, config.optimizer, policy_version)
            shown |= _optimizer_metrics("policy", policy)
        totals = sums.totals(reduce_sum=all_reduce_sum, reduce_max=all_reduce_max)
        results = StepResults(
            policy=policy, critic=critic, importance=importance_weights(totals), reference_kl=reference_kl(totals)
        )
        return shown | summarize(totals), results

    def _apply(self, network: TrainingEngine, optimizer: OptimizerConfig, policy_version: int) -> NetworkStep:
        """Step `network` at the learning rate of `policy_version`."""
        # A batch that was abandoned after this step would be trained on again by the resumed run.
        self._may_abandon = False
        rate = optimizer.rate(policy_version, self._config.total_steps)
        return NetworkStep(gradient_norm=network.step(rate), learning_rate=rate)


def _optimizer_metrics(name: str, step: NetworkStep) -> dict[str, float]:
    return {
        f"{name}/gradient_norm": step.gradient_norm,
        f"{name}/learning_rate": step.learning_rate,
        f"{name}/skipped": float(step.was_skipped),
    }
