"""Ratios of two policies, per token and per sequence, and the V-trace targets made from them.

Pure functions, called by the corrections, the losses and the metrics. Every log-ratio between policies is computed
here, clamped to +-MAX_LOG_RATIO, in float32 (float64 stays float64). Token tensors are packed [M] or padded [B, T].
`sequence_index` [M] int64 is the sequence of each packed token; None: every row is a sequence. Values where `loss_mask`
is False, even NaN, have no effect on any result.

Symbols: mu the behavior policy, pi_prox the proximal policy, pi the policy being trained.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Largest |log-ratio|. e^20 squared still fits float32, so neither a loss nor a sum of squares overflows."""

SequenceRatio = Literal["product", "geometric"]
"""How the ratios of a sequence's tokens become one: their product, or their geometric mean."""


def log_ratio(numerator: Tensor, denominator: Tensor, loss_mask: Tensor) -> Tensor:
    """Return log(numerator/denominator) of two log-probability tensors, clamped; 0 where `loss_mask` is False."""
    promoted = torch.promote_types(numerator.dtype, denominator.dtype)
    dtype = torch.float64 if promoted == torch.float64 else torch.float32
    difference = (numerator.to(dtype) - denominator.to(dtype)).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.where(loss_mask, difference, torch.zeros_like(difference))


def ratio(numerator: Tensor, denominator: Tensor, loss_mask: Tensor) -> Tensor:
    """Return numerator/denominator of two log-probability tensors; 1 where `loss_mask` is False."""
    return log_ratio(numerator, denominator, loss_mask).exp()


def sequence_log_ratio(
    numerator: Tensor,
    denominator: Tensor,
    loss_mask: Tensor,
    sequence_index: Tensor | None = None,
    *,
    kind: SequenceRatio,
) -> Tensor:
    """Return the log-ratio of a whole sequence, repeated at each of its tokens; clamped; 0 where `loss_mask` is False.

    product: the sum of log(numerator_t/denominator_t) over the unmasked tokens. geometric: their mean (GSPO,
    equation 7). Sequences must be whole.

    Raises:
        ValueError: unknown kind.
    """
    if kind not in ("product", "geometric"):
        raise ValueError(f"the ratio of a sequence is {kind!r}; choose product or geometric")
    totals = sum_per_sequence(log_ratio(numerator, denominator, loss_mask), sequence_index)
    if kind == "geometric":
        # A sequence without unmasked tokens becomes NaN here; the `where` below removes it.
        totals = totals / sum_per_sequence(loss_mask.to(totals.dtype), sequence_index)
    spread = to_tokens(totals.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO), sequence_index)
    return torch.where(loss_mask, spread, torch.zeros_like(spread))


def truncated_weights(
    proximal_logprobs: Tensor, behavior_logprobs: Tensor, loss_mask: Tensor, *, max_importance_weight: float
) -> Tensor:
    """Return truncated importance weights w = min(pi_prox/mu, C), without gradient; 0 where `loss_mask` is False."""
    weights = ratio(proximal_logprobs.detach(), behavior_logprobs.detach(), loss_mask)
    return weights.clamp(max=max_importance_weight) * loss_mask


@torch.no_grad()
def vtrace(
    proximal_logprobs: Tensor,
    behavior_logprobs: Tensor,
    rewards: Tensor,
    values: Tensor,
    loss_mask: Tensor,
    *,
    gamma: float,
    lam: float = 1.0,
    rho_bar: float = 1.0,
    c_bar: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Compute V-trace (IMPALA, equation 1 in the recursive form of remark 1) over the tokens the policy sampled.

    delta_t = rho_t (r_t + gamma V_next(t) - V_t), rho_t = min(pi_prox/mu, rho_bar), c_t = lam min(pi_prox/mu, c_bar),
    v_t = V_t + delta_t + gamma c_t (v_next(t) - V_next(t)), A_t = r_t + gamma v_next(t) - V_t, where next(t) is the
    next token with `loss_mask` True. After the last such token V and v are 0.

    Args:
        proximal_logprobs, behavior_logprobs, rewards, values: [T] or [B, T].
        loss_mask: the same shape, bool.
        gamma: discount.
        lam: 1 in the paper's equations; below 1 as in its remark 2.
        rho_bar: cap of rho_t. It decides whose values are learned: those of pi_prox when infinite, those of mu near 0.
        c_bar: cap of the trace coefficients c_t, which carry later deltas back to earlier tokens; at most `rho_bar`.

    Returns:
        (targets v, advantages A) of the inputs' shape, 0 where `loss_mask` is False. A does not include the factor
        rho_t of the paper's policy gradient, which is the importance weight of the loss.
    """
    ratios = ratio(proximal_logprobs, behavior_logprobs, loss_mask).to(values.dtype)
    rho, c = ratios.clamp(max=rho_bar), lam * ratios.clamp(max=c_bar)
    targets, advantages = torch.empty_like(values), torch.empty_like(values)
    next_value = next_target = values.new_zeros(())
    for t in range(values.shape[-1] - 1, -1, -1):
        scored, value = loss_mask[..., t], values[..., t]
        delta = rho[..., t] * (rewards[..., t] + gamma * next_value - value)
        target = value + delta + gamma * c[..., t] * (next_target - next_value)
        advantages[..., t] = torch.where(scored, rewards[..., t] + gamma * next_target - value, 0.0)
        targets[..., t] = torch.where(scored, target, 0.0)
        next_target = torch.where(scored, target, next_target)
        next_value = torch.where(scored, value, next_value)
    return targets, advantages


def sum_per_sequence(per_token: Tensor, sequence_index: Tensor | None) -> Tensor:
    """Return the sum over the tokens of each sequence, [num_sequences]."""
    if sequence_index is None:
        return per_token.sum(-1)
    num_sequences = int(sequence_index.max()) + 1 if len(sequence_index) else 0
    zeros = torch.zeros(num_sequences, dtype=per_token.dtype, device=per_token.device)
    return zeros.index_add(0, sequence_index, per_token)


def to_tokens(per_sequence: Tensor, sequence_index: Tensor | None) -> Tensor:
    """Repeat the value of each sequence at its tokens: [M], or [B, 1] for rows, which broadcasts."""
    return per_sequence.unsqueeze(-1) if sequence_index is None else per_sequence[sequence_index]
