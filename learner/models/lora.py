"""LoRA: low-rank matrices beside frozen linear layers, and the tensors that are published and saved.

    y = W x + s B A x,   A [rank, in],   B [out, rank],   s = alpha / rank

`add_adapters` puts peft's layers into a causal model, where only A and B are trained. `whole_tensors` returns every
weight under its Hugging Face name, with W + s B A in the place of W. `adapter_tensors` returns only A and s B.
`actors/weights/adapters.py` merges those into whole weights by the same formula, to the same bits.
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
"""peft's name for the only adapter."""


@dataclass(frozen=True, slots=True)
class NamedTensor:
    """A tensor to publish or save, and the parameters that it is computed from."""

    name: str
    parameters: tuple[nn.Parameter, ...]
    value: Callable[[], Tensor]
    """Computes the tensor, without a gradient. Needs all of `parameters` gathered."""


def add_adapters(causal_lm: nn.Module, lora: LoraConfig) -> None:
    """Add A and B to the linear layers named by `lora`, and freeze all other parameters. B starts at 0."""
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    targets = lora.target_modules or "all-linear"
    inject_adapter_in_model(PeftConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets), causal_lm, ADAPTER)


def four_bit_base() -> Any:
    """Return transformers' settings for a base model in four bits: NF4, quantized scales, products in bfloat16."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def whole_tensors(network: nn.Module, base: nn.Module | None = None) -> Iterator[NamedTensor]:
    """Yield every weight of `network`, with adapters merged into the weights beside them.

    Args:
        network: with or without adapters.
        base: the source of the frozen weights; None: `network` itself, which must hold them in full precision.
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
    """Yield `LAYER.lora_A.weight` and `LAYER.lora_B.weight` in float32, with s multiplied into B.

    Yields nothing without adapters.
    """
    for name, layer in _adapted_layers(network).items():
        down, up = _pair(layer)
        yield NamedTensor(name + LORA_A, (down,), partial(_narrow, layer))
        yield NamedTensor(name + LORA_B, (up,), partial(_scaled, layer))


def save_adapter(tensors: Mapping[str, Tensor], folder: Path, lora: LoraConfig, base: Path) -> None:
    """Write adapters as a folder that `peft.PeftModel.from_pretrained` loads.

    The saved alpha equals the rank, because s is already in B.

    Args:
        tensors: from `adapter_tensors`, by their names there.
        folder: is created.
        lora: settings of the adapters.
        base: the base model, for the saved settings.

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
    """Return W + s B A, added in float32, in the dtype of W."""
    weight, up = weight.detach(), _scaled(layer)
    # While B is 0 every bit of W must stay: adding 0 would turn -0 into 0.
    if not up.any():
        return weight
    return (weight.float() + (up @ _narrow(layer)).to(weight.device)).to(weight.dtype)
