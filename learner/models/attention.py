"""Causal attention within each packed sequence, as an attention function for transformers.

On CUDA in half precision, one variable-length kernel computes all sequences. On a CPU, short sequences are computed as
plain matrix products, and long ones in blocks of queries, which skips most scores that the causal mask hides. Also on a
CPU, the queries of a shared prefix are computed once, only its keys and values are repeated, and all sequences together
are one autograd node.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from learner.batches.prefix_sharing import SharedPrefixes

PACKED_ATTENTION = "slipstream_packed"
QUERIES_PER_BLOCK = 128
"""A smaller block computes fewer masked scores, a larger one needs fewer kernel calls."""


def register_packed_attention() -> str:
    """Make `packed_attention` known to transformers. Returns the name to load a model with."""
    AttentionInterface.register(PACKED_ATTENTION, packed_attention)
    return PACKED_ATTENTION


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    boundaries: Sequence[int] = (),
    shared: SharedPrefixes | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Compute causal attention within each packed sequence; called by transformers' attention layers.

    Args:
        module: the attention layer; unused, part of transformers' signature.
        query: [1, heads, K, head_dim]; `key` and `value` may have fewer heads (grouped-query attention).
        key: [1, key_value_heads, K, head_dim].
        value: [1, key_value_heads, K, head_dim].
        attention_mask: must be None; the boundaries are the mask.
        scaling: factor on the scores; None: 1 / sqrt(head_dim).
        boundaries: [num_sequences + 1] start offset of each sequence, then N.
        shared: the K computed tokens among the N; None: K = N.

    Returns:
        (output [1, K, heads, head_dim], None in place of attention weights).
    """
    if query.device.type == "cpu" and query.shape[-1] == value.shape[-1]:
        ranges = shared.computed_ranges if shared else [range(end - start) for start, end in pairwise(boundaries)]
        ranges = [positions for positions in ranges if positions]
        # Scale the query instead of the scores, which are more numerous.
        query = query * (1 / math.sqrt(query.shape[-1]) if scaling is None else scaling)
        output: Tensor = _SequenceAttention.apply(  # type: ignore[no-untyped-call]
            query, key, value, shared.keys if shared else None, ranges
        )
        return output, None
    if shared is not None:
        query, key, value = (
            _rows(tensor.transpose(1, 2), shared.source).transpose(1, 2) for tensor in (query, key, value)
        )
        whole, _none = packed_attention(module, query, key, value, attention_mask, scaling, boundaries)
        return _rows(whole, shared.computed), None
    grouped = query.shape[1] != key.shape[1]
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        return _varlen_attention(query, key, value, scaling, boundaries, grouped), None
    lengths = [end - start for start, end in pairwise(boundaries)]
    # One split instead of slices: the gradient of a slice is as long as the whole tensor.
    parts = zip(*(torch.split(tensor, lengths, dim=2) for tensor in (query, key, value)), strict=True)
    outputs = [
        scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped).transpose(1, 2)
        for q, k, v in parts
    ]
    return torch.cat(outputs, dim=1), None


def _rows(tensor: Tensor, indices: Tensor) -> Tensor:
    """Return the tokens at `indices` of [1, N, heads, head_dim].

    Indexing whole rows is several times as fast as indexing dim 2.
    """
    return tensor.reshape(tensor.shape[1], -1).index_select(0, indices).view(1, len(indices), *tensor.shape[2:])


class _SequenceAttention(torch.autograd.Function):
    """softmax(query key^T) value of every sequence, by matrix products or in blocks."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, places: Tensor | None, ranges: Sequence[range]
    ) -> Tensor:
        keys, values = (_repeated(tensor[0], places) for tensor in (key, value))
        sizes = [len(positions) for positions in ranges], [positions.stop for positions in ranges]
        outputs, kept = [], []
        for q, k, v in _split(sizes, (query[0],), (keys, values)):
            parts, keep = _method(q, k).forward(q, k, v)
            outputs += parts
            kept.append(keep)
        output = torch.cat(outputs)
        ctx.save_for_backward(query, keys, values, output, places, *kept)
        ctx.sizes, ctx.num_computed = sizes, key.shape[2]
        return output.unsqueeze(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, keys, values, output, places, *kept = ctx.saved_tensors
        grad_queries, grad_keys, grad_values = [], [], []
        of_queries = grad_output[0].transpose(0, 1), output.transpose(0, 1), query[0]
        for keep, tensors in zip(kept, _split(ctx.sizes, of_queries, (keys, values)), strict=True):
            sequence = _Sequence(*tensors)
            grad_query, grad_key, grad_value = _method(sequence.query, sequence.key).backward(sequence, keep)
            grad_queries += grad_query
            grad_keys.append(grad_key.transpose(0, 1))
            grad_values.append(grad_value.transpose(0, 1))
        grad_key, grad_value = (
            _summed(torch.cat(parts), places, ctx.num_computed) for parts in (grad_keys, grad_values)
        )
        gradients = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (torch.cat(grad_queries), grad_key, grad_value))
        return *gradients, None, None


class _Sequence(NamedTuple):
    """The inputs of one sequence's backward pass, [heads, tokens, head_dim] each, in the order of `_split`."""

    grad_output: Tensor
    output: Tensor
    query: Tensor
    key: Tensor
    value: Tensor


