from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from learner.batches.prefix_sharing import SharedPrefixes, find_shared_prefix_lengths
from learner.models.attention import QUERIES_PER_BLOCK, packed_attention
from tests.learner.samples import CPU

LONG = 2 * QUERIES_PER_BLOCK + 5
BLOCK = QUERIES_PER_BLOCK
CASES = {
    "nothing in common": ([3, 1, LONG, 7], [0, 0, 0, 0], [0, 0, 0, 0]),
    "a prompt": ([9, 6, 1, 8], [0, 5, 0, 1], [0, 0, 0, 0]),
    "more than a block in common": ([LONG, LONG + 30, LONG + BLOCK], [0, LONG - 9, BLOCK], [0, 0, 0]),
    "one is the beginning of another": ([4, LONG, LONG, 4, 6], [0, 4, LONG, 4, 4], [0, 0, 0, 0, 0]),
    "not all matters": ([9, LONG, LONG], [0, 7, BLOCK + 3], [2, BLOCK, 1]),
}
"""Lengths, tokens shared with the previous sequence, and tokens at the end that no score depends on."""


def shared(lengths: list[int], common: list[int], behind: list[int]) -> SharedPrefixes | None:
    """Made from sequences that each share exactly `common` tokens with the previous one."""
    sequences: list[np.ndarray] = []
    for index, (length, prefix) in enumerate(zip(lengths, common, strict=True)):
        own = 1000 * (index + 1) + np.arange(length - prefix)
        sequences.append(np.concatenate([sequences[-1][:prefix], own]) if prefix else own)
    num_computed = [length - rest for length, rest in zip(lengths, behind, strict=True)]
    return SharedPrefixes.of(lengths, num_computed, find_shared_prefix_lengths(sequences, num_computed), CPU)


def one_by_one(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scaling: float | None) -> Tensor:
    """Attention of [1, heads, N, head_dim] within each sequence, with a query for every token."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    starts = np.cumsum([0, *lengths]).tolist()
    parts = [
        scaled_dot_product_attention(*(x[:, :, start:stop] for x in (query, key, value)), is_causal=True, scale=scaling)
        for start, stop in pairwise(starts)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2)


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize(("key_value_heads", "scaling"), [(4, None), (2, 0.7)])
@pytest.mark.parametrize("by_blocks", [True, False])
def test_packed_attention_has_the_output_and_the_gradient_of_one_sequence_at_a_time(
    case: str, key_value_heads: int, scaling: float | None, by_blocks: bool
):
    lengths, common, behind = CASES[case]
    boundaries, prefixes = np.cumsum([0, *lengths]).tolist(), shared(lengths, common, behind)
    assert (prefixes is not None) == any(common)
    rows = torch.arange(boundaries[-1]) if prefixes is None else prefixes.source
    computed = torch.arange(boundaries[-1]) if prefixes is None else prefixes.computed
    assert len(computed) == boundaries[-1] - sum(common) - sum(behind)
    torch.manual_seed(0)
    # The memory layout of the projections: the heads of a token lie side by side.
    # The kernel for blocks needs values as wide as the keys.
    shapes = [(4, 8), (key_value_heads, 8), (key_value_heads, 8 if by_blocks else 6)]
    inputs = [torch.randn(1, len(computed), *shape).double() for shape in shapes]
    for tensor in inputs:
        tensor.requires_grad_()
    query, key, value = (tensor.transpose(1, 2) for tensor in inputs)
    found, _ = packed_attention(torch.nn.Module(), query, key, value, None, scaling, boundaries, prefixes)
    whole = one_by_one(*(tensor[:, :, rows] for tensor in (query, key, value)), lengths, scaling)[:, computed]
    torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-12)
    direction = torch.randn_like(found)
    expected = torch.autograd.grad(whole, inputs, direction)
    for gradient, right in zip(torch.autograd.grad(found, inputs, direction), expected, strict=True):
        torch.testing.assert_close(gradient, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("length", [9, LONG])
def test_lower_precisions_are_rounded_no_more_than_by_pytorch(length: int):
    torch.manual_seed(0)
    exact = [torch.randn(1, 4, length, 8, dtype=torch.float64) for _ in range(3)]
    right = one_by_one(*exact, [length], None)
    rounded = [tensor.bfloat16() for tensor in exact]
    found, _ = packed_attention(torch.nn.Module(), *rounded, None, None, [0, length])
    theirs = one_by_one(*rounded, [length], None)
    assert found.dtype == torch.bfloat16
    assert (found - right).abs().max() <= 1.5 * (theirs - right).abs().max()
