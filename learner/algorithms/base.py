"""The base class of the algorithms: advantages once per batch, a loss once per microbatch, and the inputs of both.

An algorithm is one frozen class, selected by Hydra's `_target_`. The training loop calls every algorithm in the same
way and never asks for its name. An algorithm owns coefficients and no state, and calls neither models nor other
processes. All token tensors are packed over scored tokens [M]. Advantages get a rank's whole batch, losses a microbatch
of whole sequences.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from learner.algorithms.advantages import Reduce, shape_rewards, terminal_rewards, whiten
from learner.algorithms.corrections import ClippedTIS, Correction, Distance
from learner.algorithms.kl import KLSchedule, ScheduleKind
from learner.algorithms.losses import (
    Aggregation,
    KLKind,
    batch_counts,
    kl_estimate,
    policy_loss,
    token_weights,
    weighted_sum,
)
from learner.algorithms.metrics import MetricSums, policy_metrics

KLPlace = Literal["off", "reward", "loss"]
"""Where the KL to the reference is penalized."""


@dataclass(frozen=True, slots=True, eq=False)
class AdvantageInputs:
    """The whole groups of one rank's batch."""

    rewards: Tensor
    """[num_sequences] float."""
    group_index: Tensor
    """[num_sequences] int64: the group of each trajectory."""
    sequence_index: Tensor
    """[M] int64: the trajectory of each scored token. Contiguous and in order; no trajectory is left out."""
    behavior_logprobs: Tensor
    """[M] log mu."""
    values: Tensor | None = None
    """[M] from the critic, if the algorithm needs one."""
    proximal_logprobs: Tensor | None = None
    """[M] log pi_prox; None with one optimizer step per batch, to save a forward pass, unless
    `Algorithm.needs_proximal`."""
    ref_logprobs: Tensor | None = None
    """[M] from the reference, if the algorithm needs one."""
    kl_coef: float | None = None
    """The KL coefficient of this batch; None: the algorithm's `kl_coef`."""
    reduce: Reduce | None = None
    """Sums a small float64 tensor over the ranks; None with one rank."""


@dataclass(frozen=True, slots=True, eq=False)
class AdvantageOutputs:
    """The result of `Algorithm.advantages`; no gradient."""

    advantages: Tensor
    """[M]."""
    returns: Tensor | None
    """[M] targets of the critic; None without a critic."""
    token_rewards: Tensor
    """[M] the reward at each trajectory's last token, minus the KL penalty if `kl=reward`."""


@dataclass(frozen=True, slots=True, eq=False)
class LossInputs:
    """One microbatch of the policy. Only `logprobs` and `entropy` carry a gradient."""

    logprobs: Tensor
    """[M] log pi."""
    entropy: Tensor
    """[M] in nats, of the distribution that each token was sampled from."""
    behavior_logprobs: Tensor
    """[M] log mu."""
    advantages: Tensor
    """[M]."""
    token_weights: Tensor
    """[M] from `Algorithm.token_weights`; 0 masks a token."""
    sequence_index: Tensor
    """[M] int64: the trajectory of each token; trajectories are whole."""
    proximal_logprobs: Tensor | None = None
    """[M] log pi_prox; None with one optimizer step per batch, where pi_prox = sg(pi)."""
    ref_logprobs: Tensor | None = None
    """[M] from the reference; required with `kl=loss`, otherwise only for metrics."""
    kl_coef: float | None = None
    """The KL coefficient of this step; None: the algorithm's `kl_coef`."""


@dataclass(frozen=True, slots=True, eq=False)
class ValueLossInputs:
    """One microbatch of the critic. Only `values` carries a gradient."""

    values: Tensor
    """[M] under the weights being trained."""
    old_values: Tensor
    """[M] from before the first optimizer step of the batch."""
    returns: Tensor
    """[M] targets."""
    token_weights: Tensor
    """[M] from `Algorithm.token_weights`; 0 masks a token."""


