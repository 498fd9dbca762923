import math

import pytest
import torch
from hypothesis import given

from learner.algorithms.corrections import (
    TOPR,
    ClippedTIS,
    Correction,
    DecoupledTIS,
    Distance,
    NoCorrection,
    PPOBehavior,
    SequenceMask,
    SequenceTIS,
    TokenMask,
    VTrace,
)
from tests.references import (
    RaggedBatch,
    clipped_weight,
    decoupled_weight,
    gae_advantages,
    icepop_weight,
    ragged_batches,
    sequence_ratio,
    topr_weight,
    vtrace_targets,
)

ALL = (
    DecoupledTIS(),
    ClippedTIS(),
    TokenMask(),
    PPOBehavior(),
    NoCorrection(),
    SequenceMask(),
    SequenceTIS(),
    TOPR(),
    VTrace(),
)


def distance_of(batch: RaggedBatch) -> Distance:
    tensors = (batch.packed(name) for name in ("proximal", "behavior", "advantages"))
    return Distance(*tensors, batch.packed_mask, batch.sequence_index)


def weights_of(correction: Correction, batch: RaggedBatch) -> list[float]:
    weights = correction.weights(distance_of(batch))
    assert torch.all(weights[~batch.packed_mask] == 0)
    return weights[batch.packed_mask].tolist()


@given(ragged_batches())
def test_token_weights_agree_with_the_equations(batch: RaggedBatch) -> None:
    pairs = list(zip(batch.select("proximal"), batch.select("behavior"), strict=True))
    expected_tis = [decoupled_weight(p, b, 1.5) for p, b in pairs]
    expected_mask = [icepop_weight(p, b, 0.6, 2.5) for p, b in pairs]
    assert weights_of(DecoupledTIS(max_importance_weight=1.5), batch) == pytest.approx(expected_tis, rel=1e-12)
    assert weights_of(VTrace(rho_bar=1.5, c_bar=0.5), batch) == pytest.approx(expected_tis, rel=1e-12)
    triples = zip(batch.select("proximal"), batch.select("behavior"), batch.select("advantages"), strict=True)
    expected_clipped = [clipped_weight(*triple, 0.7, 1.3, 1.5) for triple in triples]
    clipped = ClippedTIS(low=0.7, high=1.3, max_importance_weight=1.5)
    assert weights_of(clipped, batch) == pytest.approx(expected_clipped, rel=1e-12, abs=0)
    assert weights_of(TokenMask(low=0.6, high=2.5), batch) == pytest.approx(expected_mask, rel=1e-12, abs=0)
    assert weights_of(PPOBehavior(), batch) == weights_of(NoCorrection(), batch) == [1.0] * len(pairs)


@given(ragged_batches())
def test_sequence_weights_agree_with_the_equations(batch: RaggedBatch) -> None:
    ratios = {
        kind: [
            sequence_ratio(*rows, kind)
            for rows in zip(batch.rows["proximal"], batch.rows["behavior"], batch.mask, strict=True)
        ]
        for kind in ("product", "geometric")
    }

    def spread(values: list[float]) -> list[float]:
        return [v for v, mask in zip(values, batch.mask, strict=True) for m in mask if m]

    for kind in ("product", "geometric"):
        masked = SequenceMask(ratio=kind, low=0.7, high=1.6)
        expected = spread([r if 0.7 <= r <= 1.6 else 0.0 for r in ratios[kind]])
        assert weights_of(masked, batch) == pytest.approx(expected, rel=1e-12, abs=0)
        truncated = SequenceTIS(ratio=kind, max_importance_weight=1.4)
        assert weights_of(truncated, batch) == pytest.approx(spread([min(r, 1.4) for r in ratios[kind]]), rel=1e-12)
    rows = zip(ratios["product"], batch.rows["advantages"], batch.mask, strict=True)
    assert weights_of(TOPR(), batch) == pytest.approx(spread([topr_weight(*row) for row in rows]), rel=1e-12)


def test_topr_imitates_the_good_and_pushes_the_bad_only_while_likely() -> None:
    index, ones = torch.tensor([0, 0, 1, 1, 2, 2]), torch.ones(6)
    proximal, mask = torch.tensor([-3.0, -3.0, -3.0, -3.0, -1.0, -1.0]), torch.ones(6, dtype=torch.bool)
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0, -1.0, -1.0])
    distance = Distance(proximal, -2 * ones, advantages, mask, index)
    assert TOPR().weights(distance).tolist() == pytest.approx([1, 1, math.exp(-2), math.exp(-2), 1, 1])
    assert (TOPR().ratios(distance) > TOPR().cap).tolist() == [False] * 4 + [True] * 2
    nothing = Distance(proximal, -2 * ones, 0 * advantages, mask, index)
    assert TOPR().weights(nothing).tolist() == [1.0] * 6


