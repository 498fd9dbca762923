"""The learning rate as a pure function of the step: linear warm-up, then constant, linear decay or cosine decay."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["constant", "linear", "cosine"]


def learning_rate(
    step: int, *, base: float, warmup_steps: int, total_steps: int, schedule: Schedule, min_lr_ratio: float = 0.0
) -> float:
    """Return the rate for the optimizer step that makes version `step` + 1.

    Args:
        step: optimizer steps done so far, from 0; from `total_steps` on the rate stays at its final value.
        base: the rate after warm-up.
        warmup_steps: steps of the linear rise; the rate of the first step is base / warmup_steps, not 0.
        total_steps: steps of the whole run, warm-up included.
        schedule: constant, linear or cosine, from the end of the warm-up on.
        min_lr_ratio: final rate of linear and cosine, as a fraction of `base`.

    Raises:
        ValueError: unknown schedule, `min_lr_ratio` outside [0, 1], or a warm-up longer than the run.
    """
    if schedule not in ("constant", "linear", "cosine"):
        raise ValueError(f"schedule is {schedule!r}; choose constant, linear or cosine")
    if not 0 <= min_lr_ratio <= 1:
        raise ValueError(f"min_lr_ratio={min_lr_ratio} is a fraction of the learning rate and must lie in [0, 1]")
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(
            f"warmup_steps={warmup_steps} must lie between 0 and total_steps={total_steps}; shorten the warm-up"
        )
    if step < warmup_steps:
        return base * (step + 1) / warmup_steps
    if schedule == "constant":
        return base
    progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
    remaining = 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return base * (min_lr_ratio + (1 - min_lr_ratio) * remaining)
