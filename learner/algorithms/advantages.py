"""Advantages from rewards: pure functions without gradient or configuration.

The algorithms call them once per batch. Token tensors are padded [B, T] (or one trajectory, [T]) with a `loss_mask`, or
packed [M] over scored tokens. `sequence_index` [M] int64 is the trajectory of each packed token; trajectories are
contiguous and in order. Results are 0 where `loss_mask` is False.

Symbols: r_t reward, V_t value, gamma discount, lam the lambda of GAE, G the size of a group.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]
"""A function that sums a tensor over the learner's ranks and returns the sum; None in its place with one rank."""

_STD_EPSILON = 1e-6
_VARIANCE_FLOOR = 1e-8


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, loss_mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Return the generalized advantage estimate (Schulman et al. 2016, equation 16) over the tokens the policy sampled.

    delta_t = r_t + gamma V_next(t) - V_t and A_t = delta_t + gamma lam A_next(t), where next(t) is the next token with
    `loss_mask` True. Observation tokens in between are not steps of the policy; their rewards and values are ignored.
    After the last sampled token V and A are 0, also when the length limit truncated the episode.

    Args:
        rewards, values: [T] or [B, T] float.
        loss_mask: the same shape, bool.

    Returns:
        (advantages, returns) of the inputs' shape; returns = advantages + values.
    """
    advantages = torch.empty_like(values)
    next_advantage = next_value = values.new_zeros(())
    for t in range(values.shape[-1] - 1, -1, -1):
        scored, value = loss_mask[..., t], values[..., t]
        advantage = rewards[..., t] + gamma * next_value - value + gamma * lam * next_advantage
        next_advantage = torch.where(scored, advantage, next_advantage)
        next_value = torch.where(scored, value, next_value)
        advantages[..., t] = torch.where(scored, advantage, torch.zeros_like(advantage))
    return advantages, torch.where(loss_mask, advantages + values, torch.zeros_like(values))


@torch.no_grad()
def group_relative(rewards: Tensor, group_index: Tensor, *, normalize_std: bool) -> Tensor:
    """Return A_i = r_i - mean(r of its group) (GRPO); 0 in a group of one.

    With `normalize_std`, A_i is divided by the group's sample standard deviation (divisor G - 1) + 1e-6.

    Args:
        rewards: [num_sequences] float.
        group_index: [num_sequences] int64, in any order; groups must be whole.

    Returns:
        [num_sequences] in the dtype of `rewards`. Computed in float64, so that equal rewards give 0 instead of
        rounding noise divided by 1e-6.
    """
    exact = rewards.double()
    sizes, sums = _group_sums(exact, group_index)
    advantages = exact - (sums / sizes)[group_index]
    if normalize_std:
        _, squares = _group_sums(advantages.square(), group_index)
        std = (squares / (sizes - 1).clamp(min=1)).sqrt()
        advantages = advantages / (std[group_index] + _STD_EPSILON)
    return advantages.to(rewards.dtype)


@torch.no_grad()
def leave_one_out(rewards: Tensor, group_index: Tensor) -> Tensor:
    """Return A_i = r_i - mean(r of the others in its group) (RLOO); 0 in a group of one.

    Args:
        rewards: [num_sequences] float.
        group_index: [num_sequences] int64, in any order; groups must be whole.

    Returns:
        [num_sequences] in the dtype of `rewards`.
    """
    exact = rewards.double()
    sizes, sums = _group_sums(exact, group_index)
    others = (sums[group_index] - exact) / (sizes[group_index] - 1)
    return torch.where(sizes[group_index] > 1, exact - others, torch.zeros_like(exact)).to(rewards.dtype)


@torch.no_grad()
def whiten(advantages: Tensor, loss_mask: Tensor, *, reduce: Reduce | None = None) -> Tensor:
    """Return (A - mean) / sqrt(max(variance, 1e-8)).

    Mean and population variance are those of the unmasked tokens of all ranks.

    Args:
        advantages, loss_mask: both of the same shape.
        reduce: sums a [3] float64 tensor over the ranks. Waits for: every rank's call.

    Returns:
        The inputs' shape; 0 where `loss_mask` is False.
    """
    exact = torch.where(loss_mask, advantages, torch.zeros_like(advantages)).double()
    totals = torch.stack([loss_mask.sum().double(), exact.sum(), exact.square().sum()])
    if reduce is not None:
        totals = reduce(totals)
    mean = totals[1] / totals[0]
    variance = (totals[2] / totals[0] - mean.square()).clamp(min=_VARIANCE_FLOOR)
    return torch.where(loss_mask, (exact - mean) * variance.rsqrt(), torch.zeros_like(exact)).to(advantages.dtype)


def shape_rewards(rewards: Tensor, *, scale: float, shift: float, clip: float | None) -> Tensor:
    """Return clip(scale r + shift, -clip, clip); with `clip` None, scale r + shift."""
    shaped = scale * rewards + shift
    return shaped if clip is None else shaped.clamp(-clip, clip)


@torch.no_grad()
def terminal_rewards(rewards: Tensor, sequence_index: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Return each trajectory's reward [num_sequences] at its last scored token, 0 elsewhere: [M] of `dtype`."""
    ends = sequence_lengths(sequence_index, len(rewards)).cumsum(0) - 1
    token_rewards = torch.zeros(len(sequence_index), dtype=dtype, device=rewards.device)
    token_rewards[ends] = rewards.to(dtype)
    return token_rewards


def sequence_lengths(sequence_index: Tensor, num_sequences: int) -> Tensor:
    """Return the number of scored tokens of each trajectory, [num_sequences] int64.

    Raises:
        ValueError: when trajectories are not contiguous and in order, or one has no token.
    """
    if len(sequence_index) and bool((sequence_index.diff() < 0).any()):
        raise ValueError("sequence_index decreases: pack trajectories one after another, in order")
    lengths = torch.bincount(sequence_index, minlength=num_sequences)
    if len(lengths) != num_sequences or (num_sequences and int(lengths.min()) == 0):
        raise ValueError(
            f"sequence_index covers {int((lengths > 0).sum())} trajectories up to number {len(lengths) - 1}, but"
            f" {num_sequences} rewards are given; every trajectory needs one reward and at least one scored token"
        )
    return lengths


def pad_mask(sequence_index: Tensor, num_sequences: int) -> Tensor:
    """Return a mask [num_sequences, longest] bool: True where a padded tensor holds a packed token.

    `pad(packed, mask)` pads, `padded[mask]` packs again in the same order.
    """
    lengths = sequence_lengths(sequence_index, num_sequences)
    longest = int(lengths.max()) if num_sequences else 0
    return torch.arange(longest, device=lengths.device) < lengths.unsqueeze(1)


def pad(packed: Tensor, mask: Tensor) -> Tensor:
    """Pad [M] to [num_sequences, longest] with 0; `mask` is from `pad_mask`."""
    return torch.zeros(mask.shape, dtype=packed.dtype, device=packed.device).masked_scatter(mask, packed)


def _group_sums(values: Tensor, group_index: Tensor) -> tuple[Tensor, Tensor]:
    """Return (sizes, sums) of the groups, both [num_groups] float64; a group index without members has size 0."""
    num_groups = int(group_index.max()) + 1 if len(group_index) else 0
    zeros = torch.zeros(num_groups, dtype=torch.float64, device=values.device)
    return zeros.index_add(0, group_index, torch.ones_like(values)), zeros.index_add(0, group_index, values)