def test_what_each_correction_asks_and_caps() -> None:
    assert [c for c in ALL if c.clips_behavior] == [PPOBehavior()]
    assert [c for c in ALL if c.corrects_targets] == [VTrace()]
    assert [c for c in ALL if c.judges_completions] == [TOPR()]
    assert [c.cap for c in ALL] == [2.0, 5.0, math.inf, math.inf, math.inf, math.inf, 2.0, 1.0, 1.0]
    assert DecoupledTIS(max_importance_weight=3.0).cap == SequenceTIS(max_importance_weight=3.0).cap == 3.0
    assert VTrace(rho_bar=3.0).cap == 3.0


@given(ragged_batches())
def test_what_is_weighed_is_a_tokens_or_a_sequences_ratio(batch: RaggedBatch) -> None:
    distance, mask = distance_of(batch), batch.packed_mask
    tokens = (batch.packed("proximal") - batch.packed("behavior")).exp()[mask]
    for correction in (DecoupledTIS(), TokenMask(), PPOBehavior(), NoCorrection(), VTrace()):
        assert torch.allclose(correction.ratios(distance)[mask], tokens, rtol=1e-12)
    long = [i for i, length in enumerate(batch.lengths) if sum(batch.mask[i]) > 1 and length > 1]
    for correction in (SequenceMask(), SequenceTIS(), TOPR()):
        for i in long:
            own = correction.ratios(distance)[(batch.sequence_index == i) & mask]
            assert len(set(own.tolist())) == 1


@given(ragged_batches())
def test_only_vtrace_changes_what_the_critic_learns(batch: RaggedBatch) -> None:
    padded = {name: batch.padded(name) for name in ("rewards", "values", "proximal", "behavior")}
    mask = batch.padded_mask

    def estimate(correction: Correction) -> tuple[torch.Tensor, torch.Tensor]:
        return correction.estimate(
            padded["rewards"],
            padded["values"],
            mask,
            gamma=0.9,
            lam=0.8,
            proximal_logprobs=padded["proximal"],
            behavior_logprobs=padded["behavior"],
        )

    gae = estimate(NoCorrection())
    for correction in ALL[:-1]:
        assert all(torch.equal(a, b) for a, b in zip(estimate(correction), gae, strict=True))
    advantages, targets = estimate(VTrace(rho_bar=2.0, c_bar=1.5))
    for i, length in enumerate(batch.lengths):
        rows = [batch.rows[name][i] for name in ("proximal", "behavior", "rewards", "values")]
        ratios = [math.exp(p - b) for p, b in zip(rows[0], rows[1], strict=True)]
        settings = {"gamma": 0.9, "lam": 0.8, "rho_bar": 2.0, "c_bar": 1.5}
        expected = vtrace_targets(ratios, rows[2], rows[3], batch.mask[i], **settings)
        assert targets[i, :length].tolist() == pytest.approx(expected[0], rel=1e-12, abs=1e-12)
        assert advantages[i, :length].tolist() == pytest.approx(expected[1], rel=1e-12, abs=1e-12)
        expected = gae_advantages(rows[2], rows[3], batch.mask[i], 0.9, 0.8)
        assert gae[0][i, :length].tolist() == pytest.approx(expected[0], abs=1e-12)


def test_vtrace_without_the_learners_logprobs_is_refused() -> None:
    one = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="vtrace needs proximal_logprobs"):
        VTrace().estimate(one, one, one == 0, gamma=1.0, lam=1.0, proximal_logprobs=None, behavior_logprobs=one)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan])
def test_a_cap_that_removes_everything_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="decoupled_tis: max_importance_weight is"):
        DecoupledTIS(max_importance_weight=bad)
    with pytest.raises(ValueError, match="clipped_tis: max_importance_weight is"):
        ClippedTIS(max_importance_weight=bad)
    with pytest.raises(ValueError, match="sequence_tis: max_importance_weight is"):
        SequenceTIS(max_importance_weight=bad)
    with pytest.raises(ValueError, match="vtrace: rho_bar is"):
        VTrace(rho_bar=bad)
    with pytest.raises(ValueError, match="vtrace: c_bar is"):
        VTrace(c_bar=bad)


@pytest.mark.parametrize(("low", "high"), [(1.5, 5.0), (0.5, 0.9), (-0.1, 2.0)])
def test_a_mask_that_leaves_out_on_policy_tokens_is_refused(low: float, high: float) -> None:
    for mask in (TokenMask, SequenceMask):
        with pytest.raises(ValueError, match="must contain 1"):
            mask(low=low, high=high)


def test_other_mistakes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"c_bar=2.0 is above rho_bar=1.0"):
        VTrace(c_bar=2.0)
    for sequence in (SequenceMask, SequenceTIS):
        with pytest.raises(ValueError, match="ratio is 'mean'; choose product or geometric"):
            sequence(ratio="mean")
