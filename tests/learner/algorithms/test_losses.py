import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from learner.algorithms.losses import (
    Aggregation,
    KLKind,
    batch_counts,
    cispo_loss,
    kl_estimate,
    policy_loss,
    sequence_denominator,
    token_weights,
    value_loss,
    weighted_sum,
)
from tests.references import (
    Ragged,
    RaggedBatch,
    aggregate,
    cispo_terms,
    clipped_terms,
    gradient,
    gspo_objective,
    gspo_terms,
    icepop_weight,
    kl_term,
    ragged_batches,
    token_counts,
    value_terms,
)

AGGREGATIONS = st.sampled_from(["token_mean", "sequence_mean", "constant"])
CLIPS = st.sampled_from([(0.2, 0.2), (0.2, 0.28), (0.05, 0.5)])


def weights_for(batch: RaggedBatch, aggregation: Aggregation) -> Tensor:
    num_tokens, num_sequences = batch_counts(batch.packed_mask, batch.sequence_index).tolist()
    return token_weights(
        batch.packed_mask,
        batch.sequence_index,
        aggregation=aggregation,
        num_tokens=num_tokens,
        num_sequences=num_sequences,
        constant_length=11,
    )


def mean_weights(mask: Tensor) -> Tensor:
    """Token weights of the mean over the mask."""
    return mask.double() / mask.sum().clamp(min=1)


def token_mask_weights(batch: RaggedBatch) -> list[list[float]]:
    rows = zip(batch.rows["proximal"], batch.rows["behavior"], strict=True)
    return [[icepop_weight(p, b, 0.5, 2.0) for p, b in zip(*row, strict=True)] for row in rows]


def flat_weights(batch: RaggedBatch) -> list[float]:
    return [w for row in token_mask_weights(batch) for w in row]


def check(found: Tensor, leaf: Tensor, expected: tuple[float, list[float]]) -> None:
    """Compare the value to 1e-12 and the gradient to 1e-10."""
    assert found.item() == pytest.approx(expected[0], abs=1e-12)
    (slope,) = torch.autograd.grad(found, leaf)
    assert slope.tolist() == pytest.approx(expected[1], abs=1e-10)


@given(ragged_batches(), AGGREGATIONS, CLIPS)
def test_policy_loss_agrees_in_value_and_gradient(
    batch: RaggedBatch, aggregation: Aggregation, clips: tuple[float, float]
) -> None:
    def reference(logprobs: Ragged) -> Tensor:
        weights = token_mask_weights(batch)
        terms = clipped_terms(logprobs, batch.scalars("proximal"), weights, batch.scalars("advantages"), *clips)
        return aggregate(terms, batch.mask, aggregation, 11)

    logprobs = batch.packed("logprobs").requires_grad_()
    found = policy_loss(
        logprobs,
        batch.packed("proximal"),
        batch.packed("advantages"),
        batch.packed_mask,
        clip_low=clips[0],
        clip_high=clips[1],
        importance_weights=torch.tensor(flat_weights(batch), dtype=torch.float64),
        token_weights=weights_for(batch, aggregation),
    )
    check(found, logprobs, gradient(reference, batch.rows["logprobs"]))


@given(ragged_batches(), AGGREGATIONS, st.sampled_from([(0.2, 0.2), (1.0, 0.5)]))
def test_cispo_loss_agrees_in_value_and_gradient(
    batch: RaggedBatch, aggregation: Aggregation, clips: tuple[float, float]
) -> None:
    def reference(logprobs: Ragged) -> Tensor:
        rows = batch.rows["proximal"], token_mask_weights(batch), batch.rows["advantages"]
        return aggregate(cispo_terms(logprobs, *rows, *clips), batch.mask, aggregation, 11)

    logprobs = batch.packed("logprobs").requires_grad_()
    found = cispo_loss(
        logprobs,
        batch.packed("proximal"),
        batch.packed("advantages"),
        batch.packed_mask,
        clip_low=clips[0],
        clip_high=clips[1],
        importance_weights=torch.tensor(flat_weights(batch), dtype=torch.float64),
        token_weights=weights_for(batch, aggregation),
    )
    check(found, logprobs, gradient(reference, batch.rows["logprobs"]))


