"""The patched layers against transformers' own."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2RMSNorm, apply_rotary_pos_emb

from learner.models.attention import register_packed_attention
from learner.models.cpu_layers import _Angles, _Attention, _FeedForward, _Norm, _Rotation, patch_for_cpu

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
KINDS = [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config]


def decoder(kind: type[PreTrainedConfig], dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    config = kind(**SIZES, **changes)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=register_packed_attention())
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            # With a weight of ones, or a bias of zeros, the test would not notice that it is left out.
            nn.init.uniform_(parameter, 0.5, 1.5)
    for layer in model.model.layers:
        # Different from a kernel's default.
        layer.self_attn.scaling = 0.3
    return model.model


def states_and_gradients(network: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Hidden states and gradients for two packed sequences."""
    token_ids = torch.arange(3, 26).remainder(50).unsqueeze(0)
    positions = torch.cat([torch.arange(14), torch.arange(9)]).unsqueeze(0)
    states = network(
        input_ids=token_ids, position_ids=positions, boundaries=(0, 14, 23), use_cache=False
    ).last_hidden_state
    network.zero_grad()
    states.backward(torch.linspace(-1, 1, states.numel()).view_as(states).to(states.dtype))
    return states.detach(), {n: p.grad for n, p in network.named_parameters() if p.grad is not None}


def known(network: nn.Module) -> set[str]:
    patched = (_Norm, _Attention, _FeedForward)
    return {type(module).__name__ for module in network.modules() if isinstance(module, patched)}


@pytest.mark.parametrize("kind", KINDS)
def test_layers_compute_what_those_of_transformers_do(kind: type[PreTrainedConfig]):
    network = decoder(kind)
    expected, right = states_and_gradients(network)
    patch_for_cpu(network)
    assert len(known(network)) == 3
    found, gradients = states_and_gradients(network)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == right.keys()
    for name, gradient in gradients.items():
        scale = float(right[name].abs().max())
        torch.testing.assert_close(gradient / scale, right[name] / scale, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_at_other_positions_is_rotated_by_other_angles(kind: type[PreTrainedConfig]):
    network = decoder(kind)
    inputs = {"input_ids": torch.arange(5, 15).unsqueeze(0), "boundaries": (0, 10), "use_cache": False}
    # Attention sees differences of positions alone.
    positions = [torch.arange(10), 2 * torch.arange(10)]
    expected = [network(position_ids=ids.unsqueeze(0), **inputs).last_hidden_state for ids in positions]
    assert not torch.allclose(*expected, atol=1e-3)
    patch_for_cpu(network)
    for ids, right in zip(positions, expected, strict=True):
        found = network(position_ids=ids.unsqueeze(0), **inputs).last_hidden_state
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)


def test_lower_precision_is_rounded_where_transformers_rounds_it():
    network = decoder(Qwen2Config, torch.bfloat16)
    expected, right = states_and_gradients(network)
    patch_for_cpu(network)
    found, gradients = states_and_gradients(network)
    assert torch.equal(found, expected)
    assert all(torch.equal(gradient, right[name]) for name, gradient in gradients.items())


def test_what_is_not_known_is_left_alone():
    # Gemma's norm has another formula.
    network = decoder(GemmaConfig, head_dim=8)
    kinds = [type(module) for module in network.modules()]
    patch_for_cpu(network)
    assert [type(module) for module in network.modules()] == kinds


def test_other_attention_is_left_to_transformers():
    network = decoder(Qwen2Config)
    network.config._attn_implementation = "eager"
    patch_for_cpu(network)
    token_ids = torch.arange(3, 13).unsqueeze(0)
    cached = network(input_ids=token_ids[:, :6], use_cache=True)
    rest = network(input_ids=token_ids[:, 6:], past_key_values=cached.past_key_values).last_hidden_state
    torch.testing.assert_close(rest, network(input_ids=token_ids).last_hidden_state[:, 6:], rtol=1e-5, atol=1e-5)


