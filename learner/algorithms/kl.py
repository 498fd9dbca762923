"""The coefficient of the KL to a reference policy over a run: fixed, linear or adaptive.

The training loop keeps the adaptive coefficient, saves it in every checkpoint, and passes it to the pure methods here.
The estimators of the KL are in `learner/algorithms/losses.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

ScheduleKind = Literal["fixed", "linear", "adaptive"]

MAX_RELATIVE_ERROR = 0.2
"""Bound on the error in one adaptive update (Ziegler et al. 2019, section 2.2)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KLSchedule:
    """The KL coefficient of each optimizer step. `Algorithm` describes the fields under their configuration keys.

    Raises:
        ValueError: when fields contradict each other.
    """

    kind: ScheduleKind
    coef: float
    final_coef: float
    num_steps: int
    target: float
    horizon: float

    def __post_init__(self) -> None:
        if self.kind not in get_args(ScheduleKind):
            raise ValueError(f"algorithm: kl_schedule is {self.kind!r}; choose fixed, linear or adaptive")
        if self.kind == "linear" and self.num_steps < 1:
            raise ValueError(
                f"algorithm: kl_schedule=linear with kl_schedule_steps={self.num_steps} never gets to"
                f" kl_final_coef={self.final_coef}; set the versions it takes, 1 or more"
            )
        if self.kind == "adaptive" and not (self.coef > 0 and self.target > 0 and self.horizon > 0):
            raise ValueError(
                f"algorithm: kl_schedule=adaptive needs kl_coef={self.coef}, kl_target={self.target} and"
                f" kl_horizon={self.horizon} above 0: a coefficient of 0 stays 0"
            )

    @property
    def is_ever_positive(self) -> bool:
        """Whether the coefficient is above 0 at some version."""
        return self.coef > 0 or (self.kind == "linear" and self.final_coef > 0)

    def at(self, policy_version: int, adapted: float) -> float:
        """Return the coefficient of the step that starts at `policy_version`.

        `adapted` is the last result of `adapt`.
        """
        if self.kind == "adaptive":
            return adapted
        if self.kind == "fixed":
            return self.coef
        progress = min(policy_version / self.num_steps, 1.0)
        return self.coef + (self.final_coef - self.coef) * progress

    def adapt(self, coefficient: float, kl_per_sequence: float, num_sequences: float) -> float:
        """Return the adaptive coefficient after a step with a KL of `kl_per_sequence` nats over `num_sequences`.

        beta <- beta (1 + e num_sequences/horizon), e = clip(KL/target - 1, -0.2, 0.2) (Ziegler et al. 2019, section
        2.2, whose K is num_sequences/horizon). A KL that is not finite changes nothing: its step was skipped.
        """
        if self.kind != "adaptive" or not math.isfinite(kl_per_sequence):
            return coefficient
        error = min(max(kl_per_sequence / self.target - 1, -MAX_RELATIVE_ERROR), MAX_RELATIVE_ERROR)
        return coefficient * (1 + error * num_sequences / self.horizon)
