import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.algorithms.importance import (
    MAX_LOG_RATIO,
    log_ratio,
    ratio,
    sequence_log_ratio,
    sum_per_sequence,
    to_tokens,
    truncated_weights,
    vtrace,
)
from tests.references import (
    RaggedBatch,
    decoupled_weight,
    gae_advantages,
    ragged_batches,
    sequence_ratio,
    vtrace_targets,
)

KINDS = st.sampled_from(["product", "geometric"])
COEFFICIENTS = st.sampled_from(
    [(1.0, 1.0, 1.0, 1.0), (0.9, 0.8, 1.0, 1.0), (1.0, 1.0, 2.0, 0.5), (0.95, 1.0, 50.0, 3.0)]
)


def test_ratios_are_float32_clamped_and_blind_to_what_is_masked() -> None:
    numerator = torch.tensor([-1.0, -1000.0, math.nan, -1.0], dtype=torch.bfloat16)
    denominator = torch.tensor([-1000.0, -1.0, -1.0, -math.inf], dtype=torch.bfloat16)
    mask = torch.tensor([True, True, False, False])
    logs = log_ratio(numerator, denominator, mask)
    assert logs.dtype == torch.float32
    assert logs.tolist() == [MAX_LOG_RATIO, -MAX_LOG_RATIO, 0.0, 0.0] == [20.0, -20.0, 0.0, 0.0]
    assert torch.isfinite(ratio(numerator, denominator, mask).square()).all()
    assert ratio(numerator.double(), denominator.double(), mask).dtype == torch.float64
    assert ratio(numerator, denominator.double(), mask).dtype == torch.float64


@given(ragged_batches())
def test_truncated_weights_agree(batch: RaggedBatch) -> None:
    proximal, behavior, mask = batch.packed("proximal"), batch.packed("behavior"), batch.packed_mask
    weights = truncated_weights(proximal, behavior, mask, max_importance_weight=1.5)
    assert torch.all(weights[~mask] == 0)
    pairs = zip(batch.select("proximal"), batch.select("behavior"), strict=True)
    assert weights[mask].tolist() == pytest.approx([decoupled_weight(p, b, 1.5) for p, b in pairs], rel=1e-12)


@given(ragged_batches(), KINDS)
def test_the_ratio_of_a_sequence_agrees_packed_and_padded(batch: RaggedBatch, kind: str) -> None:
    packed = [batch.packed(name) for name in ("proximal", "behavior")]
    found = sequence_log_ratio(*packed, batch.packed_mask, batch.sequence_index, kind=kind).exp()
    expected = []
    for i, mask in enumerate(batch.mask):
        value = sequence_ratio(batch.rows["proximal"][i], batch.rows["behavior"][i], mask, kind)
        expected += [value if m else 1.0 for m in mask]
    assert found.tolist() == pytest.approx(expected, rel=1e-12)
    padded = [batch.padded(name) for name in ("proximal", "behavior")]
    square = sequence_log_ratio(*padded, batch.padded_mask, kind=kind)
    present = torch.zeros_like(batch.padded_mask)
    for i, length in enumerate(batch.lengths):
        present[i, :length] = True
    assert square[present].exp().tolist() == pytest.approx(found.tolist(), rel=1e-12)
    assert torch.all(square[~batch.padded_mask] == 0)


def test_the_ratio_of_a_long_sequence_stays_finite() -> None:
    mask, index = torch.ones(50, dtype=torch.bool), torch.zeros(50, dtype=torch.int64)
    near, far = torch.full((50,), -1.0), torch.full((50,), -3.0)
    assert sequence_log_ratio(near, far, mask, index, kind="product").tolist() == [20.0] * 50
    assert sequence_log_ratio(far, near, mask, index, kind="product").tolist() == [-20.0] * 50
    assert sequence_log_ratio(near, far, mask, index, kind="geometric").tolist() == [2.0] * 50


