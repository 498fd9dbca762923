"""Reference implementations of the papers' equations: token by token, in float64, without code of the learner.

A batch is a list of sequences, and a sequence a list of 0-dimensional float64 tensors. So autograd differentiates these
loops, and tests compare gradients as well as values. The code is meant to be read beside the paper; it is slow.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

Scalars = list[Tensor]
Ragged = list[list[Tensor]]
Mask = list[list[bool]]


@dataclass(frozen=True)
class RaggedBatch:
    """Random sequences of different lengths. The ratios spread so far that clips, caps and masks all take effect."""

    lengths: tuple[int, ...]
    rows: dict[str, list[list[float]]]
    """Values by name: one list per sequence, one number per token."""
    mask: Mask
    """True for tokens that count."""

    @classmethod
    def random(cls, lengths: list[int], masked: float, seed: int) -> RaggedBatch:
        """Makes a random batch. `masked` is the probability that a token does not count; the very first always does."""
        rng = np.random.default_rng(seed)

        def noise(spread: float) -> list[np.ndarray]:
            return [rng.normal(0, spread, length) for length in lengths]

        logprobs = [-rng.exponential(1.0, length) for length in lengths]
        proximal = [a + b for a, b in zip(logprobs, noise(0.3), strict=True)]
        behavior = [a + b for a, b in zip(proximal, noise(1.0), strict=True)]
        old_values = noise(1.0)
        arrays = {
            "logprobs": logprobs,
            "proximal": proximal,
            "behavior": behavior,
            "ref": [a + b for a, b in zip(logprobs, noise(0.5), strict=True)],
            "entropy": [np.abs(x) for x in noise(1.0)],
            "advantages": noise(1.0),
            "rewards": noise(1.0),
            "returns": noise(1.0),
            "old_values": old_values,
            "values": [a + b for a, b in zip(old_values, noise(0.4), strict=True)],
        }
        mask = [(rng.random(length) >= masked).tolist() for length in lengths]
        mask[0][0] = True
        return cls(tuple(lengths), {name: [x.tolist() for x in value] for name, value in arrays.items()}, mask)

    def scalars(self, name: str) -> Ragged:
        """The rows of `name` as 0-dimensional float64 tensors."""
        return [[torch.tensor(x, dtype=torch.float64) for x in row] for row in self.rows[name]]

    def packed(self, name: str) -> Tensor:
        """[N] float64: the rows of `name`, one after another."""
        return torch.tensor([x for row in self.rows[name] for x in row], dtype=torch.float64)

    @property
    def packed_mask(self) -> Tensor:
        """[N] bool: the mask, one row after another."""
        return torch.tensor([m for row in self.mask for m in row])

    @property
    def sequence_index(self) -> Tensor:
        """[N] int64: the sequence of each token."""
        return torch.repeat_interleave(torch.tensor(self.lengths))

    def padded(self, name: str, fill: float = math.nan) -> Tensor:
        """[B, T] float64: the rows of `name`, padded with `fill` behind every sequence."""
        out = torch.full((len(self.lengths), max(self.lengths)), fill, dtype=torch.float64)
        for i, row in enumerate(self.rows[name]):
            out[i, : len(row)] = torch.tensor(row, dtype=torch.float64)
        return out

    @property
    def padded_mask(self) -> Tensor:
        """[B, T] bool: the mask, padded with False."""
        out = torch.zeros((len(self.lengths), max(self.lengths)), dtype=torch.bool)
        for i, row in enumerate(self.mask):
            out[i, : len(row)] = torch.tensor(row)
        return out

    def select(self, name: str) -> list[float]:
        """The values of `name` at the tokens that count, in one list."""
        pairs = zip(self.rows[name], self.mask, strict=True)
        return [x for row, mask in pairs for x, m in zip(row, mask, strict=True) if m]


def ragged_batches() -> st.SearchStrategy[RaggedBatch]:
    """Batches of one to five sequences of one to nine tokens, of which none, some or most are masked."""
    lengths = st.lists(st.integers(1, 9), min_size=1, max_size=5)
    return st.builds(RaggedBatch.random, lengths, st.sampled_from([0.0, 0.3, 0.8]), st.integers(0, 2**32 - 1))


def token_counts(mask: Mask) -> tuple[int, int]:
    """Returns (number of unmasked tokens, number of sequences with at least one)."""
    per_sequence = [sum(1 for m in row if m) for row in mask]
    return sum(per_sequence), sum(1 for count in per_sequence if count > 0)


def aggregate(terms: Ragged, mask: Mask, aggregation: str, constant_length: int = 1) -> Tensor:
    """Sums the unmasked terms with the weights of an aggregation.

    token_mean: the mean over all tokens (DAPO, equation 8). sequence_mean: the mean over the tokens of each sequence,
    then over sequences (GRPO, equation 3). Otherwise: the sum over tokens divided by a constant length, then the mean
    over sequences (Dr. GRPO).
    """
    num_tokens, num_sequences = token_counts(mask)
    total = torch.zeros((), dtype=torch.float64)
    for row, row_mask in zip(terms, mask, strict=True):
        kept = [term for term, m in zip(row, row_mask, strict=True) if m]
        for term in kept:
            if aggregation == "token_mean":
                total = total + term / num_tokens
            elif aggregation == "sequence_mean":
                total = total + term / len(kept) / num_sequences
            else:
                total = total + term / (num_sequences * constant_length)
    return total


def decoupled_weight(proximal: float, behavior: float, cap: float) -> float:
    """w = min(pi_prox/mu, C) (AReaL, equation 5, truncated)."""
    return min(math.exp(proximal - behavior), cap)


def clipped_weight(proximal: float, behavior: float, advantage: float, low: float, high: float, cap: float) -> float:
    """w = min(pi_prox/mu, C); 0 where PPO's clipped objective with the ratio to mu has no gradient."""
    ratio = math.exp(proximal - behavior)
    flat = ratio < low if advantage < 0 else ratio > high
    return 0.0 if flat else min(ratio, cap)


