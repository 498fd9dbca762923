"""PPO (Schulman et al. 2017) with a separate critic: GAE, the clipped policy loss, the clipped value loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from learner.advantages import gae, pad_mask, whiten
from learner.algorithm import AdvantageInputs, AdvantageOutputs, Algorithm, LossOutputs, ValueLossInputs
from learner.losses import value_loss
from learner.metrics import MetricSums, value_metrics


@dataclass(frozen=True, kw_only=True)
class PPO(Algorithm):
    """Every token is a step; the critic says what was to be expected there."""

    needs_critic: ClassVar[bool] = True

    gamma: float = 1.0
    lam: float = 0.95
    value_clip: float | None = 0.2
    """How far a value may move from where the batch began before its loss stops following; None or 0 disables."""
    whiten_advantages: bool = True
    """Mean 0 and variance 1 over the scored tokens of the whole batch, all ranks together."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 <= self.gamma <= 1 and 0 <= self.lam <= 1):
            raise ValueError(
                f"algorithm ppo: gamma={self.gamma} and lam={self.lam} must lie in [0, 1]; 1 and 0.95 are usual"
            )

    @torch.no_grad()
    def advantages(self, batch: AdvantageInputs) -> AdvantageOutputs:
        """GAE per trajectory, then whitening over all ranks; the returns are not whitened."""
        packed_values = self._given(batch.values, "values")
        token_rewards = self.token_rewards(batch)
        mask = pad_mask(batch.sequence_index, len(batch.rewards))
        rewards, values = (
            torch.zeros(mask.shape, dtype=packed.dtype, device=packed.device).masked_scatter(mask, packed)
            for packed in (token_rewards, packed_values)
        )
        padded_advantages, padded_returns = gae(rewards, values, mask, gamma=self.gamma, lam=self.lam)
        advantages = padded_advantages[mask]
        if self.whiten_advantages:
            advantages = whiten(advantages, torch.ones_like(advantages, dtype=torch.bool), reduce=batch.reduce)
        return AdvantageOutputs(advantages, padded_returns[mask], token_rewards)

    def value_loss(self, inputs: ValueLossInputs) -> LossOutputs:
        """0.5 max((V - R)^2, (clipped V - R)^2), aggregated as the policy loss is."""
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