def ratio_of_sequences(batch: RaggedBatch, logprobs: Tensor, **arguments: Tensor) -> Tensor:
    proximal, mask = batch.packed("proximal"), batch.packed_mask
    return policy_loss(
        logprobs,
        sequence_denominator(logprobs, proximal, mask, batch.sequence_index),
        arguments["advantages"],
        mask,
        clip_low=0.03,
        clip_high=0.04,
        importance_weights=arguments["weights"],
        token_weights=weights_for(batch, "sequence_mean"),
    )


@given(ragged_batches())
def test_the_ratio_of_a_sequence_as_denominator_is_gspos_objective(batch: RaggedBatch) -> None:
    def reference(logprobs: Ragged) -> Tensor:
        own = [row[0] for row in batch.rows["advantages"]]
        return gspo_objective(logprobs, batch.scalars("proximal"), own, batch.mask, 0.03, 0.04)

    logprobs = batch.packed("logprobs").requires_grad_()
    firsts = torch.tensor([row[0] for row in batch.rows["advantages"]], dtype=torch.float64)
    ones = torch.ones_like(logprobs)
    found = ratio_of_sequences(batch, logprobs, advantages=firsts[batch.sequence_index], weights=ones)
    check(found, logprobs, gradient(reference, batch.rows["logprobs"]))


@given(ragged_batches())
def test_weights_of_single_tokens_reach_only_their_own_gradient_under_a_sequences_ratio(batch: RaggedBatch) -> None:
    def reference(logprobs: Ragged) -> Tensor:
        rows = batch.rows["proximal"], token_mask_weights(batch), batch.rows["advantages"]
        return aggregate(gspo_terms(logprobs, *rows, batch.mask, 0.03, 0.04), batch.mask, "sequence_mean")

    logprobs = batch.packed("logprobs").requires_grad_()
    weights = torch.tensor(flat_weights(batch), dtype=torch.float64)
    found = ratio_of_sequences(batch, logprobs, advantages=batch.packed("advantages"), weights=weights)
    check(found, logprobs, gradient(reference, batch.rows["logprobs"]))


@given(ragged_batches())
def test_padded_and_packed_agree_and_padding_may_be_nan(batch: RaggedBatch) -> None:
    names = ("logprobs", "proximal", "advantages")
    packed, padded = [batch.packed(n) for n in names], [batch.padded(n) for n in names]
    packed[0].requires_grad_(), padded[0].requires_grad_()
    flat_means, square_means = mean_weights(batch.packed_mask), mean_weights(batch.padded_mask)
    of_flat = {"clip_low": 0.2, "clip_high": 0.3, "importance_weights": packed[2], "token_weights": flat_means}
    of_square = of_flat | {"importance_weights": padded[2], "token_weights": square_means}
    flat = policy_loss(*packed, batch.packed_mask, **of_flat)
    square = policy_loss(*padded, batch.padded_mask, **of_square)
    assert flat.item() == pytest.approx(square.item(), abs=1e-12)
    (slope,) = torch.autograd.grad(square, padded[0])
    assert torch.isfinite(slope).all()
    flat = cispo_loss(*packed, batch.packed_mask, **of_flat)
    square = cispo_loss(*padded, batch.padded_mask, **of_square)
    assert flat.item() == pytest.approx(square.item(), abs=1e-12)
    (slope,) = torch.autograd.grad(square, padded[0])
    assert torch.isfinite(slope).all()
    rows = sequence_denominator(padded[0], padded[1], batch.padded_mask)
    flat = sequence_denominator(packed[0], packed[1], batch.packed_mask, batch.sequence_index)
    assert torch.allclose(rows[batch.padded_mask], flat[batch.packed_mask], rtol=1e-12)
    assert not rows.requires_grad and not flat.requires_grad
    names = ("values", "old_values", "returns")
    padded = [batch.padded(n) for n in names]
    padded[0].requires_grad_()
    square = value_loss(*padded, batch.padded_mask, value_clip=0.2, token_weights=square_means)
    flat = value_loss(*[batch.packed(n) for n in names], batch.packed_mask, value_clip=0.2, token_weights=flat_means)
    assert flat.item() == pytest.approx(square.item(), abs=1e-12)
    (slope,) = torch.autograd.grad(square, padded[0])
    assert torch.isfinite(slope).all()


def weighed(num_tokens: int) -> dict[str, Any]:
    """Clips at 0.2, the mean over the tokens, importance weights of 1."""
    means = mean_weights(torch.ones(num_tokens, dtype=torch.bool))
    return {"clip_low": 0.2, "clip_high": 0.2, "importance_weights": torch.ones(num_tokens), "token_weights": means}


