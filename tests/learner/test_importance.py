import math

import pytest
import torch
from hypothesis import given

from learner.importance import (
    MAX_LOG_RATIO,
    Correction,
    DecoupledTIS,
    NoCorrection,
    PPOBehavior,
    TokenMask,
    log_ratio,
    ratio,
)
from tests.references import RaggedBatch, decoupled_weight, icepop_weight, ragged_batches


def weights_of(correction: Correction, batch: RaggedBatch) -> list[float]:
    weights = correction.weights(batch.packed("proximal"), batch.packed("behavior"), batch.packed_mask)
    assert torch.all(weights[~batch.packed_mask] == 0)
    return weights[batch.packed_mask].tolist()


@given(ragged_batches())
def test_weights_agree_with_the_equations(batch: RaggedBatch) -> None:
    pairs = list(zip(batch.select("proximal"), batch.select("behavior"), strict=True))
    expected_tis = [decoupled_weight(p, b, 1.5) for p, b in pairs]
    expected_mask = [icepop_weight(p, b, 0.6, 2.5) for p, b in pairs]
    assert weights_of(DecoupledTIS(max_importance_weight=1.5), batch) == pytest.approx(expected_tis, rel=1e-12)
    assert weights_of(TokenMask(low=0.6, high=2.5), batch) == pytest.approx(expected_mask, rel=1e-12, abs=0)
    assert weights_of(PPOBehavior(), batch) == weights_of(NoCorrection(), batch) == [1.0] * len(pairs)


def test_only_ppo_behavior_clips_against_the_behavior_policy() -> None:
    proximal, behavior = torch.tensor([-1.0]), torch.tensor([-2.0])
    assert PPOBehavior().proximal(proximal, behavior) is behavior
    for correction in (DecoupledTIS(), TokenMask(), NoCorrection()):
        assert correction.proximal(proximal, behavior) is proximal


def test_only_truncation_has_a_cap() -> None:
    assert DecoupledTIS(max_importance_weight=3.0).cap == 3.0
    assert {TokenMask().cap, PPOBehavior().cap, NoCorrection().cap} == {math.inf}


def test_weights_carry_no_gradient() -> None:
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    mask = torch.tensor([True, True])
    for correction in (DecoupledTIS(), TokenMask(), PPOBehavior(), NoCorrection()):
        assert not correction.weights(logprobs, logprobs * 2, mask).requires_grad


def test_ratios_are_float32_clamped_and_blind_to_what_is_masked() -> None:
    numerator = torch.tensor([-1.0, -1000.0, math.nan, -1.0], dtype=torch.bfloat16)
    denominator = torch.tensor([-1000.0, -1.0, -1.0, -math.inf], dtype=torch.bfloat16)
    mask = torch.tensor([True, True, False, False])
    logs = log_ratio(numerator, denominator, mask)
    assert logs.dtype == torch.float32
    assert logs.tolist() == [MAX_LOG_RATIO, -MAX_LOG_RATIO, 0.0, 0.0]
    assert torch.isfinite(ratio(numerator, denominator, mask).square()).all()
    assert ratio(numerator.double(), denominator.double(), mask).dtype == torch.float64


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan])
def test_a_cap_that_removes_everything_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="max_importance_weight is"):
        DecoupledTIS(max_importance_weight=bad)


@pytest.mark.parametrize(("low", "high"), [(1.5, 5.0), (0.5, 0.9), (-0.1, 2.0)])
def test_a_mask_that_leaves_out_on_policy_tokens_is_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="must contain 1"):
        TokenMask(low=low, high=high)
