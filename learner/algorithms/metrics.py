"""The metrics of an optimizer step, collected as sums over microbatches and ranks.

The algorithms make one `MetricSums` per microbatch; its tensors stay on the device. The training loop adds them up.
Once per optimizer step the loop reduces the total over the ranks, sums and maxima separately, and copies it to the
host. `summarize` then computes the named metrics. The metrics of off-policy distance use the untruncated ratio
pi_prox/mu, whatever the correction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from learner.algorithms.advantages import Reduce
from learner.algorithms.importance import log_ratio
from learner.monitoring.step_results import ImportanceWeights, ReferenceKL


@dataclass(frozen=True, slots=True)
class MetricSums:
    """Detached scalars by name: `+` adds `sums` and keeps the larger of `maxima`."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    maxima: dict[str, Tensor] = field(default_factory=dict)

    def __add__(self, other: MetricSums) -> MetricSums:
        """Combine both; a name on only one side keeps its value."""
        sums, maxima = dict(self.sums), dict(self.maxima)
        for name, value in other.sums.items():
            sums[name] = sums[name] + value if name in sums else value
        for name, value in other.maxima.items():
            maxima[name] = torch.maximum(maxima[name], value) if name in maxima else value
        return MetricSums(sums, maxima)

    def totals(self, *, reduce_sum: Reduce | None = None, reduce_max: Reduce | None = None) -> dict[str, float]:
        """Return the totals over all ranks, as floats by name.

        Args:
            reduce_sum, reduce_max: reduce a 1-D float64 tensor over the ranks; None with one rank. Wait for: the call
                of every rank, each with the same names.
        """
        totals: dict[str, float] = {}
        for values, reduce in ((self.sums, reduce_sum), (self.maxima, reduce_max)):
            if values:
                names = sorted(values)
                stacked = torch.stack([values[name].double() for name in names])
                totals |= zip(names, (reduce(stacked) if reduce else stacked).tolist(), strict=True)
        return totals


@torch.no_grad()
def policy_metrics(
    *,
    logprobs: Tensor,
    proximal_logprobs: Tensor,
    behavior_logprobs: Tensor,
    ratio_logprobs: Tensor,
    advantages: Tensor,
    entropy: Tensor,
    importance_weights: Tensor,
    capped: Tensor,
    loss_mask: Tensor,
    clip_low: float,
    clip_high: float,
) -> MetricSums:
    """Sum the metrics over the unmasked tokens of one microbatch of the policy.

    Args:
        logprobs, proximal_logprobs, behavior_logprobs: log pi, log pi_prox, log mu.
        ratio_logprobs: log of the denominator of the clipped ratio u, from `Algorithm.denominator`.
        importance_weights: w in the loss.
        capped: bool; whether the ratio behind w is above `Correction.cap`.
    """
    behavior_to_policy = log_ratio(logprobs, behavior_logprobs, loss_mask).double()
    weights = log_ratio(proximal_logprobs, behavior_logprobs, loss_mask).double().exp()
    u = log_ratio(logprobs, ratio_logprobs, loss_mask).double().exp()
    advantages = advantages.double()

    def total(per_token: Tensor) -> Tensor:
        return torch.where(loss_mask, per_token, 0).sum(dtype=torch.float64)

    return MetricSums(
        {
            "num_tokens": total(torch.ones_like(u)),
            "entropy": total(entropy),
            "advantages": total(advantages),
            "squared_advantages": total(advantages.square()),
            "ratios": total(u),
            "clipped_low": total((u < 1 - clip_low) & (advantages < 0)),
            "clipped_high": total((u > 1 + clip_high) & (advantages > 0)),
            "behavior_kl_k1": total(-behavior_to_policy),
            "behavior_kl_k3": total(torch.expm1(behavior_to_policy) - behavior_to_policy),
            "weights": total(weights),
            "squared_weights": total(weights.square()),
            "capped": total(capped),
            "masked": total(importance_weights == 0),
        },
        {"max_weight": _largest(weights, loss_mask), "max_ratio": _largest(u, loss_mask)},
    )


@torch.no_grad()
def value_metrics(
    *, values: Tensor, old_values: Tensor, returns: Tensor, loss_mask: Tensor, value_clip: float | None
) -> MetricSums:
    """Sum the metrics over the unmasked tokens of one microbatch of the critic."""
    values, old_values, returns = values.double(), old_values.double(), returns.double()
    moved = (values - old_values).abs()
    clipped = moved > value_clip if value_clip is not None and value_clip > 0 else torch.zeros_like(loss_mask)

    def total(per_token: Tensor) -> Tensor:
        return torch.where(loss_mask, per_token, 0).sum(dtype=torch.float64)

    return MetricSums(
        {
            "num_value_tokens": total(torch.ones_like(values)),
            "values": total(values),
            "returns": total(returns),
            "squared_returns": total(returns.square()),
            "value_errors": total(returns - values),
            "squared_value_errors": total((returns - values).square()),
            "clipped_values": total(clipped),
        }
    )


