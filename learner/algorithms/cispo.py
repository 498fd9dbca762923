"""CISPO (MiniMax-M1, 2025): GRPO's advantages, and REINFORCE weighted by the clipped ratio without gradient."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from learner.algorithms.base import LossInputs
from learner.algorithms.grpo import GRPO
from learner.algorithms.losses import Aggregation, cispo_loss


@dataclass(frozen=True, kw_only=True)
class CISPO(GRPO):
    """The clip bounds the weight of a token and never removes its gradient."""

    clip_low: float = 1.0
    """1: no lower bound, as published."""
    clip_high: float = 4.0
    aggregation: Aggregation = "token_mean"

    def policy_term(self, inputs: LossInputs, denominator: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
        """Return -sum n w clip(u) A log pi, a scalar."""
        return cispo_loss(
            inputs.logprobs,
            denominator,
            inputs.advantages,
            mask,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            importance_weights=weights,
            token_weights=inputs.token_weights,
        )
