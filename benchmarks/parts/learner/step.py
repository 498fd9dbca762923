"""Our learner's optimizer step for the benchmarks: from received groups to metrics, by the learner's own functions.

This module imports DeepSpeed, so `DS_ACCELERATOR` must be set before it is imported.
"""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.parts.learner.groups import completion_lengths, split_by_completion, trajectory_groups
from benchmarks.parts.learner.work import LEARNING_RATE, Sequences
from buffer.transport.packed_group import pack_group, unpack_group
from learner.algorithms.base import AdvantageInputs
from learner.algorithms.corrections import DecoupledTIS
from learner.algorithms.grpo import GRPO
from learner.algorithms.metrics import summarize
from learner.batches.batch import TrainingBatch
from learner.config import OptimizerConfig
from learner.distributed.collectives import all_reduce_max, all_reduce_sum
from learner.distributed.deepspeed_engine import TrainingEngine, init_distributed
from learner.models.policy import PolicyModel
from learner.monitoring.tensorboard import batch_metrics
from learner.passes import Annotations, policy_step, score_batch


class OurStep:
    """Repeats one optimizer step over the same batch.

    Args:
        policy: the network. The behavior log-probabilities of the batch are its own, so no importance correction acts.
        data: the batch.
        tokens_per_microbatch: largest number of packed tokens in one pass.
        device: device of the network.
        bfloat16: whether the network is in bfloat16, with float32 master weights.
    """

    def __init__(
        self,
        policy: PolicyModel,
        data: Sequences,
        tokens_per_microbatch: int,
        device: torch.device,
        *,
        bfloat16: bool = False,
    ) -> None:
        init_distributed(device)
        self._tokens_per_microbatch, self._device = tokens_per_microbatch, device
        self._algorithm = GRPO(correction=DecoupledTIS(), aggregation="token_mean")
        optimizer = OptimizerConfig(learning_rate=LEARNING_RATE)
        self.engine = TrainingEngine(
            policy, optimizer, zero_stage=0, bfloat16=bfloat16, cpu_offload=False, device=device
        )
        unsampled = trajectory_groups(data, [np.zeros(length, np.float32) for length in completion_lengths(data)])
        batch = TrainingBatch.from_groups(unsampled, [0] * len(unsampled), 0, device)
        logprobs = score_batch(self.engine, batch, tokens_per_microbatch).cpu().numpy()
        sampled = trajectory_groups(data, split_by_completion(data, np.minimum(logprobs, 0.0)))
        self._received = [pack_group(group) for group in sampled]

    def accumulate(self) -> None:
        """Unpack the groups, compute the advantages and accumulate the gradient."""
        groups = [unpack_group(group) for group in self._received]
        self._batch = TrainingBatch.from_groups(groups, [0] * len(groups), 0, self._device)
        inputs = AdvantageInputs(
            rewards=self._batch.rewards,
            group_index=self._batch.group_index,
            sequence_index=self._batch.sequence_index,
            behavior_logprobs=self._batch.behavior_logprobs,
        )
        outputs = self._algorithm.advantages(inputs)
        annotations = Annotations(outputs.advantages, None, None, None, None)
        everything = range(len(self._batch.trajectories))
        self._sums = policy_step(
            self.engine, self._algorithm, self._batch, everything, annotations, self._tokens_per_microbatch
        )

    def finish(self) -> None:
        """Apply the gradient and compute the metrics."""
        self.engine.step(LEARNING_RATE)
        totals = self._sums.totals(reduce_sum=all_reduce_sum, reduce_max=all_reduce_max)
        metrics = batch_metrics(self._batch) | summarize(totals)
        assert metrics["policy/num_tokens"] == self._batch.num_scored_tokens