def icepop_weight(proximal: float, behavior: float, low: float, high: float) -> float:
    """w = pi_prox/mu inside [low, high], 0 outside (IcePop)."""
    weight = math.exp(proximal - behavior)
    return weight if low <= weight <= high else 0.0


def sequence_ratio(numerators: list[float], denominators: list[float], mask: list[bool], kind: str) -> float:
    """prod_t numerator_t/denominator_t over T unmasked tokens, or its T-th root if `geometric` (GSPO, equation 7)."""
    value, count = 1.0, 0
    for top, bottom, m in zip(numerators, denominators, mask, strict=True):
        if m:
            value, count = value * math.exp(top) / math.exp(bottom), count + 1
    return value ** (1 / count) if kind == "geometric" and count else value


def topr_weight(ratio: float, advantages: list[float], mask: list[bool]) -> float:
    """1 for a completion with an advantage of 0 or more, otherwise min(pi/mu, 1) (TOPR, its canonical taper [0, 1])."""
    total = math.fsum(a for a, m in zip(advantages, mask, strict=True) if m)
    return 1.0 if total >= 0 else min(ratio, 1.0)


def vtrace_targets(
    ratios: list[float],
    rewards: list[float],
    values: list[float],
    mask: list[bool],
    *,
    gamma: float,
    lam: float,
    rho_bar: float,
    c_bar: float,
) -> tuple[list[float], list[float]]:
    """Returns (v_s, r_s + gamma v_{s+1} - V_s); v_s is the sum in IMPALA's equation 1, c_i = lam min(c_bar, ratio)."""
    steps = [t for t, m in enumerate(mask) if m]
    targets, advantages = [0.0] * len(mask), [0.0] * len(mask)
    for k, s in enumerate(steps):
        value = values[s]
        for j in range(k, len(steps)):
            t = steps[j]
            following = values[steps[j + 1]] if j + 1 < len(steps) else 0.0
            delta = min(rho_bar, ratios[t]) * (rewards[t] + gamma * following - values[t])
            traces = math.prod(lam * min(c_bar, ratios[i]) for i in steps[k:j])
            value += gamma ** (j - k) * traces * delta
        targets[s] = value
    for k, s in enumerate(steps):
        following = targets[steps[k + 1]] if k + 1 < len(steps) else 0.0
        advantages[s] = rewards[s] + gamma * following - values[s]
    return targets, advantages


