"""The off-policy corrections: how the ratio pi_prox/mu enters the loss `sg(w) * min(u A, clip(u) A)`.

Each correction is a frozen class, selected by Hydra's `_target_` and called by the algorithm. Ratios and shapes are
those of `learner/algorithms/importance.py`. Class attributes state what a correction needs; an algorithm that cannot
provide it raises an error.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, get_args

import torch
from torch import Tensor

from learner.algorithms.advantages import gae
from learner.algorithms.importance import (
    SequenceRatio,
    ratio,
    sequence_log_ratio,
    sum_per_sequence,
    to_tokens,
    truncated_weights,
    vtrace,
)


@dataclass(frozen=True, slots=True, eq=False)
class Distance:
    """The inputs of a correction: one microbatch of whole sequences, [M] or [B, T]; no gradient."""

    proximal_logprobs: Tensor
    """log pi_prox."""
    behavior_logprobs: Tensor
    """log mu."""
    advantages: Tensor
    loss_mask: Tensor
    """bool."""
    sequence_index: Tensor | None = None
    """[M] int64: the sequence of each packed token; None: every row is a sequence."""

    def ratios(self) -> Tensor:
        """Return pi_prox/mu of each token; 1 where the mask is False."""
        return ratio(self.proximal_logprobs, self.behavior_logprobs, self.loss_mask)

    def sequence_ratios(self, kind: SequenceRatio) -> Tensor:
        """Return pi_prox/mu of the whole sequence, at each of its tokens; 1 where the mask is False."""
        logs = self.proximal_logprobs, self.behavior_logprobs
        return sequence_log_ratio(*logs, self.loss_mask, self.sequence_index, kind=kind).exp()

    def ones(self) -> Tensor:
        """Return 1 at each token, 0 where the mask is False, in the dtype of the ratios."""
        return self.loss_mask.to(self.ratios().dtype)

    def truncated(self, cap: float) -> Tensor:
        """Return min(pi_prox/mu, cap) of each token; 0 where the mask is False."""
        logs = self.proximal_logprobs, self.behavior_logprobs
        return truncated_weights(*logs, self.loss_mask, max_importance_weight=cap)


class Correction(ABC):
    """How the ratio pi_prox/mu enters the loss."""

    corrects_targets: ClassVar[bool] = False
    """Whether the correction changes the critic's targets. pi_prox must then be known before the advantages are
    computed."""
    judges_completions: ClassVar[bool] = False
    """Whether w depends on whether the whole completion was good. A critic's advantages, which differ per token, cannot
    tell."""
    clips_behavior: ClassVar[bool] = False
    """Whether the clipped ratio u is pi/mu instead of pi/pi_prox."""

    @abstractmethod
    def weights(self, distance: Distance) -> Tensor:
        """Return the importance weight w of every token, without gradient; 0 where the mask is False."""

    def ratios(self, distance: Distance) -> Tensor:
        """Return the ratios before truncation or masking: pi_prox/mu of each token, or of its sequence."""
        return distance.ratios()

    @property
    def cap(self) -> float:
        """The ratio above which a token counts as capped in the metrics; infinite when nothing is truncated."""
        return math.inf

    def estimate(
        self,
        rewards: Tensor,
        values: Tensor,
        loss_mask: Tensor,
        *,
        gamma: float,
        lam: float,
        proximal_logprobs: Tensor | None,
        behavior_logprobs: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return (advantages, targets of the critic), padded [B, T], by GAE; a correction of targets overrides this."""
        return gae(rewards, values, loss_mask, gamma=gamma, lam=lam)


@dataclass(frozen=True, slots=True)
class DecoupledTIS(Correction):
    """Truncated importance sampling together with a proximal clip: w = min(pi_prox/mu, C), u = pi/pi_prox."""

    max_importance_weight: float = 2.0
    """C, above 0. With 1 no token is amplified; with infinity none is truncated."""

    def __post_init__(self) -> None:
        _check_cap("decoupled_tis", "max_importance_weight", self.max_importance_weight)

    def weights(self, distance: Distance) -> Tensor:
        """Return min(pi_prox/mu, C)."""
        return distance.truncated(self.max_importance_weight)

    @property
    def cap(self) -> float:
        """C."""
        return self.max_importance_weight


