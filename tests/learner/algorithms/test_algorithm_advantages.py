"""The algorithms' advantages against the papers' equations."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.algorithms.advantages import whiten
from learner.algorithms.base import AdvantageInputs
from learner.algorithms.corrections import VTrace
from learner.algorithms.grpo import GRPO
from learner.algorithms.ppo import PPO
from learner.algorithms.reinforce_pp import ReinforcePP
from tests.references import (
    RaggedBatch,
    gae_advantages,
    group_advantages,
    leave_one_out_advantages,
    ragged_batches,
    returns_to_go,
    vtrace_targets,
    whitened,
)

KL_COEF = 0.3


def rewards_of(batch: RaggedBatch) -> list[float]:
    return [row[0] for row in batch.rows["rewards"]]


def groups_of(batch: RaggedBatch) -> list[int]:
    return [i // 2 for i in range(len(batch.lengths))]


def advantage_inputs(batch: RaggedBatch, **changes: Any) -> AdvantageInputs:
    inputs = AdvantageInputs(
        rewards=torch.tensor(rewards_of(batch), dtype=torch.float64),
        group_index=torch.tensor(groups_of(batch)),
        sequence_index=batch.sequence_index,
        values=batch.packed("values"),
        behavior_logprobs=batch.packed("behavior"),
        proximal_logprobs=batch.packed("proximal"),
        ref_logprobs=batch.packed("ref"),
    )
    return dataclasses.replace(inputs, **changes)


def expected_token_rewards(batch: RaggedBatch, logprobs: str, kl_coef: float) -> list[list[float]]:
    rows = []
    for i, reward in enumerate(rewards_of(batch)):
        row = [
            -kl_coef * (x - ref) if kl_coef else 0.0
            for x, ref in zip(batch.rows[logprobs][i], batch.rows["ref"][i], strict=True)
        ]
        row[-1] += reward
        rows.append(row)
    return rows


@given(ragged_batches(), st.sampled_from([0.0, KL_COEF]), st.booleans(), st.booleans())
def test_ppo_advantages_agree(batch: RaggedBatch, kl_coef: float, whitening: bool, has_proximal: bool) -> None:
    algorithm = PPO(
        gamma=0.97,
        lam=0.9,
        kl="reward" if kl_coef else "off",
        kl_coef=kl_coef,
        whiten_advantages=whitening,
    )
    inputs = advantage_inputs(batch, **({} if has_proximal else {"proximal_logprobs": None}))
    outputs = algorithm.advantages(inputs)
    rewards = expected_token_rewards(batch, "proximal" if has_proximal else "behavior", kl_coef)
    estimates = [
        gae_advantages(r, v, [True] * len(v), 0.97, 0.9) for r, v in zip(rewards, batch.rows["values"], strict=True)
    ]
    advantages = [x for row, _ in estimates for x in row]
    assert outputs.token_rewards.tolist() == pytest.approx([x for row in rewards for x in row], abs=1e-12)
    assert outputs.returns is not None
    assert outputs.returns.tolist() == pytest.approx([x for _, row in estimates for x in row], abs=1e-12)
    if whitening:
        advantages = whitened(advantages)
    assert outputs.advantages.tolist() == pytest.approx(advantages, rel=1e-8, abs=1e-10 if whitening else 1e-12)


def test_ppo_whitens_over_all_ranks() -> None:
    batch = RaggedBatch.random([3, 5], 0.0, 3)
    raw = PPO().advantages(advantage_inputs(batch)).advantages
    ones = torch.ones_like(raw, dtype=torch.bool)
    other_rank = torch.tensor([4.0, 10.0, 40.0], dtype=torch.float64)
    shared = (
        PPO(whiten_advantages=True)
        .advantages(advantage_inputs(batch, reduce=lambda tensor: tensor + other_rank))
        .advantages
    )
    assert torch.equal(shared, whiten(raw, ones, reduce=lambda tensor: tensor + other_rank))
    assert not torch.allclose(shared, whiten(raw, ones))


@given(ragged_batches(), st.sampled_from([0.0, KL_COEF]), st.booleans())
def test_grpo_advantages_agree(batch: RaggedBatch, kl_coef: float, normalize_std: bool) -> None:
    algorithm = GRPO(kl="reward" if kl_coef else "off", kl_coef=kl_coef, normalize_std=normalize_std)
    outputs = algorithm.advantages(advantage_inputs(batch))
    token_rewards = expected_token_rewards(batch, "proximal", kl_coef)
    expected = group_advantages([sum(row) for row in token_rewards], groups_of(batch), normalize_std)
    per_token = [a for a, length in zip(expected, batch.lengths, strict=True) for _ in range(length)]
    assert outputs.returns is None
    assert outputs.advantages.tolist() == pytest.approx(per_token, rel=1e-9, abs=1e-11)
    assert outputs.token_rewards.tolist() == pytest.approx([x for row in token_rewards for x in row], abs=1e-12)


@given(ragged_batches())
def test_rloo_leaves_the_completion_itself_out(batch: RaggedBatch) -> None:
    outputs = GRPO(baseline="leave_one_out", normalize_std=False).advantages(advantage_inputs(batch))
    expected = leave_one_out_advantages(rewards_of(batch), groups_of(batch))
    per_token = [a for a, length in zip(expected, batch.lengths, strict=True) for _ in range(length)]
    assert outputs.advantages.tolist() == pytest.approx(per_token, abs=1e-12)


@given(ragged_batches(), st.sampled_from([0.0, KL_COEF]), st.booleans(), st.sampled_from([1.0, 0.9]))
def test_reinforce_pp_sums_what_follows_and_whitens(
    batch: RaggedBatch, kl_coef: float, whitening: bool, gamma: float
) -> None:
    kl = "reward" if kl_coef else "off"
    algorithm = ReinforcePP(gamma=gamma, kl=kl, kl_coef=kl_coef, whiten_advantages=whitening)
    outputs = algorithm.advantages(advantage_inputs(batch))
    rewards = expected_token_rewards(batch, "proximal", kl_coef)
    expected = [x for row in rewards for x in returns_to_go(row, gamma)]
    expected = whitened(expected) if whitening else expected
    assert outputs.returns is None
    assert outputs.advantages.tolist() == pytest.approx(expected, rel=1e-8, abs=1e-10 if whitening else 1e-12)


@given(ragged_batches())
def test_reinforce_pp_baseline_compares_within_groups_and_whitens_over_the_batch(batch: RaggedBatch) -> None:
    outputs = GRPO(normalize_std=False, whiten_advantages=True).advantages(advantage_inputs(batch))
    expected = group_advantages(rewards_of(batch), groups_of(batch), False)
    per_token = [a for a, length in zip(expected, batch.lengths, strict=True) for _ in range(length)]
    # If every group has one member, whitening must not scale the rounding errors up to a deviation of 1.
    assert outputs.advantages.tolist() == pytest.approx(whitened(per_token), rel=1e-8, abs=1e-8)


@given(ragged_batches())
def test_vtrace_gives_ppo_its_targets_and_advantages(batch: RaggedBatch) -> None:
    algorithm = PPO(correction=VTrace(rho_bar=1.5, c_bar=1.1), gamma=0.97, lam=0.9, whiten_advantages=False)
    assert algorithm.needs_proximal and not PPO().needs_proximal
    outputs = algorithm.advantages(advantage_inputs(batch))
    targets, advantages = [], []
    for i, rewards in enumerate(expected_token_rewards(batch, "proximal", 0.0)):
        rows = zip(batch.rows["proximal"][i], batch.rows["behavior"][i], strict=True)
        ratios, values = [math.exp(p - b) for p, b in rows], batch.rows["values"][i]
        coefficients = {"gamma": 0.97, "lam": 0.9, "rho_bar": 1.5, "c_bar": 1.1}
        found = vtrace_targets(ratios, rewards, values, [True] * len(values), **coefficients)
        targets += found[0]
        advantages += found[1]
    assert outputs.returns is not None
    assert outputs.returns.tolist() == pytest.approx(targets, rel=1e-12, abs=1e-12)
    assert outputs.advantages.tolist() == pytest.approx(advantages, rel=1e-12, abs=1e-12)
    with pytest.raises(ValueError, match="vtrace needs proximal_logprobs"):
        algorithm.advantages(advantage_inputs(batch, proximal_logprobs=None))


def test_rewards_are_scaled_shifted_and_clipped_in_this_order() -> None:
    batch = RaggedBatch.random([1, 1, 1], 0.0, 3)
    inputs = advantage_inputs(batch, rewards=torch.tensor([1.0, 0.25, -1.0], dtype=torch.float64))
    shaped = GRPO(reward_scale=2.0, reward_shift=0.5, reward_clip=1.25).token_rewards(inputs)
    assert shaped.tolist() == [1.25, 1.0, -1.25]
    assert GRPO(reward_scale=2.0, reward_shift=0.5).token_rewards(inputs).tolist() == [2.5, 1.0, -1.5]


def test_a_scheduled_coefficient_takes_the_place_of_the_fixed_one() -> None:
    batch = RaggedBatch.random([4, 6], 0.0, 5)
    rewarded = GRPO(kl="reward", kl_coef=0.1).token_rewards(advantage_inputs(batch, kl_coef=0.7))
    assert torch.equal(rewarded, GRPO(kl="reward", kl_coef=0.7).token_rewards(advantage_inputs(batch)))


def test_missing_annotations_are_named() -> None:
    batch = RaggedBatch.random([3], 0.0, 1)
    with pytest.raises(ValueError, match="PPO needs values"):
        PPO().advantages(advantage_inputs(batch, values=None))
    with pytest.raises(ValueError, match="GRPO needs ref_logprobs"):
        GRPO(kl="reward", kl_coef=0.1).advantages(advantage_inputs(batch, ref_logprobs=None))
