"""The KL to a reference policy: where it is punished, by which estimator, and how strongly at which version.

The settings are a part of every algorithm. The one number that changes while training, the adaptive coefficient, is
kept by the training loop, saved in every checkpoint, and handed in and out of pure methods here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from learner.algorithms.losses import KLKind

KLPlace = Literal["off", "reward", "loss"]
KLSchedule = Literal["fixed", "linear", "adaptive"]

MAX_RELATIVE_ERROR = 0.2
"""Of one adaptive update (Ziegler et al. 2019, section 2.2)."""


@dataclass(frozen=True, kw_only=True)
class KLSettings:
    """KL to the reference.

    Raises:
        ValueError: when fields contradict each other.
    """

    kl: KLPlace = "off"
    """Where it is punished: off, in the reward (k1, per token) or in the loss."""
    kl_kind: KLKind | None = None
    """The estimator in the loss: k1, k2 or k3; None: k3 there, and k1 in the reward, which takes no other."""
    kl_coef: float = 0.0
    """The coefficient, or where its schedule starts."""
    kl_schedule: KLSchedule = "fixed"
    """fixed | linear (to `kl_final_coef`) | adaptive (towards `kl_target`)."""
    kl_final_coef: float = 0.0
    """linear: the coefficient after `kl_schedule_steps`."""
    kl_schedule_steps: int = 0
    """linear: versions from the first coefficient to the last."""
    kl_target: float = 6.0
    """adaptive: nats per completion, the sum over its tokens."""
    kl_horizon: float = 10_000.0
    """adaptive: completions over which an error of 20 % or more changes the coefficient by about 20 %."""
    reference_refresh_every: int = 0
    """Versions after which the trained policy becomes the reference; 0: the policy the run started from stays it."""

    def __post_init__(self) -> None:
        self._check_words()
        if self.kl == "reward" and self.kl_kind in ("k2", "k3"):
            raise ValueError(
                f"algorithm: kl=reward takes the estimator k1; leave kl_kind={self.kl_kind} out or kl=loss"
            )
        reached = max(self.kl_coef, self.kl_final_coef if self.kl_schedule == "linear" else 0.0)
        if min(self.kl_coef, self.kl_final_coef) < 0 or (self.kl != "off" and reached == 0):
            raise ValueError(
                f"algorithm: kl={self.kl} with kl_coef={self.kl_coef} punishes nothing; set kl_coef above 0 or kl='off'"
            )
        if self.kl_schedule == "linear" and self.kl_schedule_steps < 1:
            raise ValueError(
                f"algorithm: kl_schedule=linear with kl_schedule_steps={self.kl_schedule_steps} never gets to"
                f" kl_final_coef={self.kl_final_coef}; set the versions it takes, 1 or more"
            )
        if self.kl_schedule == "adaptive" and not (self.kl_coef > 0 and self.kl_target > 0 and self.kl_horizon > 0):
            raise ValueError(
                f"algorithm: kl_schedule=adaptive needs kl_coef={self.kl_coef}, kl_target={self.kl_target} and"
                f" kl_horizon={self.kl_horizon} above 0: a coefficient of 0 stays 0"
            )
        if self.reference_refresh_every < 0 or (self.reference_refresh_every and self.kl == "off"):
            raise ValueError(
                f"algorithm: reference_refresh_every={self.reference_refresh_every} with kl={self.kl} refreshes"
                " nothing; set kl to reward or loss, or leave it 0"
            )

    def _check_words(self) -> None:
        if self.kl not in get_args(KLPlace):
            raise ValueError(
                f"algorithm: kl is {self.kl!r}; choose 'off', 'reward' or 'loss' (in YAML with quotes: off without them"
                " means false)"
            )
        if self.kl_kind is not None and self.kl_kind not in get_args(KLKind):
            raise ValueError(f"algorithm: kl_kind is {self.kl_kind!r}; choose k1, k2 or k3")
        if self.kl_schedule not in get_args(KLSchedule):
            raise ValueError(f"algorithm: kl_schedule is {self.kl_schedule!r}; choose fixed, linear or adaptive")

    @property
    def needs_reference(self) -> bool:
        """Whether `ref_logprobs` must be given."""
        return self.kl != "off"

    def kl_coef_at(self, policy_version: int, adapted: float) -> float:
        """The coefficient of the step that starts at `policy_version`; `adapted` is what `adapt_kl_coef` returned."""
        if self.kl_schedule == "adaptive":
            return adapted
        if self.kl_schedule == "fixed":
            return self.kl_coef
        progress = min(policy_version / self.kl_schedule_steps, 1.0)
        return self.kl_coef + (self.kl_final_coef - self.kl_coef) * progress

    def adapt_kl_coef(self, coefficient: float, kl_per_sequence: float, num_sequences: float) -> float:
        """The coefficient after a step that showed a KL of `kl_per_sequence` nats over `num_sequences`.

        beta <- beta (1 + e num_sequences/horizon), e = clip(KL/target - 1, -0.2, 0.2) (Ziegler et al. 2019, section
        2.2, whose K is num_sequences/horizon). A KL that is not finite, of a skipped step, changes nothing.
        """
        if self.kl_schedule != "adaptive" or not math.isfinite(kl_per_sequence):
            return coefficient
        error = min(max(kl_per_sequence / self.kl_target - 1, -MAX_RELATIVE_ERROR), MAX_RELATIVE_ERROR)
        return coefficient * (1 + error * num_sequences / self.kl_horizon)