@dataclass(frozen=True, slots=True, eq=False)
class LossOutputs:
    """One microbatch's share of the loss; the sum over all microbatches of all ranks is the loss of the step."""

    loss: Tensor
    """Scalar, to call `backward` on."""
    metrics: MetricSums


@dataclass(frozen=True, kw_only=True)
class Algorithm(ABC):
    """The clipped policy loss with corrections. Subclasses add the advantages and override what else differs.

    Raises:
        ValueError: when fields contradict each other.
    """

    needs_critic: ClassVar[bool] = False
    min_group_size: ClassVar[int] = 1
    """Smallest number of completions per prompt; with fewer, every advantage would be 0."""

    correction: Correction = field(default_factory=ClippedTIS)
    clip_low: float = 0.2
    clip_high: float = 0.2
    """u = pi/pi_prox is clipped to [1 - clip_low, 1 + clip_high]."""
    whiten_advantages: bool = False
    """Give the advantages mean 0 and variance 1 over the scored tokens of the whole batch, all ranks together."""
    reward_scale: float = 1.0
    reward_shift: float = 0.0
    reward_clip: float | None = None
    """A reward r becomes clip(reward_scale r + reward_shift, -reward_clip, reward_clip); None: no clip."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    aggregation: Aggregation = "token_mean"
    constant_length: int = 0
    """Tokens; only for `aggregation=constant`."""
    kl: KLPlace = "off"
    """Where the KL to the reference is penalized: nowhere, in the reward (k1, per token) or in the loss."""
    kl_kind: KLKind | None = None
    """The estimator. None: k3 in the loss, k1 in the reward, which takes no other."""
    kl_coef: float = 0.0
    """The KL coefficient; with a schedule, its first value."""
    kl_schedule: ScheduleKind = "fixed"
    """fixed | linear (to `kl_final_coef`) | adaptive (towards `kl_target`)."""
    kl_final_coef: float = 0.0
    """linear: the coefficient after `kl_schedule_steps`."""
    kl_schedule_steps: int = 0
    """linear: number of versions from the first coefficient to the last."""
    kl_target: float = 6.0
    """adaptive: target of the KL, in nats per completion, summed over its tokens."""
    kl_horizon: float = 10_000.0
    """adaptive: number of completions over which an error of 20 % or more changes the coefficient by about 20 %."""
    reference_refresh_every: int = 0
    """Number of versions after which the trained policy becomes the reference; 0: the initial policy stays the
    reference."""

    def __post_init__(self) -> None:
        self._check_kl()
        name = type(self).__name__
        if self.correction.corrects_targets and not self.needs_critic:
            raise ValueError(
                f"algorithm: {name} has no critic whose targets {type(self.correction).__name__} could correct; choose"
                " algorithm=ppo, or correction=decoupled_tis"
            )
        if self.correction.judges_completions and self.needs_critic:
            raise ValueError(
                f"algorithm: {type(self.correction).__name__} asks whether a completion as a whole was good, and the"
                f" critic of {name} judges every token by itself; choose an algorithm without critic, for example"
                " algorithm=rloo, or correction=decoupled_tis"
            )
        # Conditions are written so that nan fails them.
        if not (0 <= self.clip_low <= 1 and self.clip_high >= 0):
            raise ValueError(
                f"algorithm: clip_low={self.clip_low} must lie in [0, 1] and clip_high={self.clip_high} at or above 0;"
                " 0.2 is usual for both"
            )
        if not (self.reward_scale > 0 and (self.reward_clip is None or self.reward_clip > 0)):
            raise ValueError(
                f"algorithm: reward_scale={self.reward_scale} and reward_clip={self.reward_clip} must be above 0, or"
                " good and bad completions look alike; leave reward_clip null to clip nothing"
            )
        for name in ("reward_scale", "reward_shift", "entropy_coef"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"algorithm: {name}={getattr(self, name)} is no number; use a finite one")
        if self.aggregation not in get_args(Aggregation):
            raise ValueError(
                f"algorithm: aggregation is {self.aggregation!r}; choose token_mean, sequence_mean or constant"
            )
        if self.aggregation == "constant" and self.constant_length < 1:
            raise ValueError(
                f"algorithm: aggregation=constant divides by constant_length={self.constant_length}; set it to the"
                " longest completion in tokens"
            )

    def _check_kl(self) -> None:
        if self.kl not in get_args(KLPlace):
            raise ValueError(
                f"algorithm: kl is {self.kl!r}; choose 'off', 'reward' or 'loss' (in YAML with quotes: off without them"
                " means false)"
            )
        if self.kl_kind is not None and self.kl_kind not in get_args(KLKind):
            raise ValueError(f"algorithm: kl_kind is {self.kl_kind!r}; choose k1, k2 or k3")
        if self.kl == "reward" and self.kl_kind in ("k2", "k3"):
            raise ValueError(
                f"algorithm: kl=reward takes the estimator k1; leave kl_kind={self.kl_kind} out or kl=loss"
            )
        never_positive = not self.kl_coef_schedule.is_ever_positive
        if min(self.kl_coef, self.kl_final_coef) < 0 or (self.kl != "off" and never_positive):
            raise ValueError(
                f"algorithm: kl={self.kl} with kl_coef={self.kl_coef} punishes nothing; set kl_coef above 0 or kl='off'"
            )
        if self.reference_refresh_every < 0 or (self.reference_refresh_every and self.kl == "off"):
            raise ValueError(
                f"algorithm: reference_refresh_every={self.reference_refresh_every} with kl={self.kl} refreshes"
                " nothing; set kl to reward or loss, or leave it 0"
            )

    @property
    def kl_coef_schedule(self) -> KLSchedule:
        """The KL coefficient of each optimizer step."""
        return KLSchedule(
            kind=self.kl_schedule,
            coef=self.kl_coef,
            final_coef=self.kl_final_coef,
            num_steps=self.kl_schedule_steps,
            target=self.kl_target,
            horizon=self.kl_horizon,
        )

    @property
    def needs_reference(self) -> bool:
        """Whether `ref_logprobs` are required."""
        return self.kl != "off"

    @property
    def needs_proximal(self) -> bool:
        """Whether `AdvantageInputs.proximal_logprobs` is required even with one optimizer step per batch."""
        return self.correction.corrects_targets

    @abstractmethod
    def advantages(self, batch: AdvantageInputs) -> AdvantageOutputs:
        """Return advantages and returns from rewards. Waits for: the other ranks, if the algorithm calls `reduce`."""

    def value_loss(self, inputs: ValueLossInputs) -> LossOutputs:
        """Return the critic's loss of one microbatch, for the critic's optimizer; only where `needs_critic`."""
        raise TypeError(f"{type(self).__name__} has no critic, so it has no value loss")

    def token_weights(
        self, loss_mask: Tensor, sequence_index: Tensor, *, num_tokens: float, num_sequences: float
    ) -> Tensor:
        """Return the weight of each token in the loss, [M].

        The counts are `losses.batch_counts` of the optimizer step, summed over all ranks.
        """
        return token_weights(
            loss_mask,
            sequence_index,
            aggregation=self.aggregation,
            num_tokens=num_tokens,
            num_sequences=num_sequences,
            constant_length=self.constant_length,
        )

    def loss(self, inputs: LossInputs) -> LossOutputs:
        """Return policy_loss + kl_coef * KL (if `kl=loss`) - entropy_coef * entropy, of one microbatch."""
        mask = inputs.token_weights > 0
        proximal = inputs.logprobs.detach() if inputs.proximal_logprobs is None else inputs.proximal_logprobs
        distance = Distance(proximal, inputs.behavior_logprobs, inputs.advantages, mask, inputs.sequence_index)
        weights = self.correction.weights(distance)
        denominator = self.denominator(inputs.logprobs, distance)
        policy_term = self.policy_term(inputs, denominator, weights, mask)
        entropy = weighted_sum(inputs.entropy, mask, inputs.token_weights)
        total = policy_term - self.entropy_coef * entropy if self.entropy_coef else policy_term
        metrics = policy_metrics(
            logprobs=inputs.logprobs,
            proximal_logprobs=proximal,
            behavior_logprobs=inputs.behavior_logprobs,
            ratio_logprobs=denominator,
            advantages=inputs.advantages,
            entropy=inputs.entropy,
            importance_weights=weights,
            capped=self.correction.ratios(distance) > self.correction.cap,
            loss_mask=mask,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
        )
        if self.kl == "loss" or inputs.ref_logprobs is not None:
            penalty, kl_metrics = self._reference_kl(inputs, mask)
            total = total + penalty
            metrics = metrics + kl_metrics
        terms = MetricSums({"policy_loss": policy_term.detach(), "total_loss": total.detach()})
        return LossOutputs(total, metrics + terms)

    def denominator(self, logprobs: Tensor, distance: Distance) -> Tensor:
        """Return the log of the denominator of the clipped ratio u, [M]; no gradient."""
        return distance.behavior_logprobs if self.correction.clips_behavior else distance.proximal_logprobs

    def policy_term(self, inputs: LossInputs, denominator: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
        """Return the clipped policy loss, a scalar."""
        return policy_loss(
            inputs.logprobs,
            denominator,
            inputs.advantages,
            mask,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            importance_weights=weights,
            token_weights=inputs.token_weights,
        )

    def token_rewards(self, batch: AdvantageInputs) -> Tensor:
        """Return the reward at each token, [M].

        The last token of a trajectory gets the trajectory's shaped reward. With `kl=reward`, kl_coef * k1 is subtracted
        at every token. The KL is that of pi_prox, or of mu if the batch has no `proximal_logprobs`.
        """
        logprobs = batch.behavior_logprobs if batch.proximal_logprobs is None else batch.proximal_logprobs
        shaped = shape_rewards(batch.rewards, scale=self.reward_scale, shift=self.reward_shift, clip=self.reward_clip)
        rewards = terminal_rewards(shaped, batch.sequence_index, dtype=logprobs.dtype)
        if self.kl == "reward":
            reference = self._given(batch.ref_logprobs, "ref_logprobs")
            rewards = rewards - self._kl_coef(batch.kl_coef) * kl_estimate(logprobs.detach(), reference, "k1")
        return rewards

    def whitened(self, advantages: Tensor, batch: AdvantageInputs) -> Tensor:
        """Return the advantages of all tokens, [M], whitened over all ranks if `whiten_advantages`."""
        if not self.whiten_advantages:
            return advantages
        return whiten(advantages, torch.ones_like(advantages, dtype=torch.bool), reduce=batch.reduce)

    def _kl_coef(self, given: float | None) -> float:
        return self.kl_coef if given is None else given

    def _reference_kl(self, inputs: LossInputs, mask: Tensor) -> tuple[Tensor, MetricSums]:
        """Return (KL term of the loss, 0 unless `kl=loss`; sums of the KL to the reference for the metrics)."""
        # Mask before subtracting: the gradient of e^NaN is NaN even where its value is not summed.
        reference = torch.where(mask, self._given(inputs.ref_logprobs, "ref_logprobs"), 0.0)
        logprobs = torch.where(mask, inputs.logprobs, 0.0)
        fixed = logprobs.detach()
        coefficient = self._kl_coef(inputs.kl_coef) if self.kl == "loss" else 0.0
        estimate = kl_estimate(logprobs, reference, self.kl_kind or "k3")
        penalty = coefficient * weighted_sum(estimate, mask, inputs.token_weights)
        ones = torch.ones_like(inputs.token_weights)
        sums = {
            "kl_penalty": penalty.detach(),
            "reference_kl_k1": weighted_sum(kl_estimate(fixed, reference, "k1"), mask, ones),
            "reference_kl_k3": weighted_sum(kl_estimate(fixed, reference, "k3"), mask, ones),
            "num_sequences": batch_counts(mask, inputs.sequence_index)[1],
        }
        return penalty, MetricSums(sums)

    def _given(self, tensor: Tensor | None, name: str) -> Tensor:
        if tensor is None:
            raise ValueError(f"{type(self).__name__} needs {name}, but the batch was not annotated with it")
        return tensor
