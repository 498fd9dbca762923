"""Norms, attention and feed-forward layers of transformers' decoders, with fewer passes over memory on a CPU.

`patch_for_cpu` replaces the class of each known module by a subclass that computes the same function. The subclass
handles float32 and float64 on a CPU, and leaves every other input to transformers. Unknown modules stay as they are. A
module's weights are read only inside its forward and backward pass, so they may be sharded, frozen or have adapters.
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
    """Replace the classes of the known modules in `network`, in place."""
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


def _is_supported(states: Tensor) -> bool:
    """Return whether the subclasses compute `states`: float32 or float64 on a CPU.

    Lower precisions must be rounded where transformers rounds them, and what is fast on CUDA may be slow on a CPU.
    """
    return states.device.type == "cpu" and states.dtype in (torch.float32, torch.float64)


class _Norm(nn.Module):
    """x / sqrt(mean x^2 + epsilon) times the weight."""

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Compute what the class that this one is mixed into computes."""
        if not _is_supported(hidden_states) or hidden_states.dtype != self.weight.dtype:
            states: Tensor = super().forward(hidden_states)
            return states
        normed: Tensor = _RootMeanSquareNorm.apply(  # type: ignore[no-untyped-call]
            hidden_states, self.weight, self.variance_epsilon
        )
        return normed


class _RootMeanSquareNorm(torch.autograd.Function):
    """y = w n with n = x r and r = 1 / sqrt(mean x^2 + epsilon), over the last dimension.

    d x = r (w d y - n mean(w d y n)) and d w = sum(d y n).
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        norms: Tensor = torch.linalg.vector_norm(states, dim=-1, keepdim=True)
        factors = norms.square_().div_(states.shape[-1]).add_(epsilon).rsqrt_()
        # Keep a reference instead of a saved tensor: ZeRO-3 frees the storage of the parameter between the two passes.
        ctx.weight = weight
        ctx.save_for_backward(states, factors)
        return (states * factors).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        states, factors = ctx.saved_tensors
        weight = ctx.weight
        normed = states * factors
        products = grad_output * normed
        grad_weight = products.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        means = torch.matmul(products, weight).div_(-weight.numel()).unsqueeze(-1)
        grad_states = torch.mul(grad_output, weight, out=products).addcmul_(normed, means).mul_(factors)
        return grad_states, grad_weight, None


class _Angles:
    """The cosines and sines of one forward pass, expanded once for all layers and kept until the next pass."""

    def __init__(self) -> None:
        self._made_of: Tensor | None = None
        self._spread: tuple[Tensor, Tensor]

    def spread(self, cosines: Tensor, sines: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
        """Repeat cosines and sines for every head.

        Args:
            cosines, sines: [1, K, head_dim].
            num_heads: of the queries.

        Returns:
            cosines [1, K, num_heads, head_dim] and sines [1, K, num_heads, head_dim / 2].
        """
        if self._made_of is not cosines:
            half = sines[..., : sines.shape[-1] // 2]
            # Repeat in memory: reading the row of all heads at once is twice as fast as reading each head.
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
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        cosines, sines = ctx.saved_tensors
        return _rotated(grad_output, cosines, sines, -1), None, None


def _rotated(states: Tensor, cosines: Tensor, sines: Tensor, direction: int) -> Tensor:
    first, second = states.chunk(2, dim=-1)
    rotated = states * cosines
    to_first, to_second = rotated.chunk(2, dim=-1)
    to_first.addcmul_(second, sines, value=-direction)
    to_second.addcmul_(first, sines, value=direction)
    return rotated


class _Attention(nn.Module):
    """Projections, norms of queries and keys if the model has them, rotation, attention, output projection."""

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
        """Compute what the class that this one is mixed into computes."""
        packed = self.config._attn_implementation == PACKED_ATTENTION and past_key_values is None
        if not packed or not _is_supported(hidden_states):
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
    """down(silu(gate(x)) up(x)) with three linear layers."""

    config: Any
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """Compute what the class that this one is mixed into computes."""
        layers = self.gate_proj, self.up_proj, self.down_proj
        if not _is_supported(x) or self.config.hidden_act != "silu" or not all(_is_plain(layer, x) for layer in layers):
            states: Tensor = super().forward(x)
            return states
        computed: Tensor = _GatedProducts.apply(x, *(layer.weight for layer in layers))  # type: ignore[no-untyped-call]
        return computed


def _is_plain(layer: nn.Module, states: Tensor) -> bool:
    """Return whether a layer only multiplies by its weight: no adapter, no bias, no hooks, such as those of shards."""
    hooks = layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks
    return type(layer) is nn.Linear and layer.bias is None and layer.weight.dtype == states.dtype and not any(hooks)


class _GatedProducts(torch.autograd.Function):
    """y = (silu(g) u) D^T with g = x G^T and u = x U^T. Besides the input only g and u are kept.

    With a = d y D: d u = silu(g) a, d g = silu'(g) u a, d x = d g G + d u U.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        gates, ups = linear(states, gate), linear(states, up)
        ctx.save_for_backward(states, gates, ups, gate, up, down)
        return linear(silu(gates).mul_(ups), down)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        states, gates, ups, gate, up, down = ctx.saved_tensors
        rows, gates, ups, grad_rows = (tensor.flatten(0, -2) for tensor in (states, gates, ups, grad_output))
        _, for_gate, for_up, for_down = ctx.needs_input_grad
        opened = silu(gates)
        grad_down = grad_rows.T @ (opened * ups) if for_down else None
        grad_product = grad_rows @ down
        grad_ups = opened.mul_(grad_product)
        grad_gates = torch.ops.aten.silu_backward(grad_product.mul_(ups), gates)
        grad_states = (grad_gates @ gate).addmm_(grad_ups, up).view_as(states)
        grad_gate, grad_up = grad_gates.T @ rows if for_gate else None, grad_ups.T @ rows if for_up else None
        return grad_states, grad_gate, grad_up, grad_down