def _split(
    sizes: tuple[list[int], list[int]], of_queries: Sequence[Tensor], of_keys: Sequence[Tensor]
) -> Iterable[tuple[Tensor, ...]]:
    """Split tensors [heads, all queries, head_dim] and [heads, all keys, head_dim] into one tuple per sequence.

    Args:
        sizes: number of queries, and of keys, of each sequence.
        of_queries: tensors with a row for every query.
        of_keys: tensors with a row for every key, shared prefixes repeated.
    """
    queries = [torch.split(tensor, sizes[0], 1) for tensor in of_queries]
    keys = [torch.split(tensor, sizes[1], 1) for tensor in of_keys]
    return zip(*queries, *keys, strict=True)


def _method(query: Tensor, key: Tensor) -> type[_Products] | type[_Blocks]:
    """Choose matrix products for a short sequence, blocks for a long one or in half precision."""
    short = key.shape[1] <= QUERIES_PER_BLOCK and query.dtype in (torch.float32, torch.float64)
    return _Products if short else _Blocks


class _Products:
    """The whole sequence at once; keeps the attention weights for the backward pass. Fastest for short sequences."""

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor) -> tuple[list[Tensor], Tensor]:
        """Attend from [heads, n, head_dim] queries to [key_value_heads, m, head_dim] keys and values.

        Returns:
            (the output in parts [tokens, heads, head_dim], what the backward pass needs: the attention weights).
        """
        mask = _repeated_mask(query.shape[1], key.shape[1], query.shape[0] // key.shape[0], query.dtype)
        weights = torch._softmax(torch.baddbmm(mask, _stacked(query, key), key.mT), -1, False)
        return [torch.bmm(weights, value).view(query.shape).transpose(0, 1)], weights

    @staticmethod
    def backward(sequence: _Sequence, weights: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """Compute the gradients of query, key and value.

        Returns:
            (gradient of the query in parts [tokens, heads, head_dim], gradients of key and value in the inputs' shape).
        """
        grad_output, _, query, key, value = sequence
        shape, query, grad_output = query.shape, _stacked(query, key), _stacked(grad_output, key)
        grad_weights = torch.bmm(grad_output, value.mT)
        grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
        grad_query = torch.bmm(grad_scores, key).view(shape).transpose(0, 1)
        return [grad_query], torch.bmm(grad_scores.mT, query), torch.bmm(weights.mT, grad_output)


def _stacked(tensor: Tensor, key: Tensor) -> Tensor:
    """View [heads, n, head_dim] as [key_value_heads, heads / key_value_heads x n, head_dim].

    key_value_heads is the number of heads of `key`.
    """
    return tensor if tensor.shape[0] == key.shape[0] else tensor.reshape(key.shape[0], -1, tensor.shape[2])


class _Blocks:
    """`QUERIES_PER_BLOCK` queries at a time, over the keys up to the last of these queries.

    Uses the CPU kernel of PyTorch's own attention, which keeps no attention weights.
    """

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor) -> tuple[list[Tensor], Tensor]:
        """Attend as in `_Products`; the backward pass needs the log-sum-exp of the scores."""
        outputs, sums = [], []
        for first, size, end in _blocks(query.shape[1], key.shape[1]):
            output, logs = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query.narrow(1, first, size).unsqueeze(0),
                key.narrow(1, 0, end).unsqueeze(0),
                value.narrow(1, 0, end).unsqueeze(0),
                is_causal=size == end,
                attn_mask=_mask(size, end, query.dtype),
                scale=1.0,
            )
            outputs.append(output[0].transpose(0, 1))
            sums.append(logs)
        return outputs, torch.cat(sums, dim=2)

    @staticmethod
    def backward(sequence: _Sequence, sums: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """Compute the gradients as in `_Products`."""
        grad_output, output, query, key, value = sequence
        grad_query, grad_key, grad_value = [], torch.zeros_like(key), torch.zeros_like(value)
        for first, size, end in _blocks(query.shape[1], key.shape[1]):
            grad_part, *grad_others = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad_output.narrow(1, first, size).unsqueeze(0),
                query.narrow(1, first, size).unsqueeze(0),
                key.narrow(1, 0, end).unsqueeze(0),
                value.narrow(1, 0, end).unsqueeze(0),
                output.narrow(1, first, size).unsqueeze(0),
                sums.narrow(2, first, size),
                0.0,
                size == end,
                attn_mask=_mask(size, end, query.dtype),
                scale=1.0,
            )
            grad_query.append(grad_part[0].transpose(0, 1))
            for total, part in zip((grad_key, grad_value), grad_others, strict=True):
                total.narrow(1, 0, end).add_(part[0])
        return grad_query, grad_key, grad_value


