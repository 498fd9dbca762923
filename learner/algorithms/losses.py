"""The terms of the loss: pure functions from tensors to one scalar, with keyword-only coefficients.

The algorithms call them once per microbatch. Tensors are packed [M] or padded [B, T], all of the same shape. Values
where the mask is False, even NaN, change neither a result nor a gradient.

Every term is a weighted sum over tokens. The weights are computed once per optimizer step, from counts over all ranks.
The terms of all microbatches of all ranks therefore add up to the same loss, however the batch is cut into
microbatches. (An engine that averages gradients over ranks or accumulation steps must multiply the loss by
their number.)

Symbols: mu behavior, pi_prox proximal, pi trained policy, m_t mask, n_t token weight, w_t importance weight, u_t ratio,
A_t advantage.
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
    """Return the numbers of unmasked tokens and of sequences with at least one, [2] float64.

    Their sums over ranks are the global counts.
    """
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
    """Return the weight n_t = m_t / d of each token in the loss. The aggregation defines the divisor d.

    token_mean: d = num_tokens. sequence_mean: d = (tokens of the sequence) * num_sequences, a mean over tokens, then
    over sequences. constant: d = num_sequences * constant_length, which does not depend on the completions' lengths.

    Args:
        loss_mask: [M] or [B, T] bool.
        sequence_index: [M] int64 for packed tokens of whole sequences; None: every row is a sequence.
        num_tokens, num_sequences: `batch_counts` of this optimizer step, summed over ranks.
        constant_length: tokens; only for `constant`.

    Returns:
        float64 of the mask's shape, 0 where the mask is False; the losses cast them to their own dtype.

    Raises:
        ValueError: unknown aggregation, or `constant` without a length.
    """
    mask = loss_mask.double()
    if aggregation == "token_mean":
        weights = mask / max(num_tokens, 1)
    elif aggregation == "sequence_mean":
        lengths = to_tokens(sum_per_sequence(loss_mask.long(), sequence_index), sequence_index)
        weights = mask / (lengths.clamp(min=1) * max(num_sequences, 1))
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
    """Compute the decoupled clipped policy loss.

    L = - sum_t n_t sg(w_t) min(u_t A_t, clip(u_t, 1 - clip_low, 1 + clip_high) A_t), u = pi/pi_prox.

    Args:
        logprobs: log pi, the only input that gets a gradient.
        proximal_logprobs: log pi_prox, or another denominator of u (`Algorithm.denominator`).
        advantages: A.
        loss_mask: m, bool.
        clip_low, clip_high: distances from 1 at which u is clipped.
        importance_weights: w of the correction.
        token_weights: n from the function `token_weights`.

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
    """Compute REINFORCE with a clipped, constant ratio (CISPO, MiniMax-M1 2025, equations 4 and 5).

    L = - sum_t n_t sg(w_t) sg(clip(u_t, 1 - clip_low, 1 + clip_high)) A_t log pi_t, u = pi/pi_prox: a clipped token
    keeps its gradient.

    Args:
        logprobs: log pi, the only input that gets a gradient.
        proximal_logprobs: log pi_prox.
        advantages: A.
        loss_mask: m, bool.
        clip_low, clip_high: distances from 1 at which u is clipped; with `clip_low` 1 it has no lower bound.
        importance_weights: w of the correction.
        token_weights: n from the function `token_weights`.

    Returns:
        Scalar, float32 (float64 for float64 inputs); 0 when nothing is unmasked.
    """
    u = ratio(logprobs.detach(), proximal_logprobs.detach(), loss_mask).clamp(1 - clip_low, 1 + clip_high)
    # A product with NaN has a NaN gradient even where it is not summed, so masked logprobs are detached.
    log_policy = torch.where(loss_mask, logprobs, logprobs.detach()).to(u.dtype)
    objective = u * advantages.detach() * log_policy
    return -weighted_sum(importance_weights.detach() * objective, loss_mask, token_weights)


def sequence_denominator(
    logprobs: Tensor, denominator_logprobs: Tensor, loss_mask: Tensor, sequence_index: Tensor | None = None
) -> Tensor:
    """Return the denominator d that makes pi_t/d_t the sequence's ratio s_i = (prod_t pi_t/pi_prox_t)^(1/|i|).

    This is GSPO-token (GSPO, equation 14): pi_t/d_t = sg(s_i) pi_t/sg(pi_t) has the value s_i and the gradient of token
    t, so weights may differ between the tokens of a sequence. With equal weights it is GSPO's equation 5.

    Args:
        logprobs: log pi.
        denominator_logprobs: log pi_prox of each token.
        loss_mask: bool.
        sequence_index: as in `learner/algorithms/importance.py`.

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
    """Compute sum_t n_t * 0.5 max((V - R)^2, (clip(V, V_old - value_clip, V_old + value_clip) - R)^2).

    Args:
        values: V, the only input that gets a gradient.
        old_values: V_old, from before the first optimizer step of the batch.
        returns: R.
        loss_mask: m, bool.
        value_clip: None or <= 0: no clip, the loss is 0.5 (V - R)^2.
        token_weights: n from the function `token_weights`.

    Returns:
        Scalar, float32 (float64 for float64 inputs).
    """
    values, old_values, returns = (
        t if t.dtype == torch.float64 else t.float() for t in (values, old_values.detach(), returns.detach())
    )
    # NaN^2 has a NaN gradient even when it is multiplied by 0, so masked values are detached.
    values = torch.where(loss_mask, values, values.detach())
    errors = (values - returns).square()
    if value_clip is not None and value_clip > 0:
        clipped = values.clamp(old_values - value_clip, old_values + value_clip)
        errors = torch.maximum(errors, (clipped - returns).square())
    return weighted_sum(0.5 * errors, loss_mask, token_weights)


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: KLKind) -> Tensor:
    """Estimate KL(pi||ref) at each token, from the one token sampled from pi (Schulman 2020).

    With d = log ref - log pi: k1 = -d is unbiased and of any sign. k2 = d^2/2 is biased, but its gradient is unbiased.
    k3 = e^d - 1 - d is unbiased and never below 0; for k3 d is clamped to +-MAX_LOG_RATIO.

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
        # For small d the result is about d^2/2, which e^d - 1 would lose in float32; expm1 keeps it.
        clamped = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        return torch.expm1(clamped) - clamped
    raise ValueError(f"KL estimator is {kind!r}; choose k1, k2 or k3")


def weighted_sum(per_token: Tensor, loss_mask: Tensor, token_weights: Tensor) -> Tensor:
    """Return sum_t m_t weight_t x_t."""
    # `where` instead of a product: NaN * 0 is NaN.
    return (torch.where(loss_mask, per_token, 0.0) * token_weights.to(per_token.dtype)).sum()