def test_on_policy_gradient_is_the_policy_gradient() -> None:
    logprobs = torch.tensor([-0.5, -1.0, -2.0], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    loss = policy_loss(logprobs, logprobs.detach(), advantages, torch.ones(3, dtype=torch.bool), **weighed(3))
    (slope,) = torch.autograd.grad(loss, logprobs)
    assert slope.tolist() == pytest.approx((-advantages / 3).tolist(), abs=1e-12)


def test_only_the_trained_logprobs_get_a_gradient() -> None:
    tensors = [torch.tensor([-1.0, -2.0], requires_grad=True) for _ in range(4)]
    mask = torch.ones(2, dtype=torch.bool)
    weighed_by_a_leaf = weighed(2) | {"importance_weights": tensors[3]}
    loss = policy_loss(*tensors[:3], mask, **weighed_by_a_leaf)
    slopes = torch.autograd.grad(loss, tensors, allow_unused=True)
    assert slopes[0] is not None and slopes[1:] == (None, None, None)
    slopes = torch.autograd.grad(kl_estimate(*tensors[:2], "k3").sum(), tensors[:2], allow_unused=True)
    assert slopes[0] is not None and slopes[1] is None
    loss = cispo_loss(*tensors[:3], mask, **weighed_by_a_leaf)
    slopes = torch.autograd.grad(loss, tensors, allow_unused=True)
    assert slopes[0] is not None and slopes[1:] == (None, None, None)
    values = [torch.tensor([0.5, 1.0], requires_grad=True) for _ in range(3)]
    loss = value_loss(*values, mask, value_clip=0.2, token_weights=mean_weights(mask))
    slopes = torch.autograd.grad(loss, values, allow_unused=True)
    assert slopes[1:] == (None, None)


def test_nothing_unmasked_is_a_zero_that_can_be_differentiated() -> None:
    logprobs = torch.tensor([-1.0, math.nan], requires_grad=True)
    fixed, mask = torch.zeros(2), torch.zeros(2, dtype=torch.bool)
    loss = policy_loss(logprobs, fixed, fixed, mask, **(weighed(2) | {"token_weights": mean_weights(mask)}))
    loss.backward()
    assert loss.item() == 0 and logprobs.grad is not None and logprobs.grad.tolist() == [0, 0]


def test_half_precision_inputs_are_lifted_to_float32() -> None:
    halves = [torch.tensor([-1.0, -2.0], dtype=torch.bfloat16) for _ in range(4)]
    mask = torch.ones(2, dtype=torch.bool)
    in_half = weighed(2) | {"importance_weights": halves[3]}
    assert policy_loss(*halves[:3], mask, **in_half).dtype == torch.float32
    assert value_loss(*halves[:3], mask, value_clip=None, token_weights=mean_weights(mask)).dtype == torch.float32
    assert kl_estimate(halves[0], halves[1], "k3").dtype == torch.float32


@given(ragged_batches(), AGGREGATIONS, st.sampled_from([0.2, 0.01, 0.0, -1.0, None]))
def test_value_loss_agrees_in_value_and_gradient(
    batch: RaggedBatch, aggregation: Aggregation, value_clip: float | None
) -> None:
    def reference(values: Ragged) -> Tensor:
        terms = value_terms(values, batch.scalars("old_values"), batch.scalars("returns"), value_clip)
        return aggregate(terms, batch.mask, aggregation, 11)

    values = batch.packed("values").requires_grad_()
    found = value_loss(
        values,
        batch.packed("old_values"),
        batch.packed("returns"),
        batch.packed_mask,
        value_clip=value_clip,
        token_weights=weights_for(batch, aggregation),
    )
    check(found, values, gradient(reference, batch.rows["values"]))


@given(ragged_batches(), st.sampled_from(["k1", "k2", "k3"]))
def test_kl_estimates_agree_in_value_and_gradient(batch: RaggedBatch, kind: KLKind) -> None:
    def reference(logprobs: Ragged) -> Tensor:
        terms = [
            [kl_term(x, r, kind) for x, r in zip(*rows, strict=True)]
            for rows in zip(logprobs, batch.rows["ref"], strict=True)
        ]
        return torch.stack([term for row in terms for term in row]).sum()

    logprobs = batch.packed("logprobs").requires_grad_()
    found = kl_estimate(logprobs, batch.packed("ref"), kind).sum()
    check(found, logprobs, gradient(reference, batch.rows["logprobs"]))


def test_k3_of_far_apart_policies_stays_finite() -> None:
    far = torch.tensor([-500.0, 0.0], dtype=torch.float64)
    expected = [math.expm1(20) - 20, math.expm1(-20) + 20]
    assert kl_estimate(far, far.flip(0), "k3").tolist() == pytest.approx(expected)


def test_what_is_summed_is_masked_whatever_it_weighs() -> None:
    assert weighted_sum(torch.tensor([1.0, 5.0]), torch.tensor([True, False]), torch.ones(2)).item() == 1.0


@given(ragged_batches())
def test_batch_counts(batch: RaggedBatch) -> None:
    expected = token_counts(batch.mask)
    assert tuple(batch_counts(batch.packed_mask, batch.sequence_index).tolist()) == expected
    assert tuple(batch_counts(batch.padded_mask).tolist()) == expected


@given(ragged_batches(), AGGREGATIONS, st.integers(0, 5))
def test_cutting_a_batch_between_sequences_changes_nothing(
    batch: RaggedBatch, aggregation: Aggregation, first_part: int
) -> None:
    mask, index, whole = batch.packed_mask, batch.sequence_index, weights_for(batch, aggregation)
    counts = batch_counts(mask, index)
    cut = sum(batch.lengths[:first_part])
    parts = (slice(0, cut), slice(cut, None))
    assert torch.equal(sum((batch_counts(mask[p], index[p]) for p in parts), torch.zeros(2)), counts)
    pieces = [
        token_weights(
            mask[p],
            index[p],
            aggregation=aggregation,
            num_tokens=float(counts[0]),
            num_sequences=float(counts[1]),
            constant_length=11,
        )
        for p in parts
    ]
    assert torch.equal(torch.cat(pieces), whole)
    weights = torch.tensor(flat_weights(batch), dtype=torch.float64)

    def loss(part: slice) -> float:
        tensors = [batch.packed(name)[part] for name in ("logprobs", "proximal", "advantages")]
        weighing = {"importance_weights": weights[part], "token_weights": whole[part]}
        return float(policy_loss(*tensors, mask[part], clip_low=0.2, clip_high=0.2, **weighing))

    assert loss(parts[0]) + loss(parts[1]) == pytest.approx(loss(slice(None)), abs=1e-12)


@given(ragged_batches())
def test_token_weights_of_rows_equal_those_of_packed_sequences(batch: RaggedBatch) -> None:
    num_tokens, num_sequences = token_counts(batch.mask)
    rows = token_weights(
        batch.padded_mask, aggregation="sequence_mean", num_tokens=num_tokens, num_sequences=num_sequences
    )
    assert torch.equal(rows[batch.padded_mask], weights_for(batch, "sequence_mean")[batch.packed_mask])
    assert float(rows.sum()) == pytest.approx(1)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant"])
def test_a_step_without_tokens_weighs_nothing(aggregation: Aggregation) -> None:
    mask, index = torch.zeros(2, dtype=torch.bool), torch.tensor([0, 1])
    counts = {"num_tokens": 0.0, "num_sequences": 0.0, "constant_length": 1}
    assert token_weights(mask, index, aggregation=aggregation, **counts).tolist() == [0, 0]
    assert batch_counts(mask, index).tolist() == [0, 0]


def test_a_ratio_of_a_sequence_has_no_gradient_of_its_own() -> None:
    leaves = [torch.tensor([-1.0, -2.0], requires_grad=True) for _ in range(2)]
    mask = torch.ones(2, dtype=torch.bool)
    for first, second in (leaves, (leaves[0].detach(), leaves[1]), (leaves[0], leaves[1].detach())):
        assert not sequence_denominator(first, second, mask, torch.tensor([0, 0])).requires_grad


def test_unknown_words_are_refused() -> None:
    mask = torch.ones(2, dtype=torch.bool)
    with pytest.raises(ValueError, match="choose token_mean"):
        token_weights(mask, aggregation="mean", num_tokens=2, num_sequences=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="constant_length is 0"):
        token_weights(mask, aggregation="constant", num_tokens=2, num_sequences=1)
    with pytest.raises(ValueError, match="choose k1, k2 or k3"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")  # type: ignore[arg-type]
