import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.algorithms.advantages import (
    gae,
    group_relative,
    leave_one_out,
    pad_mask,
    sequence_lengths,
    terminal_rewards,
    whiten,
)
from tests.references import (
    RaggedBatch,
    gae_advantages,
    group_advantages,
    leave_one_out_advantages,
    ragged_batches,
    whitened,
)

COEFFICIENTS = st.sampled_from([(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0), (0.0, 0.5)])
GROUPED = st.lists(st.tuples(st.integers(0, 3), st.sampled_from([1.0, -0.5, -1.0, 0.1, 0.37])), min_size=1, max_size=12)


@given(ragged_batches(), COEFFICIENTS)
def test_gae_agrees_with_the_sum_of_the_paper(batch: RaggedBatch, coefficients: tuple[float, float]) -> None:
    gamma, lam = coefficients
    mask = batch.padded_mask
    advantages, returns = gae(batch.padded("rewards"), batch.padded("values"), mask, gamma=gamma, lam=lam)
    assert torch.all(advantages[~mask] == 0) and torch.all(returns[~mask] == 0)
    for i, length in enumerate(batch.lengths):
        rewards, values = batch.rows["rewards"][i], batch.rows["values"][i]
        expected = gae_advantages(rewards, values, batch.mask[i], gamma, lam)
        assert advantages[i, :length].tolist() == pytest.approx(expected[0], abs=1e-12)
        assert returns[i, :length].tolist() == pytest.approx(expected[1], abs=1e-12)
        alone = gae(
            torch.tensor(rewards, dtype=torch.float64),
            torch.tensor(values, dtype=torch.float64),
            torch.tensor(batch.mask[i]),
            gamma=gamma,
            lam=lam,
        )
        assert torch.equal(alone[0], advantages[i, :length]) and torch.equal(alone[1], returns[i, :length])


def test_gae_skips_observation_tokens() -> None:
    mask = torch.tensor([True, False, False, True])
    rewards = torch.tensor([0.5, 100.0, 100.0, 1.0])
    values = torch.tensor([0.2, 50.0, 50.0, 0.4])
    advantages, _ = gae(rewards, values, mask, gamma=0.5, lam=0.5)
    assert advantages.tolist() == pytest.approx([0.5 + 0.5 * 0.4 - 0.2 + 0.25 * 0.6, 0, 0, 0.6])


def test_gae_of_no_tokens_is_empty() -> None:
    empty = torch.zeros(3, 0)
    advantages, returns = gae(empty, empty, empty.bool(), gamma=1.0, lam=1.0)
    assert advantages.shape == returns.shape == (3, 0)


@given(GROUPED)
def test_group_advantages_agree_with_the_equations(members: list[tuple[int, float]]) -> None:
    groups, rewards = [g for g, _ in members], [r for _, r in members]
    tensors = torch.tensor(rewards, dtype=torch.float64), torch.tensor(groups)
    for normalize_std in (False, True):
        expected = group_advantages(rewards, groups, normalize_std)
        found = group_relative(*tensors, normalize_std=normalize_std).tolist()
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-9 if normalize_std else 1e-12)
    assert leave_one_out(*tensors).tolist() == pytest.approx(leave_one_out_advantages(rewards, groups), abs=1e-12)


@given(st.integers(0, 2**32 - 1))
def test_group_advantages_of_distinct_rewards_are_exact(seed: int) -> None:
    rewards, groups = np.random.default_rng(seed).normal(size=12).tolist(), [0, 1, 2] * 4
    found = group_relative(torch.tensor(rewards, dtype=torch.float64), torch.tensor(groups), normalize_std=True)
    assert found.tolist() == pytest.approx(group_advantages(rewards, groups, True), abs=1e-12)


def test_of_nothing_there_is_nothing() -> None:
    nothing, index = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    assert group_relative(nothing, index, normalize_std=True).shape == leave_one_out(nothing, index).shape == (0,)
    assert pad_mask(index, 0).shape == (0, 0)


def test_equal_float32_rewards_give_no_advantage() -> None:
    rewards, groups = torch.full((7,), 0.1), torch.zeros(7, dtype=torch.int64)
    advantages = group_relative(rewards, groups, normalize_std=True)
    assert advantages.dtype == torch.float32
    assert advantages.abs().max() < 1e-9
    assert leave_one_out(rewards, groups).abs().max() < 1e-9


@given(ragged_batches())
def test_whitening_agrees_and_is_the_same_over_two_ranks(batch: RaggedBatch) -> None:
    values, mask = batch.packed("advantages"), batch.packed_mask
    found = whiten(values, mask)
    assert torch.all(found[~mask] == 0)
    if len(batch.select("advantages")) > 1:
        assert found[mask].tolist() == pytest.approx(whitened(batch.select("advantages")), rel=1e-9, abs=1e-12)
    cut = len(values) // 2
    sums: list[torch.Tensor] = []
    for part in (slice(0, cut), slice(cut, None)):
        whiten(values[part], mask[part], reduce=lambda tensor: (sums.append(tensor), tensor)[1])
    halves = [
        whiten(values[part], mask[part], reduce=lambda _: sums[0] + sums[1])
        for part in (slice(0, cut), slice(cut, None))
    ]
    assert torch.allclose(torch.cat(halves), found, rtol=1e-9, atol=1e-12)


def test_whitening_a_constant_gives_zero_and_masked_nan_is_ignored() -> None:
    constant = torch.tensor([0.1, 0.1, torch.nan])
    assert whiten(constant, torch.tensor([True, True, False])).abs().max() < 1e-6
    assert whiten(constant, torch.zeros(3, dtype=torch.bool)).tolist() == [0, 0, 0]


def test_terminal_rewards_land_on_the_last_token_of_each_trajectory() -> None:
    index = torch.tensor([0, 0, 0, 1, 2, 2])
    rewards = terminal_rewards(torch.tensor([1.0, -0.5, -1.0]), index, dtype=torch.float32)
    assert rewards.tolist() == [0, 0, 1.0, -0.5, 0, -1.0]


@given(ragged_batches())
def test_padding_keeps_the_packed_order(batch: RaggedBatch) -> None:
    mask = pad_mask(batch.sequence_index, len(batch.lengths))
    assert mask.sum(1).tolist() == list(batch.lengths)
    assert torch.equal(batch.padded("values")[mask], batch.packed("values"))


@pytest.mark.parametrize(
    ("index", "num_sequences", "message"),
    [([0, 1, 0], 2, "decreases"), ([0, 2, 2], 3, "3 rewards"), ([0, 1], 1, "1 rewards"), ([0, 1], 3, "3 rewards")],
)
def test_a_broken_packing_is_refused(index: list[int], num_sequences: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sequence_lengths(torch.tensor(index), num_sequences)
