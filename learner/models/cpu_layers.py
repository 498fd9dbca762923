"""Norms, attention and feed-forward layers of transformers' decoders, in fewer passes over memory on a CPU.

`patch_for_cpu` gives the modules that it knows a subclass which computes the same in float32 and float64 on a CPU.
Whatever else they are called with goes the way transformers has it, and modules that it does not know are left alone. A
module's weights are read in its own passes only: they may be sharded, frozen, or have adapters beside them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, silu

from learner.models.attention import PACKED_ATTENTION, packed_attention

NORMS = {"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"}
ATTENTIONS = {"LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention"}
FEED_FORWARDS = {"LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP"}
"""Classes of transformers, by name."""


def patch_for_cpu(network: nn.Module) -> None:
    """Let the modules of `network` that are known compute in fewer passes, in place."""
    angles = _Angles()
    for module in network.modules():
        kind = type(module)
        if not kind.__module__.startswith("transformers.models."):
            continue
        if kind.__name__ in NORMS:
            module.__class__ = type(kind.__name__, (_Norm, kind), {})
        elif kind.__name__ in ATTENTIONS:
            module.__class__ = type(kind.__name__, (_Attention, kind), {"angles": angles})
        elif kind.__name__ in FEED_FORWARDS:
            module.__class__ = type(kind.__name__, (_FeedForward, kind), {})


def _is_hastened(states: Tensor) -> bool:
    """Lower precisions are rounded where transformers rounds them; what is best on CUDA has not to be best here."""
    return states.device.type == "cpu" and states.dtype in (torch.float32, torch.float64)


class _Norm(nn.Module):
    """x / sqrt(mean x^2 + epsilon) times the weight."""

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """As the class it is mixed into."""
        if not _is_hastened(hidden_states) or hidden_states.dtype != self.weight.dtype:
            states: Tensor = super().forward(hidden_states)
            return states
        normed: Tensor = _RootMeanSquareNorm.apply(  # type: ignore[no-untyped-call]
            hidden_states, self.weight, self.variance_epsilon
        )
        return normed


class _RootMeanSquareNorm(torch.autograd.Function):
    """y = w n of n = x r, r = 1 / sqrt(mean x^2 + epsilon), over the last dimension.

    d x = r (w d y - n mean(w d y n)) and d w = sum(d y n).
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        norms: Tensor = torch.linalg.vector_norm(states, dim=-1, keepdim=True)
        factors = norms.square_().div_(states.shape[-1]).add_(epsilon).rsqrt_()
        # A parameter is referred to and not saved: under ZeRO-3 its storage comes and goes between the two passes.
        ctx.weight = weight
        ctx.save_for_backward(states, factors)
        return (states * factors).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_output: Tensor) -> tuple[Tensor | None, ...]:
        states, factors = ctx.saved_tensors
        weight = ctx.weight
        normed = states * factors
        products = by_output * normed
        by_weight = products.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        means = torch.matmul(products, weight).div_(-weight.numel()).unsqueeze(-1)
        by_states = torch.mul(by_output, weight, out=products).addcmul_(normed, means).mul_(factors)
        return by_states, by_weight, None


