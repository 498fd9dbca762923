"""The results of an optimizer step that decide how a run goes on: stop conditions and the adaptive KL coefficient.

The training loop makes one `StepResults` per optimizer step, equal on every rank. The metrics that are only displayed
are made from the same sums but decide nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class NetworkStep:
    """One optimizer step of one network."""

    gradient_norm: float
    """Over all ranks, before clipping; not finite when the step was skipped."""
    learning_rate: float

    @property
    def was_skipped(self) -> bool:
        """Whether the loss or the gradient was not finite, so that the weights stayed what they were."""
        return not math.isfinite(self.gradient_norm)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportanceWeights:
    """Statistics of the untruncated ratios rho = pi_prox/mu over the M scored tokens of a step."""

    effective_sample_size: float
    """(sum rho)^2 / (M sum rho^2), in (0, 1]."""
    mean: float
    std: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceKL:
    """The KL of the policy to the reference."""

    per_sequence: float
    """Nats per completion: estimator k1, summed over a completion's tokens."""
    num_sequences: float
    """Completions of the step, over all ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResults:
    """One optimizer step of the policy, of the critic, or of both."""

    policy: NetworkStep | None = None
    """None while only the critic learns."""
    critic: NetworkStep | None = None
    """None without a critic."""
    importance: ImportanceWeights | None = None
    """None without a step of the policy."""
    reference_kl: ReferenceKL | None = None
    """None without a step of the policy, or without a reference."""
