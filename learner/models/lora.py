"""LoRA: low-rank matrices beside frozen linear layers, and the tensors that others make of a network with them.

    y = W x + s B A x,   A [rank, in],   B [out, rank],   s = alpha / rank

`add_adapters` puts peft's layers into a causal model; only A and B train. Others never see them inside the network:
`whole_tensors` has every weight under its Hugging Face name with W + s B A in the place of W, `adapter_tensors` has A
and s B alone. `actors/weights/adapters.py` merges the second to the first by the same formula, to the same bits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from buffer.weights.layout import LORA_A, LORA_B
from learner.config import LoraConfig

ADAPTER = "default"
"""peft's name for the only adapter there is."""


@dataclass(frozen=True, slots=True)
class NamedTensor:
    """A tensor as others know it, and the parameters it is made of."""

    name: str
    parameters: tuple[nn.Parameter, ...]
    value: Callable[[], Tensor]
    """Its value, once all of `parameters` are whole; without a gradient."""


def add_adapters(causal_lm: nn.Module, lora: LoraConfig) -> None:
    """Give the linear layers that `lora` names matrices that train, and freeze everything else. B starts at 0."""
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    targets = lora.target_modules or "all-linear"
    inject_adapter_in_model(PeftConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets), causal_lm, ADAPTER)


def four_bit_base() -> Any:
    """What transformers needs to load a base in four bits: NF4, its scales quantized too, products in bfloat16."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def whole_tensors(network: nn.Module, base: nn.Module | None = None) -> Iterator[NamedTensor]:
    """Every weight of `network` as if it had no adapters: theirs are added to the weights beside them.

    Args:
        network: with or without adapters.
        base: where the frozen weights are taken from; None: from `network` itself, which holds them in full.
    """
    layers = _adapted_layers(network)
    for own_name, parameter in (base or network).named_parameters():
        if ".lora_" in own_name:
            continue
        name = own_name.replace(".base_layer.", ".")
        layer = layers.get(name.removesuffix(".weight"))
        if layer is None or not name.endswith(".weight"):
            yield NamedTensor(name, (parameter,), parameter.detach)
        else:
            pair = _pair(layer)
            yield NamedTensor(name, (parameter, *pair), partial(_merged, layer, parameter))


def adapter_tensors(network: nn.Module) -> Iterator[NamedTensor]:
    """`LAYER.lora_A.weight` and `LAYER.lora_B.weight` in float32, the factor s in B; nothing for a network without."""
    for name, layer in _adapted_layers(network).items():
        down, up = _pair(layer)
        yield NamedTensor(name + LORA_A, (down,), partial(_narrow, layer))
        yield NamedTensor(name + LORA_B, (up,), partial(_scaled, layer))


def save_adapter(tensors: Mapping[str, Tensor], folder: Path, lora: LoraConfig, base: Path) -> None:
    """What `adapter_tensors` names, without a prefix, as a folder that `peft.PeftModel.from_pretrained` loads.

    Its alpha is its rank: the factor is in B already.

    Raises:
        OSError: when the folder cannot be written.
    """
    layers = sorted({name.removesuffix(LORA_A) for name in tensors if name.endswith(LORA_A)})
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": lora.rank,
        "lora_alpha": lora.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": layers,
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(described, indent=1))
    named = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    try:
        save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{folder} cannot be written: {error}") from error


def _adapted_layers(network: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in network.named_modules() if hasattr(module, "base_layer")}


def _pair(layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
    return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight


def _narrow(layer: Any) -> Tensor:
    return _pair(layer)[0].detach().float()


def _scaled(layer: Any) -> Tensor:
    return _pair(layer)[1].detach().float() * float(layer.scaling[ADAPTER])


def _merged(layer: Any, weight: Tensor) -> Tensor:
    """W + s B A, added in float32, in the type of W."""
    weight, up = weight.detach(), _scaled(layer)
    # An adapter that has learned nothing leaves every bit as it is: 0 added to -0 would be 0.
    if not up.any():
        return weight
    return (weight.float() + (up @ _narrow(layer)).to(weight.device)).to(weight.dtype)