def summarize(totals: Mapping[str, float]) -> dict[str, float]:
    """Compute the named metrics of one optimizer step from `MetricSums.totals`.

    Policy metrics and value metrics are left out when no tokens were counted for them.
    `importance/effective_sample_size` is (sum rho)^2 / (M sum rho^2), in (0, 1]. If all returns are equal,
    `value/explained_variance` is 0.
    """
    metrics = _summarize_policy(totals) if totals.get("num_tokens", 0) > 0 else {}
    return metrics | (_summarize_values(totals) if totals.get("num_value_tokens", 0) > 0 else {})


def importance_weights(totals: Mapping[str, float]) -> ImportanceWeights | None:
    """Return statistics of pi_prox/mu from `MetricSums.totals`; None without a step of the policy."""
    count = totals.get("num_tokens", 0)
    if not count:
        return None
    mean = totals["weights"] / count
    return ImportanceWeights(
        effective_sample_size=totals["weights"] ** 2 / (count * totals["squared_weights"]),
        mean=mean,
        std=_std(totals["squared_weights"] / count, mean),
    )


def reference_kl(totals: Mapping[str, float]) -> ReferenceKL | None:
    """Return the KL to the reference from `MetricSums.totals`.

    None without a step of the policy, or without a reference.
    """
    if not totals.get("num_tokens", 0) or "reference_kl_k1" not in totals:
        return None
    num_sequences = totals["num_sequences"]
    return ReferenceKL(per_sequence=totals["reference_kl_k1"] / num_sequences, num_sequences=num_sequences)


def _summarize_policy(totals: Mapping[str, float]) -> dict[str, float]:
    count = totals["num_tokens"]
    advantage_mean, weights, kl = totals["advantages"] / count, importance_weights(totals), reference_kl(totals)
    assert weights is not None
    metrics = {
        "policy/num_tokens": count,
        "policy/entropy": totals["entropy"] / count,
        "policy/advantage_mean": advantage_mean,
        "policy/advantage_std": _std(totals["squared_advantages"] / count, advantage_mean),
        "policy/ratio_mean": totals["ratios"] / count,
        "policy/ratio_max": totals["max_ratio"],
        "policy/fraction_clipped_low": totals["clipped_low"] / count,
        "policy/fraction_clipped_high": totals["clipped_high"] / count,
        "importance/behavior_kl_k1": totals["behavior_kl_k1"] / count,
        "importance/behavior_kl_k3": totals["behavior_kl_k3"] / count,
        "importance/effective_sample_size": weights.effective_sample_size,
        "importance/weight_mean": weights.mean,
        "importance/weight_std": weights.std,
        "importance/weight_max": totals["max_weight"],
        "importance/fraction_capped": totals["capped"] / count,
        "importance/fraction_masked": totals["masked"] / count,
    }
    # The terms already include the token weights n, so their sums over microbatches and ranks need no division.
    metrics |= {f"policy/{name}": totals[name] for name in ("policy_loss", "total_loss") if name in totals}
    if "kl_penalty" in totals:
        metrics["policy/kl_penalty"] = totals["kl_penalty"]
    if kl is not None:
        metrics["policy/reference_kl_k1"] = totals["reference_kl_k1"] / count
        metrics["policy/reference_kl_k3"] = totals["reference_kl_k3"] / count
        metrics["policy/reference_kl_per_sequence"] = kl.per_sequence
        metrics["policy/num_sequences"] = kl.num_sequences
    return metrics


def _summarize_values(totals: Mapping[str, float]) -> dict[str, float]:
    count = totals["num_value_tokens"]
    return_mean, error_mean = totals["returns"] / count, totals["value_errors"] / count
    return_std = _std(totals["squared_returns"] / count, return_mean)
    error_std = _std(totals["squared_value_errors"] / count, error_mean)
    return {
        "value/value_loss": totals["value_loss"],
        "value/value_mean": totals["values"] / count,
        "value/return_mean": return_mean,
        "value/return_std": return_std,
        "value/error_rms": math.sqrt(totals["squared_value_errors"] / count),
        "value/explained_variance": 1 - (error_std / return_std) ** 2 if return_std > 0 else 0.0,
        "value/fraction_clipped": totals["clipped_values"] / count,
    }


def _std(mean_square: float, mean: float) -> float:
    """Return the population standard deviation; 0 where the variance is only rounding error."""
    variance = mean_square - mean * mean
    return math.sqrt(variance) if variance > 1e-14 * mean_square else 0.0


def _largest(per_token: Tensor, loss_mask: Tensor) -> Tensor:
    """Return the largest unmasked value; -inf when all are masked."""
    lowest = torch.full((1,), -math.inf, dtype=per_token.dtype, device=per_token.device)
    return torch.cat([torch.where(loss_mask, per_token, -math.inf).flatten(), lowest]).amax()