class _Angles:
    """The cosines and sines of one pass, laid out once for all layers; they are kept until the next pass."""

    def __init__(self) -> None:
        self._made_of: Tensor | None = None
        self._spread: tuple[Tensor, Tensor]

    def spread(self, cosines: Tensor, sines: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
        """[1, K, num_heads, head_dim] cosines and [1, K, num_heads, head_dim / 2] sines of [1, K, head_dim] both."""
        if self._made_of is not cosines:
            half = sines[..., : sines.shape[-1] // 2]
            # Repeated in memory: reading rows as long as all heads is twice as fast as each head by itself.
            cosines_of_all, sines_of_all = (
                angles.unsqueeze(2).expand(-1, -1, num_heads, -1).contiguous() for angles in (cosines, half)
            )
            self._made_of, self._spread = cosines, (cosines_of_all, sines_of_all)
        return self._spread


class _Rotation(torch.autograd.Function):
    """(x, y) -> (x cos - y sin, y cos + x sin) of the two halves (x, y) of the last dimension."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        ctx.save_for_backward(cosines, sines)
        return _rotated(states, cosines, sines, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_output: Tensor) -> tuple[Tensor, None, None]:
        cosines, sines = ctx.saved_tensors
        return _rotated(by_output, cosines, sines, -1), None, None


def _rotated(states: Tensor, cosines: Tensor, sines: Tensor, direction: int) -> Tensor:
    first, second = states.chunk(2, dim=-1)
    rotated = states * cosines
    to_first, to_second = rotated.chunk(2, dim=-1)
    to_first.addcmul_(second, sines, value=-direction)
    to_second.addcmul_(first, sines, value=direction)
    return rotated


class _Attention(nn.Module):
    """Projections, rotation of queries and keys, attention, projection; each head's norm before rotation, if any."""

    angles: _Angles
    config: Any
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module
    head_dim: int
    scaling: float

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **named: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As the class it is mixed into."""
        packed = self.config._attn_implementation == PACKED_ATTENTION and past_key_values is None
        if not packed or not _is_hastened(hidden_states):
            outputs: tuple[Tensor, Tensor | None] = super().forward(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **named,
            )
            return outputs
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            projection(hidden_states).view(shape) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if hasattr(self, "q_norm"):
            query, key = self.q_norm(query), self.k_norm(key)
        cosines, sines = self.angles.spread(*position_embeddings, query.shape[2])
        query, key = (
            _Rotation.apply(  # type: ignore[no-untyped-call]
                states, cosines[:, :, : states.shape[2]], sines[:, :, : states.shape[2]]
            )
            for states in (query, key)
        )
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))
        output, _none = packed_attention(self, query, key, value, attention_mask, self.scaling, **named)
        return self.o_proj(output.flatten(2)), None


class _FeedForward(nn.Module):
    """down(silu(gate(x)) up(x)) of three linear layers."""

    config: Any
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """As the class it is mixed into."""
        layers = self.gate_proj, self.up_proj, self.down_proj
        if not _is_hastened(x) or self.config.hidden_act != "silu" or not all(_is_plain(layer, x) for layer in layers):
            states: Tensor = super().forward(x)
            return states
        computed: Tensor = _GatedProducts.apply(x, *(layer.weight for layer in layers))  # type: ignore[no-untyped-call]
        return computed


def _is_plain(layer: nn.Module, states: Tensor) -> bool:
    """Whether a layer is its weight and nothing else: no adapter, no shard that a hook brings, nobody who watches."""
    hooks = layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks
    return type(layer) is nn.Linear and layer.bias is None and layer.weight.dtype == states.dtype and not any(hooks)


class _GatedProducts(torch.autograd.Function):
    """y = (silu(g) u) D^T of g = x G^T and u = x U^T, of which g and u alone are kept.

    With a = d y D: d u = silu(g) a, d g = silu'(g) u a, d x = d g G + d u U.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        gates, ups = linear(states, gate), linear(states, up)
        ctx.save_for_backward(states, gates, ups, gate, up, down)
        return linear(silu(gates).mul_(ups), down)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_output: Tensor) -> tuple[Tensor | None, ...]:
        states, gates, ups, gate, up, down = ctx.saved_tensors
        rows, gates, ups, by_rows = (tensor.flatten(0, -2) for tensor in (states, gates, ups, by_output))
        _, for_gate, for_up, for_down = ctx.needs_input_grad
        opened = silu(gates)
        by_down = by_rows.T @ (opened * ups) if for_down else None
        by_product = by_rows @ down
        by_ups = opened.mul_(by_product)
        by_gates = torch.ops.aten.silu_backward(by_product.mul_(ups), gates)
        by_states = (by_gates @ gate).addmm_(by_ups, up).view_as(states)
        by_gate, by_up = by_gates.T @ rows if for_gate else None, by_ups.T @ rows if for_up else None
        return by_states, by_gate, by_up, by_down
