"""What an algorithm is: advantages once per batch, a loss once per microbatch, and what they need to be given.

An algorithm is one frozen class, chosen once by Hydra's `_target_` and called by the training loop, which knows no
algorithm's name. It owns coefficients and no state, talks to no process, and calls no model. All token tensors are
packed over scored tokens [N]; the advantages see a rank's whole batch, the losses one microbatch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from learner.advantages import Reduce, terminal_rewards
from learner.importance import Correction, DecoupledTIS
from learner.losses import Aggregation, kl_estimate, policy_loss, token_weights, weighted_sum
from learner.metrics import MetricSums, policy_metrics

KLPlace = Literal["off", "reward", "loss"]


@dataclass(frozen=True, slots=True, eq=False)
class AdvantageInputs:
    """One rank's batch: whole groups."""

    rewards: Tensor
    """[num_sequences] float: one per trajectory."""
    group_index: Tensor
    """[num_sequences] int64: the group of each trajectory."""
    sequence_index: Tensor
    """[N] int64: the trajectory of each scored token; contiguous, in order, every trajectory at least once."""
    behavior_logprobs: Tensor
    """[N] log mu."""
    values: Tensor | None = None
    """[N] the critic's, if the algorithm needs one."""
    proximal_logprobs: Tensor | None = None
    """[N] log pi_prox; None when a batch gets one optimizer step and no extra forward pass was made."""
    ref_logprobs: Tensor | None = None
    """[N] the frozen reference's, if the algorithm needs one."""
    reduce: Reduce | None = None
    """Sums a small float64 tensor over the ranks; None with one rank."""


@dataclass(frozen=True, slots=True, eq=False)
class AdvantageOutputs:
    """What the losses are given; no gradient."""

    advantages: Tensor
    """[N]."""
    returns: Tensor | None
    """[N] the critic's targets; None without a critic."""
    token_rewards: Tensor
    """[N] the reward at each trajectory's last token, less the KL penalty if it is in the reward."""


@dataclass(frozen=True, slots=True, eq=False)
class LossInputs:
    """One microbatch of the policy. Only `logprobs` and `entropy` carry a gradient."""

    logprobs: Tensor
    """[N] log pi."""
    entropy: Tensor
    """[N] nats, of the whole distribution each token was drawn from."""
    behavior_logprobs: Tensor
    """[N] log mu."""
    advantages: Tensor
    """[N]."""
    token_weights: Tensor
    """[N] from `Algorithm.token_weights`; 0 masks a token."""
    proximal_logprobs: Tensor | None = None
    """[N] log pi_prox; None with one optimizer step per batch: then pi_prox = sg(pi)."""
    ref_logprobs: Tensor | None = None
    """[N] the frozen reference's; needed with `kl=loss`, otherwise only shown in the metrics."""


@dataclass(frozen=True, slots=True, eq=False)
class ValueLossInputs:
    """One microbatch of the critic. Only `values` carries a gradient."""

    values: Tensor
    """[N] under the weights being trained."""
    old_values: Tensor
    """[N] when the batch began."""
    returns: Tensor
    """[N] targets."""
    token_weights: Tensor
    """[N] from `Algorithm.token_weights`; 0 masks a token."""


@dataclass(frozen=True, slots=True, eq=False)
class LossOutputs:
    """A share of the global loss: the shares of all microbatches of all ranks add up to it."""

    loss: Tensor
    """Scalar to call backward on."""
    metrics: MetricSums


