"""REINFORCE++ (Hu et al. 2025): no critic and no groups; advantages are normalized over the whole batch.

The variant with the group's mean as baseline is a setting of GRPO: `configs/algorithm/reinforce_pp_baseline.yaml`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from learner.algorithms.advantages import gae, pad, pad_mask
from learner.algorithms.base import AdvantageInputs, AdvantageOutputs, Algorithm


@dataclass(frozen=True, kw_only=True)
class ReinforcePP(Algorithm):
    """The advantage of a token is the sum of the rewards from there on, including KL penalties, whitened."""

    gamma: float = 1.0
    whiten_advantages: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"algorithm: gamma={self.gamma} must lie in [0, 1]; 1 is usual")

    @torch.no_grad()
    def advantages(self, batch: AdvantageInputs) -> AdvantageOutputs:
        """Compute A_t = sum_{k >= t} gamma^(k - t) r_k, then whiten A over all ranks."""
        token_rewards = self.token_rewards(batch)
        mask = pad_mask(batch.sequence_index, len(batch.rewards))
        rewards = pad(token_rewards, mask)
        # With values of 0 and lambda 1, GAE is the discounted sum of rewards.
        sums, _ = gae(rewards, torch.zeros_like(rewards), mask, gamma=self.gamma, lam=1.0)
        return AdvantageOutputs(self.whitened(sums[mask], batch), None, token_rewards)
