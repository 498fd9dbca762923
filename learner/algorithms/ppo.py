"""PPO (Schulman et al. 2017) with a separate critic: advantages from GAE or V-trace, and the clipped value loss.

The clipped policy loss is the same for all algorithms: `Algorithm.loss` in `learner/algorithms/base.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from learner.algorithms.advantages import pad, pad_mask
from learner.algorithms.base import AdvantageInputs, AdvantageOutputs, Algorithm, LossOutputs, ValueLossInputs
from learner.algorithms.losses import value_loss
from learner.algorithms.metrics import MetricSums, value_metrics


@dataclass(frozen=True, kw_only=True)
class PPO(Algorithm):
    """Every token is one step of the episode, with the critic's value as its baseline."""

    needs_critic: ClassVar[bool] = True

    gamma: float = 1.0
    lam: float = 1.0
    value_clip: float | None = 0.2
    """The value loss clips V to [V_old - value_clip, V_old + value_clip]; None or 0: no clip."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 <= self.gamma <= 1 and 0 <= self.lam <= 1):
            raise ValueError(
                f"algorithm ppo: gamma={self.gamma} and lam={self.lam} must lie in [0, 1]; 1 and 0.95 are usual"
            )

    @torch.no_grad()
    def advantages(self, batch: AdvantageInputs) -> AdvantageOutputs:
        """Compute GAE or V-trace per trajectory. Whitening over all ranks changes the advantages, never the returns."""
        token_rewards = self.token_rewards(batch)
        mask = pad_mask(batch.sequence_index, len(batch.rewards))
        proximal = batch.proximal_logprobs
        advantages, returns = self.correction.estimate(
            pad(token_rewards, mask),
            pad(self._given(batch.values, "values"), mask),
            mask,
            gamma=self.gamma,
            lam=self.lam,
            proximal_logprobs=None if proximal is None else pad(proximal, mask),
            behavior_logprobs=pad(batch.behavior_logprobs, mask),
        )
        return AdvantageOutputs(self.whitened(advantages[mask], batch), returns[mask], token_rewards)

    def value_loss(self, inputs: ValueLossInputs) -> LossOutputs:
        """Compute 0.5 max((V - R)^2, (clipped V - R)^2), with the token weights of the policy loss."""
        mask = inputs.token_weights > 0
        loss = value_loss(
            inputs.values,
            inputs.old_values,
            inputs.returns,
            mask,
            value_clip=self.value_clip,
            token_weights=inputs.token_weights,
        )
        metrics = value_metrics(
            values=inputs.values,
            old_values=inputs.old_values,
            returns=inputs.returns,
            loss_mask=mask,
            value_clip=self.value_clip,
        )
        return LossOutputs(loss, metrics + MetricSums({"value_loss": loss.detach()}))