@dataclass(frozen=True, kw_only=True)
class Algorithm(ABC):
    """The clipped policy loss with its corrections, and what differs between algorithms as methods to write.

    Raises:
        ValueError: when fields contradict each other.
    """

    needs_critic: ClassVar[bool] = False
    min_group_size: ClassVar[int] = 1
    """Completions per prompt below which every advantage would be 0."""

    correction: Correction = field(default_factory=DecoupledTIS)
    clip_low: float = 0.2
    clip_high: float = 0.2
    """u = pi/pi_prox is clipped to [1 - clip_low, 1 + clip_high]."""
    kl: KLPlace = "off"
    """Where KL to the reference is punished: off, reward (k1, per token) or loss (k3)."""
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    aggregation: Aggregation = "token_mean"
    constant_length: int = 0
    """Tokens; for `aggregation=constant` only."""

    def __post_init__(self) -> None:
        if not 0 <= self.clip_low <= 1 or self.clip_high < 0:
            raise ValueError(
                f"algorithm: clip_low={self.clip_low} must lie in [0, 1] and clip_high={self.clip_high} at or above 0;"
                " 0.2 is usual for both"
            )
        if self.kl not in get_args(KLPlace):
            raise ValueError(
                f"algorithm: kl is {self.kl!r}; choose 'off', 'reward' or 'loss' (in YAML with quotes: off without them"
                " means false)"
            )
        if self.kl_coef < 0 or (self.kl != "off" and self.kl_coef == 0):
            raise ValueError(
                f"algorithm: kl={self.kl} with kl_coef={self.kl_coef} punishes nothing; set kl_coef above 0 or kl='off'"
            )
        if self.aggregation not in get_args(Aggregation):
            raise ValueError(
                f"algorithm: aggregation is {self.aggregation!r}; choose token_mean, sequence_mean or constant"
            )
        if self.aggregation == "constant" and self.constant_length < 1:
            raise ValueError(
                f"algorithm: aggregation=constant divides by constant_length={self.constant_length}; set it to the"
                " longest completion in tokens"
            )

    @property
    def needs_reference(self) -> bool:
        """Whether `ref_logprobs` must be given."""
        return self.kl != "off"

    @abstractmethod
    def advantages(self, batch: AdvantageInputs) -> AdvantageOutputs:
        """From rewards to what the losses weigh each token by. Waits for: the other ranks, where `reduce` is called."""

    def value_loss(self, inputs: ValueLossInputs) -> LossOutputs:
        """The critic's share of the loss, for its own optimizer; only where `needs_critic`."""
        raise TypeError(f"{type(self).__name__} has no critic, so it has no value loss")

    def token_weights(
        self, loss_mask: Tensor, sequence_index: Tensor, *, num_tokens: float, num_sequences: float
    ) -> Tensor:
        """[N] what each token counts; the counts are `losses.batch_counts` of one optimizer step over all ranks."""
        return token_weights(
            loss_mask,
            sequence_index,
            aggregation=self.aggregation,
            num_tokens=num_tokens,
            num_sequences=num_sequences,
            constant_length=self.constant_length,
        )

    def loss(self, inputs: LossInputs) -> LossOutputs:
        """policy_loss + kl_coef * KL (if in the loss) - entropy_coef * entropy, of one microbatch."""
        mask = inputs.token_weights > 0
        proximal = inputs.logprobs.detach() if inputs.proximal_logprobs is None else inputs.proximal_logprobs
        denominator = self.correction.proximal(proximal, inputs.behavior_logprobs)
        importance_weights = self.correction.weights(proximal, inputs.behavior_logprobs, mask)
        policy_term = policy_loss(
            inputs.logprobs,
            denominator,
            inputs.behavior_logprobs,
            inputs.advantages,
            mask,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            importance_weights=importance_weights,
            token_weights=inputs.token_weights,
        )
        entropy = weighted_sum(inputs.entropy, mask, inputs.token_weights)
        total = policy_term - self.entropy_coef * entropy if self.entropy_coef else policy_term
        metrics = policy_metrics(
            logprobs=inputs.logprobs,
            proximal_logprobs=proximal,
            behavior_logprobs=inputs.behavior_logprobs,
            ratio_logprobs=denominator,
            advantages=inputs.advantages,
            entropy=inputs.entropy,
            importance_weights=importance_weights,
            loss_mask=mask,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            cap=self.correction.cap,
        )
        if self.kl == "loss" or inputs.ref_logprobs is not None:
            penalty, kl_metrics = self._reference_kl(inputs, mask)
            total = total + penalty
            metrics = metrics + kl_metrics
        terms = MetricSums({"policy_loss": policy_term.detach(), "total_loss": total.detach()})
        return LossOutputs(total, metrics + terms)

    def token_rewards(self, batch: AdvantageInputs) -> Tensor:
        """[N] each trajectory's reward at its last token, less kl_coef * k1 on every token if KL is in the reward.

        The KL is that of pi_prox, or of mu where the batch has no `proximal_logprobs`.
        """
        logprobs = batch.behavior_logprobs if batch.proximal_logprobs is None else batch.proximal_logprobs
        rewards = terminal_rewards(batch.rewards, batch.sequence_index, dtype=logprobs.dtype)
        if self.kl == "reward":
            reference = self._given(batch.ref_logprobs, "ref_logprobs")
            rewards = rewards - self.kl_coef * kl_estimate(logprobs.detach(), reference, "k1")
        return rewards

    def _reference_kl(self, inputs: LossInputs, mask: Tensor) -> tuple[Tensor, MetricSums]:
        """(the KL term of the loss, 0 unless it belongs there; the KL to the reference as sums over tokens)."""
        reference = self._given(inputs.ref_logprobs, "ref_logprobs")
        k1 = kl_estimate(inputs.logprobs.detach(), reference, "k1")
        k3 = kl_estimate(inputs.logprobs, reference, "k3")
        coefficient = self.kl_coef if self.kl == "loss" else 0.0
        penalty = coefficient * weighted_sum(k3, mask, inputs.token_weights)
        ones = torch.ones_like(inputs.token_weights)
        sums = {
            "kl_penalty": penalty.detach(),
            "reference_kl_k1": weighted_sum(k1, mask, ones),
            "reference_kl_k3": weighted_sum(k3.detach(), mask, ones),
        }
        return penalty, MetricSums(sums)

    def _given(self, tensor: Tensor | None, name: str) -> Tensor:
        if tensor is None:
            raise ValueError(f"{type(self).__name__} needs {name}, but the batch was not annotated with it")
        return tensor
