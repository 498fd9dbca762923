"""GSPO (Zheng et al. 2025): GRPO's advantages, with one ratio for the whole completion."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from learner.algorithms.corrections import Distance
from learner.algorithms.grpo import GRPO
from learner.algorithms.losses import sequence_denominator


@dataclass(frozen=True, kw_only=True)
class GSPO(GRPO):
    """The ratio u is the geometric mean of the completion's token ratios. One clip, close to 1, applies to all."""

    clip_low: float = 3e-4
    clip_high: float = 4e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.correction.clips_behavior:
            raise ValueError(
                f"algorithm: GSPO clips a completion's ratio at 1 - {self.clip_low} and 1 + {self.clip_high}; against"
                " the behavior policy the engines' rounding alone moves it further, and nearly all would be cut off;"
                " choose correction=decoupled_tis or sequence_tis"
            )

    def denominator(self, logprobs: Tensor, distance: Distance) -> Tensor:
        """Return log d, [M], such that pi/d is the completion's ratio to pi_prox."""
        return sequence_denominator(logprobs, distance.proximal_logprobs, distance.loss_mask, distance.sequence_index)
