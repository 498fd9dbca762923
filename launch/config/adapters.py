"""What must be true of the model, the machine and the other settings before LoRA may train; asked without torch."""

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
"""Names of weights that the decoder's layers hold, each with its number: neither embedding nor head."""
LONGEST_HEADER_BYTES = 100_000_000
"""As the format has it."""


def embedded_layers(embedded: EmbeddedConfig) -> Layers:
    """The linear layers of the model that is made here; one decoder layer stands for all."""
    hidden, wide = embedded.hidden_size, embedded.intermediate_size
    square = {f"model.layers.0.self_attn.{name}": (hidden, hidden) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    up = {f"model.layers.0.mlp.{name}": (wide, hidden) for name in ("gate_proj", "up_proj")}
    return {**square, **up, "model.layers.0.mlp.down_proj": (hidden, wide)}


def folder_layers(folder: Path) -> Layers:
    """The linear layers of the decoder in a Hugging Face folder, from the headers of its safetensors.

    Raises:
        ValueError: it has none, or one cannot be read.
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
    """The shape of every tensor in a Hugging Face folder, by its name; nothing where it has no safetensors.

    Raises:
        ValueError: one of them cannot be read.
    """
    headers = [_header(path) for path in sorted(folder.glob("*.safetensors"))]
    return {name: entry["shape"] for header in headers for name, entry in header.items() if "shape" in entry}


def check_adapters(lora: LoraConfig, layers: Layers) -> None:
    """Whether the model has the layers that `lora` names, and whether they are larger than its rank.

    Raises:
        ValueError: naming the layer.
    """
    there = sorted({name.rpartition(".")[2] for name in layers})
    for target in lora.target_modules:
        if not any(f".{name}".endswith(f".{target}") for name in layers):
            raise ValueError(
                f"learner.lora.target_modules names {target}, which is no linear layer of the model's decoder; there"
                f" are {', '.join(there)}"
            )
    targets = lora.target_modules or there
    for name, shape in layers.items():
        if lora.rank > min(shape) and any(f".{name}".endswith(f".{target}") for target in targets):
            raise ValueError(
                f"learner.lora.rank={lora.rank} is above {min(shape)}, the smaller side of {name}"
                f" [{shape[0]} x {shape[1]}], so its two matrices could do no more and cost more than the layer; use at"
                f" most {min(shape)}"
            )


def check_together(lora: LoraConfig, *, model_dtype: str, actor_dtype: str) -> None:
    """Whether the other settings suit `lora`.

    Raises:
        ValueError: two settings contradict each other, or something is missing here.
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
    missing = [what for what, is_there in needed.items() if not is_there]
    if lora.base_4bit and missing:
        raise ValueError(
            f"learner.lora.base_4bit=true needs {' and '.join(missing)}; leave it out to hold the frozen weights whole"
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
