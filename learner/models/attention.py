"""Causal attention inside each of the packed sequences, as an attention function registered with transformers.

On CUDA in half precision one variable-length kernel takes all sequences. On a CPU a short one is three matrix products,
a long one is cut into blocks of queries, which leaves out scores that the causal mask hides. There, of what sequences
have in common only keys and values are repeated, and all sequences are one node of the gradient's graph.
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
"""Fewer: fewer scores that the mask hides. More: fewer calls of the kernel."""


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
    """Causal attention inside each of the packed sequences.

    Args:
        module: the attention layer; unused, part of transformers' signature.
        query: [1, heads, K, head_dim]; `key` and `value` may have fewer heads (grouped queries).
        key: [1, key_value_heads, K, head_dim].
        value: [1, key_value_heads, K, head_dim].
        attention_mask: must be None; the boundaries are the mask.
        scaling: factor on the scores, 1 / sqrt(head_dim) when None.
        boundaries: [num_sequences + 1] start offsets and N.
        shared: which of the N tokens are the K that are computed; None: all of them are.

    Returns:
        [1, K, heads, head_dim] and no attention weights.
    """
    if query.device.type == "cpu" and query.shape[-1] == value.shape[-1]:
        own = shared.computed_ranges if shared else [range(end - start) for start, end in pairwise(boundaries)]
        own = [asking for asking in own if asking]
        # Once, instead of every score: there are more of them.
        query = query * (1 / math.sqrt(query.shape[-1]) if scaling is None else scaling)
        output: Tensor = _SequenceAttention.apply(  # type: ignore[no-untyped-call]
            query, key, value, shared.keys if shared else None, own
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
    # Split at once: the gradient of a slice is as long as what it was cut from.
    parts = zip(*(torch.split(tensor, lengths, dim=2) for tensor in (query, key, value)), strict=True)
    outputs = [
        scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped).transpose(1, 2)
        for q, k, v in parts
    ]
    return torch.cat(outputs, dim=1), None


def _rows(tensor: Tensor, indices: Tensor) -> Tensor:
    """The tokens of [1, N, heads, head_dim] at `indices`, as whole rows: several times as fast as inside dim 2."""
    return tensor.reshape(tensor.shape[1], -1).index_select(0, indices).view(1, len(indices), *tensor.shape[2:])


class _SequenceAttention(torch.autograd.Function):
    """softmax(query key^T) value of every sequence, by the way that suits its length."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, places: Tensor | None, own: Sequence[range]
    ) -> Tensor:
        keys, values = (_repeated(tensor[0], places) for tensor in (key, value))
        sizes = [len(asking) for asking in own], [asking.stop for asking in own]
        outputs, kept = [], []
        for q, k, v in _split(sizes, (query[0],), (keys, values)):
            parts, keep = _way(q, k).forward(q, k, v)
            outputs += parts
            kept.append(keep)
        output = torch.cat(outputs)
        ctx.save_for_backward(query, keys, values, output, places, *kept)
        ctx.sizes, ctx.num_computed = sizes, key.shape[2]
        return output.unsqueeze(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_output: Tensor) -> tuple[Tensor | None, ...]:
        query, keys, values, output, places, *kept = ctx.saved_tensors
        by_queries, by_keys, by_values = [], [], []
        of_queries = by_output[0].transpose(0, 1), output.transpose(0, 1), query[0]
        for keep, tensors in zip(kept, _split(ctx.sizes, of_queries, (keys, values)), strict=True):
            sequence = _Sequence(*tensors)
            by_query, by_key, by_value = _way(sequence.query, sequence.key).backward(sequence, keep)
            by_queries += by_query
            by_keys.append(by_key.transpose(0, 1))
            by_values.append(by_value.transpose(0, 1))
        by_key, by_value = (_summed(torch.cat(parts), places, ctx.num_computed) for parts in (by_keys, by_values))
        gradients = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (torch.cat(by_queries), by_key, by_value))
        return *gradients, None, None


class _Sequence(NamedTuple):
    """A sequence's part of what a backward pass knows, in the order of `_split`: [heads, tokens, head_dim] each."""

    by_output: Tensor
    output: Tensor
    query: Tensor
    key: Tensor
    value: Tensor


def _split(
    sizes: tuple[list[int], list[int]], of_queries: Sequence[Tensor], of_keys: Sequence[Tensor]
) -> Iterable[tuple[Tensor, ...]]:
    """The parts of every sequence of tensors [heads, K, head_dim] and [heads, of all sequences' keys, head_dim]."""
    queries = [torch.split(tensor, sizes[0], 1) for tensor in of_queries]
    keys = [torch.split(tensor, sizes[1], 1) for tensor in of_keys]
    return zip(*queries, *keys, strict=True)


def _way(query: Tensor, key: Tensor) -> type[_Products] | type[_Blocks]:
    """How a sequence's attention is computed."""
    short = key.shape[1] <= QUERIES_PER_BLOCK and query.dtype in (torch.float32, torch.float64)
    return _Products if short else _Blocks