@dataclass(frozen=True, slots=True)
class ClippedTIS(Correction):
    """PPO's clip against mu as a weight: w = min(pi_prox/mu, C), or 0 where the policy has already moved far enough.

    w is 0 where A >= 0 and pi_prox/mu > `high`, and where A < 0 and pi_prox/mu < `low`. A token that moved against its
    advantage keeps its weight, so the policy can move back. u = pi/pi_prox.
    """

    low: float = 0.6
    high: float = 2.0
    max_importance_weight: float = 5.0
    """C."""

    def __post_init__(self) -> None:
        _check_interval("clipped_tis", self.low, self.high)
        _check_cap("clipped_tis", "max_importance_weight", self.max_importance_weight)

    def weights(self, distance: Distance) -> Tensor:
        """Return min(pi_prox/mu, C), or 0."""
        ratios = distance.ratios()
        arrived = torch.where(distance.advantages < 0, ratios < self.low, ratios > self.high)
        return distance.truncated(self.max_importance_weight) * ~arrived

    @property
    def cap(self) -> float:
        """C."""
        return self.max_importance_weight


@dataclass(frozen=True, slots=True)
class TokenMask(Correction):
    """IcePop: w = pi_prox/mu for tokens where it lies in [low, high], 0 for the others. u = pi/pi_prox."""

    low: float = 0.5
    high: float = 5.0

    def __post_init__(self) -> None:
        _check_interval("token_mask", self.low, self.high)

    def weights(self, distance: Distance) -> Tensor:
        """Return pi_prox/mu where it lies in [low, high], else 0."""
        return _inside(self.ratios(distance), self.low, self.high) * distance.loss_mask


@dataclass(frozen=True, slots=True)
class PPOBehavior(Correction):
    """Textbook PPO on stale data: u = pi/mu is clipped, w = 1. The trust region is then around the behavior policy."""

    clips_behavior: ClassVar[bool] = True

    def weights(self, distance: Distance) -> Tensor:
        """Return 1 at every unmasked token."""
        return distance.ones()


@dataclass(frozen=True, slots=True)
class NoCorrection(Correction):
    """Treat data as if pi_prox had sampled it: w = 1, u = pi/pi_prox. The metrics still show the ratio pi_prox/mu."""

    def weights(self, distance: Distance) -> Tensor:
        """Return 1 at every unmasked token."""
        return distance.ones()


@dataclass(frozen=True, slots=True)
class SequenceMask(Correction):
    """w = pi_prox/mu of the whole sequence where it lies in [low, high], 0 for other sequences. u = pi/pi_prox.

    The product moves away from 1 as the sequence gets longer; the geometric mean does not depend on the length.
    """

    ratio: SequenceRatio = "geometric"
    low: float = 0.5
    high: float = 2.0

    def __post_init__(self) -> None:
        _check_kind("sequence_mask", self.ratio)
        _check_interval("sequence_mask", self.low, self.high)

    def weights(self, distance: Distance) -> Tensor:
        """Return the sequence's ratio where it lies in [low, high], else 0."""
        return _inside(self.ratios(distance), self.low, self.high) * distance.loss_mask

    def ratios(self, distance: Distance) -> Tensor:
        """Return pi_prox/mu of the whole sequence."""
        return distance.sequence_ratios(self.ratio)


@dataclass(frozen=True, slots=True)
class SequenceTIS(Correction):
    """w = min(C, pi_prox/mu of the whole sequence) for all of its tokens. u = pi/pi_prox."""

    ratio: SequenceRatio = "product"
    max_importance_weight: float = 2.0
    """C."""

    def __post_init__(self) -> None:
        _check_kind("sequence_tis", self.ratio)
        _check_cap("sequence_tis", "max_importance_weight", self.max_importance_weight)

    def weights(self, distance: Distance) -> Tensor:
        """Return min(C, the sequence's ratio)."""
        return self.ratios(distance).clamp(max=self.max_importance_weight) * distance.loss_mask

    def ratios(self, distance: Distance) -> Tensor:
        """Return pi_prox/mu of the whole sequence."""
        return distance.sequence_ratios(self.ratio)

    @property
    def cap(self) -> float:
        """C."""
        return self.max_importance_weight