def gspo_terms(
    logprobs: Ragged,
    denominators: list[list[float]],
    weights: list[list[float]],
    advantages: list[list[float]],
    mask: Mask,
    clip_low: float,
    clip_high: float,
) -> Ragged:
    """-w_t min(s_t A_t, clip(s_t) A_t) with s_t = sg(s) pi_t/sg(pi_t) (GSPO, equations 13 and 14)."""
    terms: Ragged = []
    for i, row in enumerate(logprobs):
        s = sequence_ratio([x.item() for x in row], denominators[i], mask[i], "geometric")
        terms.append([])
        for t, logprob in enumerate(row):
            s_t = s * torch.exp(logprob - logprob.item())
            advantage = advantages[i][t]
            bounded = torch.tensor(min(max(s, 1 - clip_low), 1 + clip_high), dtype=torch.float64)
            clips = bounded.item() * advantage < s * advantage
            terms[-1].append(-weights[i][t] * (bounded if clips else s_t) * advantage)
    return terms


def gspo_objective(
    logprobs: Ragged, denominators: Ragged, advantages: list[float], mask: Mask, clip_low: float, clip_high: float
) -> Tensor:
    """-1/G sum_i min(s_i A_i, clip(s_i) A_i); the gradient goes through s_i (GSPO, equations 5 and 7)."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for i, row in enumerate(logprobs):
        kept = [x - float(y) for x, y, m in zip(row, denominators[i], mask[i], strict=True) if m]
        if not kept:
            continue
        s, count = torch.exp(torch.stack(kept).sum() / len(kept)), count + 1
        bounded = min(max(s.item(), 1 - clip_low), 1 + clip_high)
        clips = bounded * advantages[i] < s.item() * advantages[i]
        total = total - (torch.tensor(bounded, dtype=torch.float64) if clips else s) * advantages[i]
    return total / count


def cispo_terms(
    logprobs: Ragged,
    denominators: list[list[float]],
    weights: list[list[float]],
    advantages: list[list[float]],
    clip_low: float,
    clip_high: float,
) -> Ragged:
    """-w_t sg(clip(u_t, 1 - clip_low, 1 + clip_high)) A_t log pi_t (CISPO, equations 4 and 5, weighted)."""
    terms: Ragged = []
    for i, row in enumerate(logprobs):
        terms.append([])
        for t, logprob in enumerate(row):
            u = math.exp(logprob.item() - denominators[i][t])
            u = max(1 - clip_low, min(1 + clip_high, u))
            terms[-1].append(-weights[i][t] * u * advantages[i][t] * logprob)
    return terms


def returns_to_go(rewards: list[float], gamma: float) -> list[float]:
    """A_t = sum_{k >= t} gamma^(k - t) r_k (REINFORCE++, where the rewards hold the KL penalties)."""
    return [math.fsum(gamma**k * r for k, r in enumerate(rewards[t:])) for t in range(len(rewards))]


def clipped_terms(
    logprobs: Ragged,
    denominators: Ragged,
    weights: list[list[float]],
    advantages: Ragged,
    clip_low: float,
    clip_high: float,
) -> Ragged:
    """-w_t min(u_t A_t, clip(u_t, 1 - clip_low, 1 + clip_high) A_t) (PPO, equation 7, weighted)."""
    terms: Ragged = []
    for i, row in enumerate(logprobs):
        terms.append([])
        for t, logprob in enumerate(row):
            u = torch.exp(logprob - float(denominators[i][t]))
            advantage = float(advantages[i][t])
            if u < 1 - clip_low:
                clipped = torch.tensor(1 - clip_low, dtype=torch.float64)
            elif u > 1 + clip_high:
                clipped = torch.tensor(1 + clip_high, dtype=torch.float64)
            else:
                clipped = u
            smaller = u * advantage if u * advantage <= clipped * advantage else clipped * advantage
            terms[-1].append(-weights[i][t] * smaller)
    return terms


def value_terms(values: Ragged, old_values: Ragged, returns: Ragged, value_clip: float | None) -> Ragged:
    """0.5 max((V - R)^2, (clip(V, V_old +- value_clip) - R)^2) (PPO's reference implementation)."""
    terms: Ragged = []
    for i, row in enumerate(values):
        terms.append([])
        for t, value in enumerate(row):
            target, old = float(returns[i][t]), float(old_values[i][t])
            term = (value - target) ** 2 / 2
            if value_clip is not None and value_clip > 0:
                if value > old + value_clip:
                    clipped = torch.tensor(old + value_clip, dtype=torch.float64)
                elif value < old - value_clip:
                    clipped = torch.tensor(old - value_clip, dtype=torch.float64)
                else:
                    clipped = value
                other = (clipped - target) ** 2 / 2
                term = other if other > term else term
            terms[-1].append(term)
    return terms


def kl_term(logprob: Tensor, ref_logprob: float, kind: str) -> Tensor:
    """k1, k2, k3 of KL(pi||ref) with r = ref/pi (Schulman, Approximating KL Divergence; k3: GRPO, equation 4)."""
    log_r = ref_logprob - logprob
    if kind == "k1":
        return -log_r
    if kind == "k2":
        return log_r**2 / 2
    return torch.exp(log_r) - 1 - log_r


def gae_advantages(
    rewards: list[float], values: list[float], mask: list[bool], gamma: float, lam: float
) -> tuple[list[float], list[float]]:
    """A_t = sum_l (gamma lam)^l delta_{t+l} over the scored tokens (GAE, equation 16), without recursion."""
    steps = [t for t, m in enumerate(mask) if m]
    deltas = []
    for k, t in enumerate(steps):
        following = values[steps[k + 1]] if k + 1 < len(steps) else 0.0
        deltas.append(rewards[t] + gamma * following - values[t])
    advantages, returns = [0.0] * len(mask), [0.0] * len(mask)
    for k, t in enumerate(steps):
        advantages[t] = math.fsum((gamma * lam) ** j * delta for j, delta in enumerate(deltas[k:]))
        returns[t] = advantages[t] + values[t]
    return advantages, returns


def group_advantages(rewards: list[float], groups: list[int], normalize_std: bool) -> list[float]:
    """A_i = (r_i - mean) / (std + 1e-6), sample standard deviation, 0 for a group of one (GRPO, 4.1.2)."""
    advantages = []
    for reward, group in zip(rewards, groups, strict=True):
        members = [r for r, g in zip(rewards, groups, strict=True) if g == group]
        mean = math.fsum(members) / len(members)
        advantage = reward - mean
        if normalize_std:
            squares = math.fsum((r - mean) ** 2 for r in members)
            advantage /= (math.sqrt(squares / (len(members) - 1)) if len(members) > 1 else 0.0) + 1e-6
        advantages.append(advantage)
    return advantages


def leave_one_out_advantages(rewards: list[float], groups: list[int]) -> list[float]:
    """A_i = r_i - mean of the other rewards of its group (RLOO); 0 in a group of one."""
    advantages = []
    for i, (reward, group) in enumerate(zip(rewards, groups, strict=True)):
        others = [r for j, r in enumerate(rewards) if groups[j] == group and j != i]
        advantages.append(reward - math.fsum(others) / len(others) if others else 0.0)
    return advantages


def whitened(values: list[float]) -> list[float]:
    """(x - mean) / sqrt(max(population variance, 1e-8))."""
    mean = math.fsum(values) / len(values)
    variance = math.fsum((x - mean) ** 2 for x in values) / len(values)
    return [(x - mean) / math.sqrt(max(variance, 1e-8)) for x in values]


def mean(values: list[float]) -> float:
    """Arithmetic mean."""
    return math.fsum(values) / len(values)


def deviation(values: list[float]) -> float:
    """Population standard deviation."""
    center = mean(values)
    return math.sqrt(math.fsum((x - center) ** 2 for x in values) / len(values))


def effective_sample_size(weights: list[float]) -> float:
    """(sum w)^2 / (N sum w^2) (Kong 1992): 1 when all weights are equal, 1/N when all but one are 0."""
    return math.fsum(weights) ** 2 / (len(weights) * math.fsum(w * w for w in weights))


def gradient(loss: Callable[[Ragged], Tensor], inputs: list[list[float]]) -> tuple[float, list[float]]:
    """Returns (value, gradient of every token in order) of a loss that is written over scalars."""
    leaves = [[torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in row] for row in inputs]
    flat = [leaf for row in leaves for leaf in row]
    value = loss(leaves)
    if not value.requires_grad:
        return value.detach().item(), [0.0] * len(flat)
    gradients = torch.autograd.grad(value, flat, allow_unused=True)
    return value.detach().item(), [0.0 if g is None else float(g) for g in gradients]