class _Products:
    """A sequence at once, its weights kept for the backward pass: for a short one fewer products and larger ones."""

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor) -> tuple[list[Tensor], Tensor]:
        """Of [heads, n, head_dim] and [key_value_heads, m, head_dim]: output in parts, tokens first, and weights."""
        mask = _repeated_mask(query.shape[1], key.shape[1], query.shape[0] // key.shape[0], query.dtype)
        weights = torch._softmax(torch.baddbmm(mask, _stacked(query, key), key.mT), -1, False)
        return [torch.bmm(weights, value).view(query.shape).transpose(0, 1)], weights

    @staticmethod
    def backward(sequence: _Sequence, weights: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """Gradients of query, in parts, tokens first, and of key and value as they are."""
        by_output, _, query, key, value = sequence
        shape, query, by_output = query.shape, _stacked(query, key), _stacked(by_output, key)
        by_weights = torch.bmm(by_output, value.mT)
        by_scores = torch._softmax_backward_data(by_weights, weights, -1, weights.dtype)
        by_query = torch.bmm(by_scores, key).view(shape).transpose(0, 1)
        return [by_query], torch.bmm(by_scores.mT, query), torch.bmm(weights.mT, by_output)


def _stacked(tensor: Tensor, key: Tensor) -> Tensor:
    """[heads, n, head_dim] as [key_value_heads, heads / key_value_heads x n, head_dim], by the heads of `key`."""
    return tensor if tensor.shape[0] == key.shape[0] else tensor.reshape(key.shape[0], -1, tensor.shape[2])


class _Blocks:
    """`QUERIES_PER_BLOCK` queries of a sequence at a time, over the keys up to the last of them.

    By the kernel that PyTorch's own attention runs on a CPU, which keeps no weights.
    """

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor) -> tuple[list[Tensor], Tensor]:
        """As that of `_Products`, with the logarithms of the weights' sums."""
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
        """As that of `_Products`."""
        by_output, output, query, key, value = sequence
        by_query, by_key, by_value = [], torch.zeros_like(key), torch.zeros_like(value)
        for first, size, end in _blocks(query.shape[1], key.shape[1]):
            by_part, *by_others = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                by_output.narrow(1, first, size).unsqueeze(0),
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
            by_query.append(by_part[0].transpose(0, 1))
            for total, part in zip((by_key, by_value), by_others, strict=True):
                total.narrow(1, 0, end).add_(part[0])
        return by_query, by_key, by_value


def _blocks(num_queries: int, num_keys: int) -> Iterable[tuple[int, int, int]]:
    """(first query, number of queries, number of keys) of each block of a sequence whose last tokens ask."""
    for first in range(0, num_queries, QUERIES_PER_BLOCK):
        size = min(QUERIES_PER_BLOCK, num_queries - first)
        yield first, size, num_keys - num_queries + first + size


def _repeated(tensor: Tensor, places: Tensor | None) -> Tensor:
    """[heads, places, head_dim] of [heads, K, head_dim]."""
    return tensor if places is None else _rows(tensor.transpose(0, 1).unsqueeze(0), places)[0].transpose(0, 1)


def _summed(tensor: Tensor, places: Tensor | None, num_computed: int) -> Tensor:
    """The gradient [K, heads, head_dim] of what `_repeated` took from that of its result, tokens first."""
    if places is None:
        return tensor
    rows = tensor.flatten(1)
    sums = rows.new_zeros(num_computed, rows.shape[1]).index_add_(0, places, rows)
    return sums.view(num_computed, *tensor.shape[1:])


@lru_cache(maxsize=1024)
def _mask(num_queries: int, num_keys: int, dtype: torch.dtype) -> Tensor | None:
    """[num_queries, num_keys] 0 and minus infinity, aligned at the last of both.

    None for as many queries as keys: the kernel's own causal mask aligns the first ones.
    """
    return None if num_queries == num_keys else _corner(num_queries, num_keys, dtype)


@lru_cache(maxsize=1024)
def _repeated_mask(num_queries: int, num_keys: int, times: int, dtype: torch.dtype) -> Tensor:
    """[times x num_queries, num_keys]: of that many queries one after another."""
    mask = _corner(num_queries, num_keys, dtype)
    return mask if times == 1 else mask.repeat(times, 1)


def _corner(num_queries: int, num_keys: int, dtype: torch.dtype) -> Tensor:
    # In few sizes, of which all together are twice the longest: they are kept.
    return _band(1 << (num_keys - 1).bit_length(), dtype)[-num_queries:, -num_keys:]


@lru_cache
def _band(num_keys: int, dtype: torch.dtype) -> Tensor:
    """[QUERIES_PER_BLOCK, num_keys]: every mask of at most so many keys is its lower right corner."""
    later = torch.full((QUERIES_PER_BLOCK, num_keys), -math.inf, dtype=dtype)
    return later.triu(num_keys - QUERIES_PER_BLOCK + 1)


def _varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, boundaries: Sequence[int], grouped: bool
) -> Tensor:
    """The same through one variable-length flash kernel; CUDA in half precision only."""
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
