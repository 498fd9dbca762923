"""Passes over a batch: annotation without gradients, and the optimizer steps of the policy and of the critic.

The training loop calls the passes on every rank. Each pass cuts its part of the batch into microbatches. Every rank
makes the same number of microbatches, because all ranks gather the sharded parameters together: a rank that needs fewer
makes smaller ones, and a rank with too few trajectories repeats a microbatch as padding, with weight 0. Between
microbatches all ranks together can abandon a pass. An abandoned pass leaves gradients behind, so its process must not
train on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from learner.algorithms.base import Algorithm, LossInputs, LossOutputs, ValueLossInputs
from learner.algorithms.losses import batch_counts
from learner.algorithms.metrics import MetricSums
from learner.batches.batch import MicroBatch, TrainingBatch
from learner.distributed.collectives import all_reduce_max, all_reduce_sum, any_rank
from learner.distributed.deepspeed_engine import TrainingEngine
from learner.models.policy import PolicyModel

LossOf = Callable[[MicroBatch], LossOutputs]
Stopping = Callable[[], bool]
"""Returns whether this rank wants to abandon the current pass."""


class PassAbandonedError(Exception):
    """A rank was asked to stop in the middle of a pass."""


def never() -> bool:
    """Return False: by default a pass is not abandoned."""
    return False


@dataclass(frozen=True, slots=True, eq=False)
class Annotations:
    """Constants of all optimizer steps of a batch, [M] per scored token; None where the algorithm needs none."""

    advantages: Tensor
    returns: Tensor | None
    old_values: Tensor | None
    proximal_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    kl_coef: float | None = None
    """The KL coefficient of the step; None: the algorithm's `kl_coef`."""


@torch.no_grad()
def score_batch(
    network: TrainingEngine | PolicyModel,
    batch: TrainingBatch,
    tokens_per_microbatch: int,
    stopping: Stopping = never,
) -> Tensor:
    """Return the outputs of `network` on all scored tokens, [M] float32.

    The outputs are the log-probabilities of a policy, or the values of a critic.

    Args:
        network: a training engine, which makes equally many passes on every rank, or a module of this rank alone.
        batch: this rank's shard.
        tokens_per_microbatch: packed tokens of one forward pass.
        stopping: called between microbatches; a pass through a module of this rank alone is not abandoned.

    Raises:
        PassAbandonedError: on every rank, when any rank is stopping.
    """
    outputs: list[Tensor] = []
    everything, is_shared = range(len(batch.trajectories)), isinstance(network, TrainingEngine)
    crossover_tokens = network.attention_crossover_tokens
    for micro, is_padding, _ in _microbatches(
        batch, everything, tokens_per_microbatch, crossover_tokens, stopping, synchronize_ranks=is_shared
    ):
        output = network.forward(micro) if isinstance(network, TrainingEngine) else network(*micro.inputs)
        if not is_padding:
            outputs.append(output[0] if isinstance(output, tuple) else output)
    return torch.cat(outputs)


def policy_step(
    policy: TrainingEngine,
    algorithm: Algorithm,
    batch: TrainingBatch,
    part: range,
    annotations: Annotations,
    tokens_per_microbatch: int,
    stopping: Stopping = never,
) -> MetricSums:
    """Accumulate the policy's gradient over the trajectories in `part`; the caller makes the optimizer step."""
    weights = _token_weights(algorithm, batch, part)

    def loss(micro: MicroBatch) -> LossOutputs:
        logprobs, entropy = policy.forward(micro)
        return algorithm.loss(
            LossInputs(
                logprobs=logprobs,
                entropy=entropy,
                behavior_logprobs=batch.behavior_logprobs[micro.scored],
                advantages=annotations.advantages[micro.scored],
                token_weights=weights[micro.scored],
                sequence_index=batch.sequence_index[micro.scored],
                proximal_logprobs=_slice(annotations.proximal_logprobs, micro),
                ref_logprobs=_slice(annotations.ref_logprobs, micro),
                kl_coef=annotations.kl_coef,
            )
        )

    return _accumulate(policy, batch, part, tokens_per_microbatch, loss, stopping)


def critic_step(
    critic: TrainingEngine,
    algorithm: Algorithm,
    batch: TrainingBatch,
    part: range,
    annotations: Annotations,
    tokens_per_microbatch: int,
    stopping: Stopping = never,
) -> MetricSums:
    """Accumulate the critic's gradient over the trajectories in `part`; the caller makes the optimizer step."""
    weights = _token_weights(algorithm, batch, part)
    if annotations.old_values is None or annotations.returns is None:
        raise ValueError("a critic step needs the values and returns of the batch")
    old_values, returns = annotations.old_values, annotations.returns

    def loss(micro: MicroBatch) -> LossOutputs:
        return algorithm.value_loss(
            ValueLossInputs(
                values=critic.forward(micro),
                old_values=old_values[micro.scored],
                returns=returns[micro.scored],
                token_weights=weights[micro.scored],
            )
        )

    return _accumulate(critic, batch, part, tokens_per_microbatch, loss, stopping)


def _accumulate(
    engine: TrainingEngine,
    batch: TrainingBatch,
    part: range,
    tokens_per_microbatch: int,
    loss: LossOf,
    stopping: Stopping,
) -> MetricSums:
    metrics = MetricSums()
    crossover_tokens = engine.attention_crossover_tokens
    for micro, is_padding, last in _microbatches(
        batch, part, tokens_per_microbatch, crossover_tokens, stopping, synchronize_ranks=True
    ):
        outputs = loss(micro)
        engine.backward(outputs.loss * 0.0 if is_padding else outputs.loss, last=last)
        if not is_padding:
            metrics = metrics + outputs.metrics
    return metrics


def _microbatches(
    batch: TrainingBatch,
    part: range,
    tokens_per_microbatch: int,
    attention_crossover_tokens: float,
    stopping: Stopping,
    *,
    synchronize_ranks: bool,
) -> Iterator[tuple[MicroBatch, bool, bool]]:
    """Yield (microbatch, whether it is padding, whether it is the last).

    With `synchronize_ranks` every rank yields the same number, and all ranks stop before the same microbatch.
    """
    total = batch.num_microbatches(part, tokens_per_microbatch)
    if synchronize_ranks:
        total = int(all_reduce_max(torch.tensor([total], device=batch.device))[0])
    microbatches = batch.microbatches(part, tokens_per_microbatch, total, attention_crossover_tokens)
    for index in range(total):
        if synchronize_ranks and any_rank(stopping(), batch.device):
            raise PassAbandonedError
        last = len(microbatches) - 1
        yield microbatches[min(index, last)], index > last, index == total - 1


def _token_weights(algorithm: Algorithm, batch: TrainingBatch, part: range) -> Tensor:
    """Return the weight of each token in the loss of this optimizer step, [M]; 0 outside `part`.

    The counts behind the weights are summed over all ranks.
    """
    loss_mask = torch.zeros(batch.num_scored_tokens, dtype=torch.bool, device=batch.device)
    loss_mask[batch.scored_slice(part)] = True
    counts = all_reduce_sum(batch_counts(loss_mask, batch.sequence_index)).tolist()
    return algorithm.token_weights(
        loss_mask, batch.sequence_index, num_tokens=counts[0], num_sequences=counts[1]
    ).float()


def _slice(tensor: Tensor | None, micro: MicroBatch) -> Tensor | None:
    return None if tensor is None else tensor[micro.scored]
