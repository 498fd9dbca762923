"""GRPO (Shao et al. 2024): the other completions of the same prompt take the critic's place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from learner.advantages import group_relative
from learner.algorithm import AdvantageInputs, AdvantageOutputs, Algorithm


@dataclass(frozen=True, kw_only=True)
class GRPO(Algorithm):
    """Every token of a completion gets its advantage: reward less the group's mean, over the group's deviation."""

    min_group_size: ClassVar[int] = 2

    normalize_std: bool = True
    """Divide by the group's standard deviation; off, easy and hard prompts keep their smaller advantages."""

    @torch.no_grad()
    def advantages(self, batch: AdvantageInputs) -> AdvantageOutputs:
        """Group-relative advantages of the completions' total rewards, KL penalty included if it is in the reward."""
        token_rewards = self.token_rewards(batch)
        totals = torch.zeros_like(batch.rewards, dtype=token_rewards.dtype)
        totals = totals.index_add(0, batch.sequence_index, token_rewards)
        advantages = group_relative(totals, batch.group_index, normalize_std=self.normalize_std)
        return AdvantageOutputs(advantages[batch.sequence_index], None, token_rewards)