def test_a_copy_of_a_patched_network_is_patched_and_shares_nothing():
    network = decoder(Qwen2Config)
    patch_for_cpu(network)
    twin = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    states, gradients = states_and_gradients(twin)
    assert known(twin) == known(network)
    assert float(states.abs().max()) > 0 and all(float(gradient.abs().max()) > 0 for gradient in gradients.values())


def test_the_norm_and_its_gradient_are_exact_in_float64():
    norm = Qwen2RMSNorm(6, eps=0.01).double()
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    patch_for_cpu(norm)
    states = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    expected = states / (states.square().mean(-1, keepdim=True) + 0.01).sqrt() * norm.weight
    torch.testing.assert_close(norm(states), expected, rtol=1e-12, atol=1e-12)
    direction = torch.randn_like(expected)
    inputs = [states, norm.weight]
    right = torch.autograd.grad(expected, inputs, direction)
    for gradient, value in zip(torch.autograd.grad(norm(states), inputs, direction), right, strict=True):
        torch.testing.assert_close(gradient, value, rtol=1e-12, atol=1e-12)
    norm.weight.requires_grad_(False)
    torch.testing.assert_close(
        torch.autograd.grad(norm(states), states, direction)[0], right[0], rtol=1e-12, atol=1e-12
    )


def test_the_rotation_and_its_gradient_are_exact_in_float64():
    states = torch.randn(1, 7, 4, 8, dtype=torch.float64, requires_grad=True)
    angles = torch.randn(1, 7, 4, dtype=torch.float64).repeat(1, 1, 2)
    cosines, sines = 0.9 * angles.cos(), 0.9 * angles.sin()
    found = _Rotation.apply(states, *_Angles().spread(cosines, sines, 4))
    expected, _ = apply_rotary_pos_emb(states, states, cosines, sines, unsqueeze_dim=2)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    direction = torch.randn_like(found)
    gradients = [torch.autograd.grad(output, states, direction)[0] for output in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def feed_forward(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    return Qwen2MLP(Qwen2Config(**(SIZES | changes))).double()


def test_the_feed_forward_layer_and_its_gradient_are_exact_in_float64():
    layer = feed_forward()
    states = torch.randn(2, 5, 32, dtype=torch.float64, requires_grad=True)
    inputs = [states, *layer.parameters()]
    expected = layer(states)
    patch_for_cpu(layer)
    found = layer(states)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    direction = torch.randn_like(found)
    right = torch.autograd.grad(expected, inputs, direction)
    for gradient, value in zip(torch.autograd.grad(found, inputs, direction), right, strict=True):
        torch.testing.assert_close(gradient, value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", ["gate_proj", "up_proj", "down_proj"])
def test_a_frozen_weight_gets_no_gradient_and_the_others_theirs(frozen: str):
    layer = feed_forward()
    layer.get_submodule(frozen).weight.requires_grad_(False)
    states = torch.randn(5, 32, dtype=torch.float64)
    layer(states).sum().backward()
    right = {name: parameter.grad for name, parameter in layer.named_parameters()}
    patch_for_cpu(layer)
    layer.zero_grad()
    layer(states).sum().backward()
    for name, parameter in layer.named_parameters():
        assert (parameter.grad is None) == (name == f"{frozen}.weight")
        torch.testing.assert_close(parameter.grad, right[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["gate_proj", "up_proj", "down_proj"])
def test_a_linear_layer_that_is_more_than_its_weight_is_called(name: str):
    layer = feed_forward()
    patch_for_cpu(layer)
    states, calls = torch.randn(5, 32, dtype=torch.float64), []
    layer.get_submodule(name).register_forward_hook(lambda *_: calls.append(1))
    expected = layer(states)
    assert calls == [1]

    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    layer.down_proj.__class__ = Doubled
    torch.testing.assert_close(layer(states), 2 * expected)


def test_another_activation_is_left_to_transformers():
    layer = feed_forward(hidden_act="gelu")
    states = torch.randn(5, 32, dtype=torch.float64)
    expected = layer(states)
    patch_for_cpu(layer)
    assert torch.equal(layer(states), expected)