def _blocks(num_queries: int, num_keys: int) -> Iterable[tuple[int, int, int]]:
    """Yield (first query, number of queries, number of keys) of each block.

    The queries are the last tokens of the keys.
    """
    for first in range(0, num_queries, QUERIES_PER_BLOCK):
        size = min(QUERIES_PER_BLOCK, num_queries - first)
        yield first, size, num_keys - num_queries + first + size


def _repeated(tensor: Tensor, places: Tensor | None) -> Tensor:
    """Return the rows of [heads, K, head_dim] at `places`: shared prefixes repeated for every sequence."""
    return tensor if places is None else _rows(tensor.transpose(0, 1).unsqueeze(0), places)[0].transpose(0, 1)


def _summed(tensor: Tensor, places: Tensor | None, num_computed: int) -> Tensor:
    """Sum a gradient for every place to [K, heads, head_dim]: the backward pass of `_repeated`, tokens first."""
    if places is None:
        return tensor
    rows = tensor.flatten(1)
    sums = rows.new_zeros(num_computed, rows.shape[1]).index_add_(0, places, rows)
    return sums.view(num_computed, *tensor.shape[1:])


@lru_cache(maxsize=1024)
def _mask(num_queries: int, num_keys: int, dtype: torch.dtype) -> Tensor | None:
    """Return a causal mask [num_queries, num_keys] of 0 and minus infinity, aligned at the last query and key.

    None when there are as many queries as keys: the kernel's own causal mask is then the same.
    """
    return None if num_queries == num_keys else _corner(num_queries, num_keys, dtype)


@lru_cache(maxsize=1024)
def _repeated_mask(num_queries: int, num_keys: int, times: int, dtype: torch.dtype) -> Tensor:
    """Return the mask repeated for the heads of one key-value head, [times x num_queries, num_keys]."""
    mask = _corner(num_queries, num_keys, dtype)
    return mask if times == 1 else mask.repeat(times, 1)


def _corner(num_queries: int, num_keys: int, dtype: torch.dtype) -> Tensor:
    # The mask is cut from cached masks whose sizes are powers of 2. All of these together need twice the memory of the
    # largest.
    return _band(1 << (num_keys - 1).bit_length(), dtype)[-num_queries:, -num_keys:]


@lru_cache
def _band(num_keys: int, dtype: torch.dtype) -> Tensor:
    """Return a mask [QUERIES_PER_BLOCK, num_keys], whose lower right corners are the masks for fewer keys."""
    later = torch.full((QUERIES_PER_BLOCK, num_keys), -math.inf, dtype=dtype)
    return later.triu(num_keys - QUERIES_PER_BLOCK + 1)


def _varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, boundaries: Sequence[int], grouped: bool
) -> Tensor:
    """Compute all sequences in one variable-length flash kernel; CUDA in half precision only."""
    from torch.nn.attention.varlen import varlen_attn

    offsets = torch.tensor(boundaries, dtype=torch.int32, device=query.device)
    longest = max(end - start for start, end in pairwise(boundaries))
    output = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        offsets,
        offsets,
        longest,
        longest,
        scale=scaling,
        window_size=(-1, 0),
        enable_gqa=grouped,
    )
    assert isinstance(output, Tensor)
    return output.unsqueeze(0)
