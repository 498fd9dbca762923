"""Checks that model, machine and settings allow training with LoRA. Does not import torch."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path

from launch.config.devices import has_cuda
from launch.config.settings import EmbeddedConfig
from learner.config import LoraConfig

Layers = dict[str, tuple[int, int]]
"""Shapes [out, in] of linear layers by their names."""
IN_A_LAYER = re.compile(r"\.\d+\..*\.weight$")
"""Matches weights of numbered decoder layers, but neither embedding nor head."""
LONGEST_HEADER_BYTES = 100_000_000
"""Limit of the safetensors format."""


def embedded_layers(embedded: EmbeddedConfig) -> Layers:
    """The linear layers of an embedded model; those of its first decoder layer stand for all."""
    hidden, wide = embedded.hidden_size, embedded.intermediate_size
    square = {f"model.layers.0.self_attn.{name}": (hidden, hidden) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    up = {f"model.layers.0.mlp.{name}": (wide, hidden) for name in ("gate_proj", "up_proj")}
    return {**square, **up, "model.layers.0.mlp.down_proj": (hidden, wide)}


def folder_layers(folder: Path) -> Layers:
    """The linear layers of the decoder in a Hugging Face folder, from the headers of its safetensors files.

    Raises:
        ValueError: there is no such file, or one cannot be read.
    """
    shapes = folder_shapes(folder)
    if not shapes:
        raise ValueError(
            f"model.path={folder} has no *.safetensors, from which learner.lora reads the frozen weights; save it again"
            " with save_pretrained"
        )
    return {
        name.removesuffix(".weight"): (shape[0], shape[1])
        for name, shape in shapes.items()
        if IN_A_LAYER.search(name) and len(shape) == 2
    }


def folder_shapes(folder: Path) -> dict[str, list[int]]:
    """The shape of every tensor in a Hugging Face folder by name; empty if the folder has no safetensors file.

    Raises:
        ValueError: a file cannot be read.
    """
    headers = [_header(path) for path in sorted(folder.glob("*.safetensors"))]
    return {name: entry["shape"] for header in headers for name, entry in header.items() if "shape" in entry}


def check_lora_layers(lora: LoraConfig, layers: Layers) -> None:
    """Check that the model has the target layers and that none is smaller than the rank.

    Raises:
        ValueError: one sentence that names the layer.
    """
    present = sorted({name.rpartition(".")[2] for name in layers})
    for target in lora.target_modules:
        if not any(f".{name}".endswith(f".{target}") for name in layers):
            raise ValueError(
                f"learner.lora.target_modules names {target}, which is no linear layer of the model's decoder; it"
                f" has {', '.join(present)}"
            )
    targets = lora.target_modules or present
    for name, shape in layers.items():
        if lora.rank > min(shape) and any(f".{name}".endswith(f".{target}") for target in targets):
            raise ValueError(
                f"learner.lora.rank={lora.rank} is above {min(shape)}, the smaller side of {name}"
                f" [{shape[0]} x {shape[1]}], so an adapter would only cost more than the layer itself; use at most"
                f" {min(shape)}"
            )


def check_lora_settings(lora: LoraConfig, *, model_dtype: str, actor_dtype: str) -> None:
    """Check `lora` against the dtypes and this machine.

    Raises:
        ValueError: two settings contradict each other, or something that 4-bit weights need is missing.
    """
    if lora.publishes_adapters and model_dtype != actor_dtype:
        raise ValueError(
            f"learner.lora.publish=adapter is merged by the actors in actor.dtype={actor_dtype}, but the learner holds"
            f" the same weights in model.dtype={model_dtype}; set the two equal, or learner.lora.publish=merged"
        )
    needed = {
        "model.dtype=bfloat16": model_dtype == "bfloat16",
        "a CUDA device": has_cuda(),
        "the package bitsandbytes (the extra qlora)": find_spec("bitsandbytes") is not None,
    }
    missing = [what for what, is_present in needed.items() if not is_present]
    if lora.base_4bit and missing:
        raise ValueError(
            f"learner.lora.base_4bit=true needs {' and '.join(missing)}; leave it out to keep the frozen weights in"
            " model.dtype"
        )


def _header(path: Path) -> dict[str, dict[str, list[int]]]:
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > LONGEST_HEADER_BYTES:
                raise ValueError("it is no safetensors file")
            header: dict[str, dict[str, list[int]]] = json.loads(file.read(size))
    except (OSError, ValueError) as error:
        raise ValueError(f"model.path={path.parent} is not usable: {path.name} cannot be read ({error})") from error
    return header
