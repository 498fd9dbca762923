"""How old data is weighed: the ratio of two policies, and the corrections that turn it into importance weights.

Called by the losses, the algorithms and the metrics; owns no state. Every log-ratio between policies is made here,
clamped to +-MAX_LOG_RATIO in float32 (float64 stays float64). Log-probability tensors are packed [N] or padded [B, T];
whatever stands where `loss_mask` is False, even NaN, reaches no result.

Symbols: mu the behavior policy, pi_prox the proximal policy, pi the policy being trained.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Largest |log-ratio|: e^20 squared still fits float32, so neither a loss nor a sum of squares overflows."""


def log_ratio(numerator: Tensor, denominator: Tensor, loss_mask: Tensor) -> Tensor:
    """log(numerator/denominator) of two log-probability tensors, clamped; 0 where `loss_mask` is False."""
    promoted = torch.promote_types(numerator.dtype, denominator.dtype)
    dtype = torch.float64 if promoted == torch.float64 else torch.float32
    difference = (numerator.to(dtype) - denominator.to(dtype)).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.where(loss_mask, difference, torch.zeros_like(difference))


def ratio(numerator: Tensor, denominator: Tensor, loss_mask: Tensor) -> Tensor:
    """numerator/denominator of two log-probability tensors; 1 where `loss_mask` is False."""
    return log_ratio(numerator, denominator, loss_mask).exp()


def truncated_weights(
    proximal_logprobs: Tensor, behavior_logprobs: Tensor, loss_mask: Tensor, *, max_importance_weight: float
) -> Tensor:
    """Truncated importance weights w = min(pi_prox/mu, C), without gradient; 0 where `loss_mask` is False."""
    weights = ratio(proximal_logprobs.detach(), behavior_logprobs.detach(), loss_mask)
    return weights.clamp(max=max_importance_weight) * loss_mask


class Correction(ABC):
    """What the distance between mu and pi_prox does to the loss `sg(w) * min(u A, clip(u) A)`."""

    @abstractmethod
    def weights(self, proximal_logprobs: Tensor, behavior_logprobs: Tensor, loss_mask: Tensor) -> Tensor:
        """The weight w of every token, of the inputs' shape, without gradient; 0 where `loss_mask` is False."""

    def proximal(self, proximal_logprobs: Tensor, behavior_logprobs: Tensor) -> Tensor:
        """The denominator of the clipped ratio u = pi/denominator: pi_prox, unless a correction clips against mu."""
        return proximal_logprobs

    @property
    def cap(self) -> float:
        """The weight above which a token counts as capped; infinite when nothing is truncated."""
        return math.inf


@dataclass(frozen=True, slots=True)
class DecoupledTIS(Correction):
    """Truncated importance sampling beside a proximal clip: w = min(pi_prox/mu, C), u = pi/pi_prox."""

    max_importance_weight: float = 2.0
    """C: above 0; 1 never amplifies a token, infinity never truncates one."""

    def __post_init__(self) -> None:
        if not self.max_importance_weight > 0:
            raise ValueError(
                f"correction decoupled_tis: max_importance_weight is {self.max_importance_weight}, which would remove"
                " every token; set it above 0 (2 is usual)"
            )

    def weights(self, proximal_logprobs: Tensor, behavior_logprobs: Tensor, loss_mask: Tensor) -> Tensor:
        """min(pi_prox/mu, C)."""
        return truncated_weights(
            proximal_logprobs, behavior_logprobs, loss_mask, max_importance_weight=self.max_importance_weight
        )

    @property
    def cap(self) -> float:
        """C."""
        return self.max_importance_weight


@dataclass(frozen=True, slots=True)
class TokenMask(Correction):
    """IcePop: a token whose pi_prox/mu lies outside [low, high] is left out; inside, w = pi_prox/mu. u = pi/pi_prox."""

    low: float = 0.5
    high: float = 5.0

    def __post_init__(self) -> None:
        if not 0 <= self.low <= 1 <= self.high:
            raise ValueError(
                f"correction token_mask: the interval [{self.low}, {self.high}] must contain 1 and not reach below 0,"
                " or on-policy tokens are masked too; set low to 0..1 and high to 1 or more"
            )

    def weights(self, proximal_logprobs: Tensor, behavior_logprobs: Tensor, loss_mask: Tensor) -> Tensor:
        """pi_prox/mu where it lies in [low, high], else 0."""
        weights = ratio(proximal_logprobs.detach(), behavior_logprobs.detach(), loss_mask)
        return weights * ((weights >= self.low) & (weights <= self.high) & loss_mask)


@dataclass(frozen=True, slots=True)
class PPOBehavior(Correction):
    """Textbook PPO on stale data: u = pi/mu is clipped, w = 1. The trust region then lies around old policies."""

    def weights(self, proximal_logprobs: Tensor, behavior_logprobs: Tensor, loss_mask: Tensor) -> Tensor:
        """1 on every token of the mask."""
        return _ones(proximal_logprobs, behavior_logprobs, loss_mask)

    def proximal(self, proximal_logprobs: Tensor, behavior_logprobs: Tensor) -> Tensor:
        """mu, so that pi/mu is what is clipped."""
        return behavior_logprobs


@dataclass(frozen=True, slots=True)
class NoCorrection(Correction):
    """Data is taken as if pi_prox had sampled it: w = 1, u = pi/pi_prox. The metrics still show the distance."""

    def weights(self, proximal_logprobs: Tensor, behavior_logprobs: Tensor, loss_mask: Tensor) -> Tensor:
        """1 on every token of the mask."""
        return _ones(proximal_logprobs, behavior_logprobs, loss_mask)


def _ones(proximal_logprobs: Tensor, behavior_logprobs: Tensor, loss_mask: Tensor) -> Tensor:
    return torch.ones_like(log_ratio(proximal_logprobs.detach(), behavior_logprobs.detach(), loss_mask)) * loss_mask
