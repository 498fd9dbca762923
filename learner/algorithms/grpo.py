"""GRPO (Shao et al. 2024): the baseline comes from the completions of the same prompt instead of a critic.

Dr. GRPO, DAPO, RLOO and REINFORCE++-baseline are settings of GRPO, with their own files in `configs/algorithm/`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch

from learner.algorithms.advantages import group_relative, leave_one_out
from learner.algorithms.base import AdvantageInputs, AdvantageOutputs, Algorithm
from learner.algorithms.importance import sum_per_sequence
from learner.algorithms.losses import Aggregation

Baseline = Literal["group_mean", "leave_one_out"]


@dataclass(frozen=True, kw_only=True)
class GRPO(Algorithm):
    """All tokens of a completion get the same advantage: its reward relative to its group."""

    min_group_size: ClassVar[int] = 2

    aggregation: Aggregation = "sequence_mean"
    baseline: Baseline = "group_mean"
    """Subtracted from the reward: group_mean, or leave_one_out, the mean of the other completions (RLOO)."""
    normalize_std: bool = True
    """Divide by the group's standard deviation. Without it, very easy and very hard prompts have smaller advantages."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.baseline not in get_args(Baseline):
            raise ValueError(f"algorithm: baseline is {self.baseline!r}; choose group_mean or leave_one_out")
        if self.baseline == "leave_one_out" and self.normalize_std:
            raise ValueError(
                "algorithm: baseline=leave_one_out with normalize_std=True is no published estimator; set normalize_std"
                " to false, or baseline to group_mean"
            )

    @torch.no_grad()
    def advantages(self, batch: AdvantageInputs) -> AdvantageOutputs:
        """Compute advantages from the total reward of each completion, which includes the KL penalty if `kl=reward`."""
        token_rewards = self.token_rewards(batch)
        totals = sum_per_sequence(token_rewards, batch.sequence_index)
        if self.baseline == "leave_one_out":
            compared = leave_one_out(totals, batch.group_index)
        else:
            compared = group_relative(totals, batch.group_index, normalize_std=self.normalize_std)
        advantages = self.whitened(compared[batch.sequence_index], batch)
        return AdvantageOutputs(advantages, None, token_rewards)
