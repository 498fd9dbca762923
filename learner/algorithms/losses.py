"""The terms of the loss: pure functions from tensors to one scalar, with keyword-only coefficients.

Called by the algorithms once per microbatch. Tensors are packed [N] or padded [B, T], all of one shape; whatever stands
where the mask is False, even NaN, changes neither a value nor a gradient.

Every term is a sum over tokens of `token_weights` times something. The weights are made once per optimizer step from
the counts of the whole global batch, so adding the terms of all microbatches of all ranks gives the same loss however
the batch was cut. (An engine that averages gradients over ranks or accumulation steps must undo that by a factor.)

Symbols: mu behavior, pi_prox proximal, pi trained policy, m_t mask, w_t importance weight, u_t ratio, A_t advantage.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from learner.algorithms.importance import (
    MAX_LOG_RATIO,
    ratio,
    sequence_log_ratio,
    sum_per_sequence,
    to_tokens,
)

Aggregation = Literal["token_mean", "sequence_mean", "constant"]
KLKind = Literal["k1", "k2", "k3"]


def batch_counts(loss_mask: Tensor, sequence_index: Tensor | None = None) -> Tensor:
    """[2] float64: unmasked tokens, and sequences with at least one. Summed over ranks these are the global counts."""
    per_sequence = sum_per_sequence(loss_mask.long(), sequence_index)
    return torch.stack([loss_mask.sum().double(), (per_sequence > 0).sum().double()])


def token_weights(
    loss_mask: Tensor,
    sequence_index: Tensor | None = None,
    *,
    aggregation: Aggregation,
    num_tokens: float,
    num_sequences: float,
    constant_length: int = 0,
) -> Tensor:
    """What each token counts in the loss: the `m_t / N` of the design, for one of three N.

    token_mean: m/num_tokens. sequence_mean: m/(tokens of its sequence * num_sequences), the mean over tokens, then over
    sequences. constant: m/(num_sequences * constant_length), which no response length influences.

    Args:
        loss_mask: [N] or [B, T] bool.
        sequence_index: [N] int64 for packed tokens; a sequence must be here whole. None: every row is a sequence.
        num_tokens, num_sequences: `batch_counts` of the whole global batch of this optimizer step.
        constant_length: tokens, for `constant` only.

    Returns:
        float64 of the mask's shape, 0 where it is False; the losses cast them to their own dtype.

    Raises:
        ValueError: unknown aggregation, or `constant` without a length.
    """
    mask = loss_mask.double()
    if aggregation == "token_mean":
        weights = mask / max(num_tokens, 1)
    elif aggregation == "sequence_mean":
        own = to_tokens(sum_per_sequence(loss_mask.long(), sequence_index), sequence_index)
        weights = mask / (own.clamp(min=1) * max(num_sequences, 1))
    elif aggregation == "constant":
        if constant_length < 1:
            raise ValueError(f"aggregation constant: constant_length is {constant_length}; set it to 1 token or more")
        weights = mask / (max(num_sequences, 1) * constant_length)
    else:
        raise ValueError(f"aggregation is {aggregation!r}; choose token_mean, sequence_mean or constant")
    return weights


def policy_loss(
    logprobs: Tensor,
    proximal_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    importance_weights: Tensor,
    token_weights: Tensor,
) -> Tensor:
    """The decoupled clipped policy loss.

    L = - sum_t m_t sg(w_t) min(u_t A_t, clip(u_t, 1 - clip_low, 1 + clip_high) A_t) / N, u = pi/pi_prox.

    Args:
        logprobs: log pi, the only input that gets a gradient.
        proximal_logprobs: log pi_prox; `logprobs.detach()` when a batch gets one optimizer step.
        advantages: A.
        loss_mask: m, bool.
        clip_low, clip_high: distances from 1 at which u is clipped.
        importance_weights: w of the correction.
        token_weights: m/N from the function `token_weights`.

    Returns:
        Scalar, float32 (float64 for float64 inputs); 0 when nothing is unmasked.
    """
    u = ratio(logprobs, proximal_logprobs.detach(), loss_mask)
    fixed = advantages.detach()
    objective = torch.minimum(u * fixed, u.clamp(1 - clip_low, 1 + clip_high) * fixed)
    return -weighted_sum(importance_weights.detach() * objective, loss_mask, token_weights)


def cispo_loss(
    logprobs: Tensor,
    proximal_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    importance_weights: Tensor,
    token_weights: Tensor,
) -> Tensor:
    """REINFORCE with a clipped, constant ratio (CISPO, MiniMax-M1 2025, equations 4 and 5).

    L = - sum_t m_t sg(w_t) sg(clip(u_t, 1 - clip_low, 1 + clip_high)) A_t log pi_t / N, u = pi/pi_prox: a token that
    the clip reaches keeps its gradient.

    Args:
        logprobs: log pi, the only input that gets a gradient.
        proximal_logprobs: log pi_prox.
        advantages: A.
        loss_mask: m, bool.
        clip_low, clip_high: distances from 1 at which u is clipped; `clip_low` 1 leaves it unbounded below.
        importance_weights: w of the correction.
        token_weights: m/N from the function `token_weights`.

    Returns:
        Scalar, float32 (float64 for float64 inputs); 0 when nothing is unmasked.
    """
    u = ratio(logprobs.detach(), proximal_logprobs.detach(), loss_mask).clamp(1 - clip_low, 1 + clip_high)
    # The gradient of a product with NaN is NaN even where it is not summed, so it must not get out.
    log_policy = torch.where(loss_mask, logprobs, logprobs.detach()).to(u.dtype)
    objective = u * advantages.detach() * log_policy
    return -weighted_sum(importance_weights.detach() * objective, loss_mask, token_weights)


def sequence_denominator(
    logprobs: Tensor, denominator_logprobs: Tensor, loss_mask: Tensor, sequence_index: Tensor | None = None
) -> Tensor:
    """The denominator d with which pi_t/d_t is the ratio of the whole sequence, s_i = (prod_t pi_t/pi_prox_t)^(1/|i|).

    As GSPO-token has it (GSPO, equation 14): pi_t/d_t = sg(s_i) pi_t/sg(pi_t), in value s_i and in gradient the token's
    own, so that weights may differ between the tokens of a sequence; where they do not, it is GSPO's equation 5.

    Args:
        logprobs: log pi.
        denominator_logprobs: log pi_prox of each token.
        loss_mask: bool; `sequence_index` as in `learner/algorithms/importance.py`.

    Returns:
        log d of the inputs' shape, without gradient.
    """
    fixed = logprobs.detach()
    return fixed - sequence_log_ratio(fixed, denominator_logprobs.detach(), loss_mask, sequence_index, kind="geometric")


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    loss_mask: Tensor,
    *,
    value_clip: float | None,
    token_weights: Tensor,
) -> Tensor:
    """sum_t m_t/N * 0.5 max((V - R)^2, (clip(V, V_old - value_clip, V_old + value_clip) - R)^2).

    Args:
        values: V, the only input that gets a gradient.
        old_values: V_old, the critic's when the batch began.
        returns: R.
        loss_mask: m, bool.
        value_clip: None or <= 0 leaves 0.5 (V - R)^2.
        token_weights: m/N from the function `token_weights`.

    Returns:
        Scalar, float32 (float64 for float64 inputs).
    """
    values, old_values, returns = (
        t if t.dtype == torch.float64 else t.float() for t in (values, old_values.detach(), returns.detach())
    )
    # The gradient of NaN^2 is NaN even when it is multiplied by 0, so it must not get out.
    values = torch.where(loss_mask, values, values.detach())
    errors = (values - returns).square()
    if value_clip is not None and value_clip > 0:
        clipped = values.clamp(old_values - value_clip, old_values + value_clip)
        errors = torch.maximum(errors, (clipped - returns).square())
    return weighted_sum(0.5 * errors, loss_mask, token_weights)


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: KLKind) -> Tensor:
    """Per token, from one sample of pi, an estimate of KL(pi||ref) (Schulman 2020), with d = log ref - log pi.

    k1 = -d: unbiased, any sign. k2 = d^2/2: biased, its gradient is unbiased. k3 = e^d - 1 - d: unbiased, never below
    0; d is clamped to +-MAX_LOG_RATIO there.

    Raises:
        ValueError: unknown kind.
    """
    dtype = torch.float64 if logprobs.dtype == torch.float64 else torch.float32
    difference = ref_logprobs.detach().to(dtype) - logprobs.to(dtype)
    if kind == "k1":
        return -difference
    if kind == "k2":
        return 0.5 * difference.square()
    if kind == "k3":
        # expm1 keeps the d^2/2 that is left when d is small; e^d - 1 would lose it in float32.
        clamped = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        return torch.expm1(clamped) - clamped
    raise ValueError(f"KL estimator is {kind!r}; choose k1, k2 or k3")


def weighted_sum(per_token: Tensor, loss_mask: Tensor, token_weights: Tensor) -> Tensor:
    """sum_t m_t weight_t x_t."""
    # `where` and not a product: NaN * 0 is NaN.
    return (torch.where(loss_mask, per_token, 0.0) * token_weights.to(per_token.dtype)).sum()
