"""Passes over a batch: annotation without gradients, and the optimizer steps of the policy and of the critic.

Called by the training loop on every rank. Each pass cuts its part of the batch into microbatches; every rank makes
equally many, because sharded parameters are gathered by all ranks together: a rank that could do with fewer cuts
smaller ones, and one with too few trajectories repeats one with weight 0. Between microbatches a pass can be abandoned,
by all ranks together; its gradients are left behind, so the process must not train on.
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
"""Whether this rank wants to abandon the pass under way."""


class PassAbandonedError(Exception):
    """A rank was asked to end in the middle of a pass."""


def never() -> bool:
    """A pass that is not abandoned."""
    return False


@dataclass(frozen=True, slots=True, eq=False)
class Annotations:
    """Per scored token of the batch, [M] each; None where the algorithm does not ask for it."""

    advantages: Tensor
    returns: Tensor | None
    old_values: Tensor | None
    proximal_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    kl_coef: float | None = None
    """The coefficient of the step; None: the algorithm's own."""


@torch.no_grad()
def score_batch(
    network: TrainingEngine | PolicyModel,
    batch: TrainingBatch,
    tokens_per_microbatch: int,
    stopping: Stopping = never,
) -> Tensor:
    """[M] float32 outputs of `network` on all scored tokens: log-probabilities of a policy, values of a critic.

    Args:
        network: a training engine, of which all ranks make equally many passes, or a module of this rank's own.
        batch: this rank's share.
        tokens_per_microbatch: packed tokens of one forward pass.
        stopping: asked between microbatches; a module of this rank's own is not abandoned.

    Raises:
        PassAbandonedError: on all ranks, when any of them is stopping.
    """
    outputs: list[Tensor] = []
    everything, agree = range(len(batch.trajectories)), isinstance(network, TrainingEngine)
    crossover_tokens = network.attention_crossover_tokens
    for micro, counts, _ in _microbatches(
        batch, everything, tokens_per_microbatch, crossover_tokens, stopping, agree=agree
    ):
        output = network.forward(micro) if isinstance(network, TrainingEngine) else network(*micro.inputs)
        if counts:
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
    for micro, counts, last in _microbatches(
        batch, part, tokens_per_microbatch, crossover_tokens, stopping, agree=True
    ):
        outputs = loss(micro)
        engine.backward(outputs.loss if counts else outputs.loss * 0.0, last=last)
        if counts:
            metrics = metrics + outputs.metrics
    return metrics


def _microbatches(
    batch: TrainingBatch,
    part: range,
    tokens_per_microbatch: int,
    attention_crossover_tokens: float,
    stopping: Stopping,
    *,
    agree: bool,
) -> Iterator[tuple[MicroBatch, bool, bool]]:
    """(microbatch, whether it counts, whether it is the last)."""
    total = batch.num_microbatches(part, tokens_per_microbatch)
    if agree:
        total = int(all_reduce_max(torch.tensor([total], device=batch.device))[0])
    own = batch.microbatches(part, tokens_per_microbatch, total, attention_crossover_tokens)
    for index in range(total):
        if agree and any_rank(stopping(), batch.device):
            raise PassAbandonedError
        yield own[min(index, len(own) - 1)], index < len(own), index == total - 1


def _token_weights(algorithm: Algorithm, batch: TrainingBatch, part: range) -> Tensor:
    """[M] what each token counts in this optimizer step, over all ranks; 0 outside `part`."""
    loss_mask = torch.zeros(batch.num_scored_tokens, dtype=torch.bool, device=batch.device)
    loss_mask[batch.scored_slice(part)] = True
    counts = all_reduce_sum(batch_counts(loss_mask, batch.sequence_index)).tolist()
    return algorithm.token_weights(
        loss_mask, batch.sequence_index, num_tokens=counts[0], num_sequences=counts[1]
    ).float()


def _slice(tensor: Tensor | None, micro: MicroBatch) -> Tensor | None:
    return None if tensor is None else tensor[micro.scored]
