"""Causal attention inside each of the packed sequences, as an attention function registered with transformers.

On CUDA in half precision one variable-length kernel takes all sequences. On a CPU each is cut into blocks of queries:
scores that the causal mask hides are left out, of what sequences have in common only keys and values are repeated, and
all blocks are one node of the gradient's graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from learner.prefixes import SharedPrefixes

PACKED_ATTENTION = "slipstream_packed"
QUERIES_PER_BLOCK = 128
"""Fewer: fewer scores that the mask hides. More: fewer calls of the kernel."""


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
        own = shared.own if shared else [range(end - start) for start, end in pairwise(boundaries)]
        output: Tensor = _BlockAttention.apply(  # type: ignore[no-untyped-call]
            query, key, value, shared.source if shared else None, _blocks(boundaries, own), scaling
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


@dataclass(frozen=True, slots=True)
class _Block:
    """Queries of one sequence that stand side by side; all blocks together are the axis K, in order."""

    first_query: int
    """On K."""
    num_queries: int
    first_key: int
    """On N: the first token of the sequence."""
    num_keys: int
    """Up to the last query's own."""

    def queries_of(self, tensor: Tensor) -> Tensor:
        """[1, heads, num_queries, head_dim] of [1, heads, K, head_dim]."""
        return tensor.narrow(2, self.first_query, self.num_queries)

    def keys_of(self, tensor: Tensor) -> Tensor:
        """[1, heads, num_keys, head_dim] of [1, heads, N, head_dim]."""
        return tensor.narrow(2, self.first_key, self.num_keys)


def _blocks(boundaries: Sequence[int], own: Sequence[range]) -> list[_Block]:
    """Those of all sequences, of which the tokens `own` ask."""
    blocks, asked = [], 0
    for start, asking in zip(boundaries[:-1], own, strict=True):
        for first in asking[::QUERIES_PER_BLOCK]:
            end = min(first + QUERIES_PER_BLOCK, asking.stop)
            blocks.append(_Block(asked, end - first, start, end))
            asked += end - first
    return blocks


class _BlockAttention(torch.autograd.Function):
    """softmax(scaling query key^T) value of every block, by the kernel that PyTorch's own attention runs on a CPU."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        source: Tensor | None,
        blocks: list[_Block],
        scaling: float | None,
    ) -> Tensor:
        keys, values = (_repeated(tensor, source) for tensor in (key, value))
        parts, sums = [], []
        for block in blocks:
            part, logs = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                block.queries_of(query),
                block.keys_of(keys),
                block.keys_of(values),
                is_causal=block.num_keys == block.num_queries,
                attn_mask=_mask(block.num_queries, block.num_keys, query.dtype),
                scale=scaling,
            )
            parts.append(part.transpose(1, 2))
            sums.append(logs)
        output = torch.cat(parts, dim=1)
        ctx.save_for_backward(query, keys, values, output, source, *sums)
        ctx.blocks, ctx.scaling, ctx.num_computed = blocks, scaling, key.shape[2]
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_output: Tensor) -> tuple[Tensor | None, ...]:
        query, keys, values, output, source, *sums = ctx.saved_tensors
        by_output, output = by_output.transpose(1, 2), output.transpose(1, 2)
        by_keys, by_values, parts = torch.zeros_like(keys), torch.zeros_like(values), []
        for block, logs in zip(ctx.blocks, sums, strict=True):
            by_part, by_key, by_value = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                block.queries_of(by_output),
                block.queries_of(query),
                block.keys_of(keys),
                block.keys_of(values),
                block.queries_of(output),
                logs,
                0.0,
                block.num_keys == block.num_queries,
                attn_mask=_mask(block.num_queries, block.num_keys, query.dtype),
                scale=ctx.scaling,
            )
            parts.append(by_part.transpose(1, 2))
            block.keys_of(by_keys).add_(by_key)
            block.keys_of(by_values).add_(by_value)
        by_query = torch.cat(parts, dim=1).transpose(1, 2)
        by_key, by_value = (_summed(tensor, source, ctx.num_computed) for tensor in (by_keys, by_values))
        return by_query, by_key, by_value, None, None, None


def _repeated(tensor: Tensor, source: Tensor | None) -> Tensor:
    """[1, heads, N, head_dim] of [1, heads, K, head_dim]."""
    return tensor if source is None else _rows(tensor.transpose(1, 2), source).transpose(1, 2)


def _summed(tensor: Tensor, source: Tensor | None, num_computed: int) -> Tensor:
    """The gradient of what `_repeated` took from that of what it made."""
    if source is None:
        return tensor
    rows = tensor.transpose(1, 2).reshape(tensor.shape[2], -1)
    sums = rows.new_zeros(num_computed, rows.shape[1]).index_add_(0, source, rows)
    return sums.view(1, num_computed, tensor.shape[1], -1).transpose(1, 2)


@lru_cache(maxsize=1024)
def _mask(num_queries: int, num_keys: int, dtype: torch.dtype) -> Tensor | None:
    """[num_queries, num_keys] 0 and minus infinity, aligned at the last of both.

    None for as many queries as keys: the kernel's own causal mask aligns the first ones.
    """
    if num_queries == num_keys:
        return None
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


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