@dataclass(frozen=True, slots=True)
class TOPR(Correction):
    """Tapered off-policy REINFORCE: w = 1 for good completions, min(1, pi_prox/mu of the whole sequence) for bad ones.

    A completion is good when its advantages sum to 0 or more. The policy imitates a good completion even after that
    completion has become unlikely. The policy is pushed away from a bad completion only as far as it would still sample
    it.
    """

    judges_completions: ClassVar[bool] = True

    def weights(self, distance: Distance) -> Tensor:
        """Return 1 for a good completion, or min(1, the sequence's product ratio) for a bad one."""
        mask, index = distance.loss_mask, distance.sequence_index
        sums = sum_per_sequence(torch.where(mask, distance.advantages, 0.0), index)
        tapered = self.ratios(distance).clamp(max=1.0)
        return torch.where(to_tokens(sums >= 0, index), torch.ones_like(tapered), tapered) * mask

    def ratios(self, distance: Distance) -> Tensor:
        """Return pi_prox/mu of the whole sequence."""
        return distance.sequence_ratios("product")

    @property
    def cap(self) -> float:
        """1."""
        return 1.0


@dataclass(frozen=True, slots=True)
class VTrace(Correction):
    """IMPALA: also corrects targets and advantages of the critic; w = min(pi_prox/mu, rho_bar), u = pi/pi_prox."""

    corrects_targets: ClassVar[bool] = True

    rho_bar: float = 1.0
    c_bar: float = 1.0

    def __post_init__(self) -> None:
        _check_cap("vtrace", "rho_bar", self.rho_bar)
        _check_cap("vtrace", "c_bar", self.c_bar)
        if self.c_bar > self.rho_bar:
            raise ValueError(
                f"correction vtrace: c_bar={self.c_bar} is above rho_bar={self.rho_bar}, and V-trace is defined for"
                " c_bar <= rho_bar; set c_bar lower"
            )

    def weights(self, distance: Distance) -> Tensor:
        """Return min(pi_prox/mu, rho_bar)."""
        return distance.truncated(self.rho_bar)

    @property
    def cap(self) -> float:
        """rho_bar."""
        return self.rho_bar

    def estimate(
        self,
        rewards: Tensor,
        values: Tensor,
        loss_mask: Tensor,
        *,
        gamma: float,
        lam: float,
        proximal_logprobs: Tensor | None,
        behavior_logprobs: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return V-trace's (advantages, targets)."""
        if proximal_logprobs is None:
            raise ValueError("correction vtrace needs proximal_logprobs, but the batch was not annotated with them")
        coefficients = {"gamma": gamma, "lam": lam, "rho_bar": self.rho_bar, "c_bar": self.c_bar}
        targets, advantages = vtrace(proximal_logprobs, behavior_logprobs, rewards, values, loss_mask, **coefficients)
        return advantages, targets


def _inside(ratios: Tensor, low: float, high: float) -> Tensor:
    return ratios * ((ratios >= low) & (ratios <= high))


def _check_cap(name: str, setting: str, value: float) -> None:
    if not value > 0:
        raise ValueError(
            f"correction {name}: {setting} is {value}, which would remove every token; set it above 0 (1 or 2 is usual)"
        )


def _check_interval(name: str, low: float, high: float) -> None:
    if not 0 <= low <= 1 <= high:
        raise ValueError(
            f"correction {name}: the interval [{low}, {high}] must contain 1 and not reach below 0, or on-policy tokens"
            " are masked too; set low to 0..1 and high to 1 or more"
        )


def _check_kind(name: str, kind: str) -> None:
    if kind not in get_args(SequenceRatio):
        raise ValueError(f"correction {name}: ratio is {kind!r}; choose product or geometric")