def test_sequences_may_keep_their_number_in_a_microbatch() -> None:
    index = torch.tensor([3, 3, 5])
    sums = sum_per_sequence(torch.tensor([1.0, 2.0, 4.0]), index)
    assert sums.tolist() == [0.0, 0.0, 0.0, 3.0, 0.0, 4.0]
    assert to_tokens(sums, index).tolist() == [3.0, 3.0, 4.0]
    assert sum_per_sequence(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).tolist() == []
    assert to_tokens(sum_per_sequence(torch.ones(2, 3), None), None).tolist() == [[3.0], [3.0]]
    assert to_tokens(sum_per_sequence(torch.ones(3), None), None).tolist() == [3.0]


def test_an_unknown_ratio_of_a_sequence_is_refused() -> None:
    one = torch.zeros(1)
    with pytest.raises(ValueError, match="'mean'; choose product or geometric"):
        sequence_log_ratio(one, one, one == 0, kind="mean")  # type: ignore[arg-type]


@given(ragged_batches(), COEFFICIENTS)
def test_vtrace_agrees_with_the_sum_of_the_paper(batch: RaggedBatch, c: tuple[float, float, float, float]) -> None:
    settings = dict(zip(("gamma", "lam", "rho_bar", "c_bar"), c, strict=True))
    names = ("proximal", "behavior", "rewards", "values")
    mask = batch.padded_mask
    targets, advantages = vtrace(*(batch.padded(name) for name in names), mask, **settings)
    assert torch.all(targets[~mask] == 0) and torch.all(advantages[~mask] == 0)
    for i, length in enumerate(batch.lengths):
        rows = [batch.rows[name][i] for name in names]
        ratios = [math.exp(p - b) for p, b in zip(rows[0], rows[1], strict=True)]
        expected = vtrace_targets(ratios, rows[2], rows[3], batch.mask[i], **settings)
        assert targets[i, :length].tolist() == pytest.approx(expected[0], rel=1e-12, abs=1e-12)
        assert advantages[i, :length].tolist() == pytest.approx(expected[1], rel=1e-12, abs=1e-12)
        alone = vtrace(
            *(torch.tensor(row, dtype=torch.float64) for row in rows), torch.tensor(batch.mask[i]), **settings
        )
        assert torch.equal(alone[0], targets[i, :length]) and torch.equal(alone[1], advantages[i, :length])


@given(ragged_batches(), st.sampled_from([0.9, 1.0]))
def test_on_policy_vtrace_is_gae(batch: RaggedBatch, lam: float) -> None:
    same, rewards, values = (batch.packed(name)[: batch.lengths[0]] for name in ("behavior", "rewards", "values"))
    mask = torch.tensor(batch.mask[0])
    targets, advantages = vtrace(same, same, rewards, values, mask, gamma=0.95, lam=lam)
    expected, returns = gae_advantages(rewards.tolist(), values.tolist(), batch.mask[0], 0.95, lam)
    assert targets.tolist() == pytest.approx(returns, abs=1e-12)
    if lam == 1:
        assert advantages.tolist() == pytest.approx(expected, abs=1e-12)


def test_vtrace_of_no_tokens_is_empty_and_has_the_papers_bounds_by_default() -> None:
    empty = torch.zeros(3, 0)
    targets, advantages = vtrace(empty, empty, empty, empty, empty.bool(), gamma=1.0)
    assert targets.shape == advantages.shape == (3, 0)
    near, far, mask = torch.tensor([-1.0, -1.0]), torch.tensor([-3.0, -3.0]), torch.tensor([True, True])
    rewards, values = torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.25])
    targets, advantages = vtrace(near, far, rewards, values, mask, gamma=1.0)
    assert targets.tolist() == [1.0, 1.0] and advantages.tolist() == [0.5, 0.75]


def test_weights_carry_no_gradient() -> None:
    leaves = [torch.tensor([-1.0, -2.0], requires_grad=True) for _ in range(2)]
    mask = torch.ones(2, dtype=torch.bool)
    assert not truncated_weights(*leaves, mask, max_importance_weight=2.0).requires_grad
    assert not truncated_weights(leaves[0].detach(), leaves[1], mask, max_importance_weight=2.0).requires_grad
    assert not truncated_weights(leaves[0], leaves[1].detach(), mask, max_importance_weight=2.0).requires_grad
