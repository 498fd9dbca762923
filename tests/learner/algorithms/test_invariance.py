"""Masked tokens, the order of packing, and the cuts of a batch change neither loss nor gradient."""

import dataclasses
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from learner.algorithms.base import AdvantageInputs, Algorithm, LossInputs
from learner.algorithms.losses import batch_counts
from tests.learner.algorithms.pairs import SENSIBLE, build
from tests.references import RaggedBatch, ragged_batches

PAIRS = st.sampled_from(SENSIBLE)
PENALTY = {"kl": "loss", "kl_coef": 0.1, "entropy_coef": 0.01}
PER_TOKEN = ("logprobs", "entropy", "behavior_logprobs", "advantages", "proximal_logprobs", "ref_logprobs")


def loss_inputs(algorithm: Algorithm, batch: RaggedBatch) -> LossInputs:
    """The whole step as one microbatch, in float32."""
    mask, index = batch.packed_mask, batch.sequence_index
    counts = batch_counts(mask, index).tolist()
    weights = algorithm.token_weights(mask, index, num_tokens=counts[0], num_sequences=counts[1])
    names = ("logprobs", "entropy", "behavior", "advantages", "proximal", "ref")
    tensors = {field: batch.packed(name).float() for field, name in zip(PER_TOKEN, names, strict=True)}
    return LossInputs(**tensors, token_weights=weights.float(), sequence_index=index)


def select(inputs: LossInputs, chosen: Tensor) -> LossInputs:
    """Some of the tokens, in the given order."""
    fields = {field.name: getattr(inputs, field.name) for field in dataclasses.fields(inputs)}
    taken = {name: value[chosen] for name, value in fields.items() if isinstance(value, Tensor)}
    return dataclasses.replace(inputs, **taken)


def differentiated(algorithm: Algorithm, inputs: LossInputs) -> tuple[float, Tensor]:
    """(loss, gradient [N])."""
    leaf = inputs.logprobs.clone().requires_grad_()
    loss = algorithm.loss(dataclasses.replace(inputs, logprobs=leaf)).loss
    return loss.item(), torch.autograd.grad(loss, leaf)[0]


def assert_same(found: tuple[float, Tensor], expected: tuple[float, Tensor]) -> None:
    # Sums of float32 depend on the order. With cancellation the error is relative to the terms, not to the sum.
    scale = max(float(expected[1].abs().sum()), abs(expected[0]), 1e-3)
    assert found[0] == pytest.approx(expected[0], rel=1e-6, abs=1e-6 * scale)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-6, atol=1e-6 * scale)


@given(ragged_batches(), PAIRS)
@settings(max_examples=60)
def test_what_stands_at_masked_tokens_changes_nothing(batch: RaggedBatch, pair: tuple[str, str]) -> None:
    algorithm = build(*pair, **PENALTY)
    inputs, mask = loss_inputs(algorithm, batch), batch.packed_mask
    expected = differentiated(algorithm, inputs)
    assert torch.all(expected[1][~mask] == 0)
    for instead in (math.nan, -50.0):
        changed = {name: torch.where(mask, getattr(inputs, name), instead) for name in PER_TOKEN}
        loss, slope = differentiated(algorithm, dataclasses.replace(inputs, **changed))
        assert loss == expected[0] and torch.equal(slope, expected[1])


@given(ragged_batches(), PAIRS, st.integers(0, 2**32 - 1))
@settings(max_examples=60)
def test_the_order_of_packing_changes_nothing(batch: RaggedBatch, pair: tuple[str, str], seed: int) -> None:
    algorithm = build(*pair, **PENALTY)
    inputs, index = loss_inputs(algorithm, batch), batch.sequence_index
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(batch.lengths), generator=generator).tolist()
    chosen = torch.cat([torch.nonzero(index == i).flatten() for i in order])
    shuffled = dataclasses.replace(select(inputs, chosen), sequence_index=renumbered(index[chosen]))
    expected = differentiated(algorithm, inputs)
    found = differentiated(algorithm, shuffled)
    assert_same((found[0], found[1][chosen.argsort()]), expected)


def renumbered(index: Tensor) -> Tensor:
    """Number the sequences in their order of appearance."""
    return (index.diff(prepend=index[:1]) != 0).cumsum(0)


@given(ragged_batches(), PAIRS, st.sets(st.integers(1, 4)))
@settings(max_examples=60)
def test_cuts_between_sequences_change_nothing(batch: RaggedBatch, pair: tuple[str, str], cuts: set[int]) -> None:
    """The losses of the parts add up and their gradients concatenate. This holds for microbatches and for ranks."""
    algorithm = build(*pair, **PENALTY)
    inputs, index = loss_inputs(algorithm, batch), batch.sequence_index
    bounds = [0, *sorted(cut for cut in cuts if cut < len(batch.lengths)), len(batch.lengths)]
    losses, slopes = [], []
    for start, end in pairwise(bounds):
        loss, slope = differentiated(algorithm, select(inputs, (index >= start) & (index < end)))
        losses.append(loss)
        slopes.append(slope)
    assert_same((math.fsum(losses), torch.cat(slopes)), differentiated(algorithm, inputs))


def advantage_inputs(batch: RaggedBatch, chosen: list[int], **changes: Any) -> AdvantageInputs:
    """The sequences `chosen`, in this order; the sequences 2i and 2i + 1 of the batch are a group."""
    tokens = torch.cat([torch.nonzero(batch.sequence_index == i).flatten() for i in chosen])
    lengths = torch.tensor([batch.lengths[i] for i in chosen])
    groups = [i // 2 for i in chosen]
    return AdvantageInputs(
        rewards=torch.tensor([batch.rows["rewards"][i][0] for i in chosen], dtype=torch.float64),
        group_index=torch.tensor([sorted(set(groups)).index(g) for g in groups]),
        sequence_index=torch.repeat_interleave(lengths),
        values=batch.packed("values")[tokens],
        behavior_logprobs=batch.packed("behavior")[tokens],
        proximal_logprobs=batch.packed("proximal")[tokens],
        **changes,
    )


@given(ragged_batches(), PAIRS, st.integers(0, 3))
@settings(max_examples=60)
def test_advantages_do_not_depend_on_ranks_or_order(batch: RaggedBatch, pair: tuple[str, str], cut: int) -> None:
    algorithm, everything = build(*pair), list(range(len(batch.lengths)))
    whole = torch.split(algorithm.advantages(advantage_inputs(batch, everything)).advantages, list(batch.lengths))
    parts = [part for part in (everything[: 2 * cut], everything[2 * cut :][::-1]) if part]
    sums: list[Tensor] = []
    for part in parts:
        algorithm.advantages(advantage_inputs(batch, part, reduce=lambda tensor: (sums.append(tensor), tensor)[1]))
    total = torch.stack(sums).sum(0) if sums else torch.zeros(0)
    for part in parts:
        found = algorithm.advantages(advantage_inputs(batch, part, reduce=lambda _: total)).advantages
        expected = torch.cat([whole[i] for i in part])
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
