"""Finds the run's model: a folder of the user, a model of the Hugging Face hub, or an embedded one that the run makes.

Also replaces the settings that are `auto` in `configs/model/path.yaml`: dtype, context and ZeRO stage.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from actors.tasks.datasets.sources import HUB
from actors.tasks.task import Task, TaskConfig
from buffer.config import read_section
from launch.config.adapters import folder_shapes
from launch.config.devices import has_cuda
from launch.config.settings import EmbeddedConfig, PretrainingConfig
from learner.config import ModelConfig

WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
OTHER_FILES = ("*.json", "*.txt", "*.jinja", "*.model")
"""Configuration and tokenizer of a hub model. Subfolders, with other formats of the weights, are left out."""

AUTO = "auto"
PROMPT_TOKENS = 2048
"""Room for prompts where model.max_tokens is `auto`."""
SHARDED_FROM = 1_000_000_000
"""Parameters from which ranks shard a model: with 16 bytes each, every rank would need more than 16 GB otherwise."""

BASE_MODEL_RECIPE = 1
"""Part of an embedded model's name in the cache. Raise it when the code makes another model from the same settings."""


def read_model(sections: dict[str, Any], max_turns: int) -> EmbeddedConfig | None:
    """Find the model, and replace settings that are `auto` or depend on the model.

    Returns:
        The settings of the embedded model; None for a model of the user.

    Raises:
        ValueError: there is no model, or it cannot be used.
    """
    path = sections["model"].get("path")
    if path == "???" or (not path and not sections.get("embedded")):
        raise ValueError(
            "model.path is missing; give a Hugging Face folder, model.path=FOLDER, or hf:OWNER/NAME, or choose"
            " model=tiny"
        )
    # In a resumed run model.path is the folder of the embedded model. A model that was deleted is made again.
    if not path or (sections.get("embedded") and not (Path(path) / "config.json").is_file()):
        resolve_auto(sections, None, max_turns=max_turns)
        read_section(ModelConfig, {**sections["model"], "path": "(embedded)"}, "model")
        return read_section(EmbeddedConfig, sections["embedded"], "embedded")
    folder = local_folder(str(path))
    check_model_folder(folder)
    sections["model"]["path"] = str(folder)
    resolve_auto(sections, folder, max_turns=max_turns)
    model = read_section(ModelConfig, sections["model"], "model")
    check_context(folder, model.max_tokens)
    return None


def local_folder(path: str) -> Path:
    """The absolute folder of `model.path`. A model of the hub is downloaded, or taken from the hub's cache.

    Args:
        path: a folder, or `hf:OWNER/NAME`, or `hf:OWNER/NAME@REVISION`.

    Raises:
        ValueError: the hub has no such model; or it cannot be reached, and the model is not in the cache.
    """
    if not path.startswith(HUB):
        return Path(path).expanduser().absolute()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    name, _, revision = path.removeprefix(HUB).partition("@")
    try:
        # Some models have both formats. The second one is fetched only if there are no safetensors.
        for weights in WEIGHT_FILES:
            folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=[weights, *OTHER_FILES]))
            if any(folder.glob(weights)):
                break
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"model.path={path} is not in the Hugging Face cache and the hub cannot be reached; download it with a"
            " network, or give a folder"
        ) from error
    # huggingface_hub raises many kinds of errors, for unknown names, private models, bad revisions and full disks.
    except Exception as error:
        said = " ".join((str(error) or type(error).__name__).split())
        raise ValueError(
            f"model.path={path} cannot be fetched from the Hugging Face hub ({said}); check OWNER/NAME and HF_TOKEN, or"
            " give a folder"
        ) from error
    return folder


def resolve_auto(sections: Mapping[str, Any], folder: Path | None, *, max_turns: int) -> None:
    """Replace settings that are `auto` by values that suit the model and this machine.

    Args:
        sections: composed; changed in place.
        folder: of the model; None for an embedded one.
        max_turns: of the task.

    Raises:
        ValueError: the model's configuration cannot be read.
    """
    model, actor, learner = sections["model"], sections["actor"], sections["learner"]
    for section, name in ((model, "dtype"), (actor, "dtype"), (learner, "publish_dtype")):
        if section.get(name) == AUTO:
            # All but the newest CPUs compute bfloat16 many times slower than float32.
            section[name] = "bfloat16" if has_cuda() else "float32"
    if learner.get("zero_stage") == AUTO:
        learner["zero_stage"] = _zero_stage(learner, num_parameters(folder) if folder else 0)
    if model.get("max_tokens") == AUTO and folder:
        longest = max(int(sections["max_new_tokens"]), int(actor.get("evaluation_max_new_tokens") or 0))
        wanted, most = longest * max_turns + PROMPT_TOKENS, longest_context(folder)
        model["max_tokens"] = actor["max_tokens"] = min(wanted, most) if most else wanted


def _zero_stage(learner: Mapping[str, Any], parameters: int) -> int:
    if learner.get("num_ranks", 1) > 1 and parameters >= SHARDED_FROM:
        return 3
    return 1 if learner.get("cpu_offload") else 0


def num_parameters(folder: Path) -> int:
    """Parameters of the model in a Hugging Face folder; estimated from the file sizes without safetensors."""
    shapes = folder_shapes(folder)
    if shapes:
        return sum(math.prod(shape) for shape in shapes.values())
    return sum(path.stat().st_size for path in folder.glob("pytorch_model*.bin")) // 2


def longest_context(folder: Path) -> int:
    """Longest context in which every token can attend to all earlier ones; 0 if config.json does not say."""
    config = _model_config(folder)
    limits = (_context(config), _window(config))
    return min((limit for limit in limits if limit), default=0)


def _context(config: Mapping[str, Any]) -> int:
    context = config.get("max_position_embeddings")
    return context if isinstance(context, int) else 0


def _window(config: Mapping[str, Any]) -> int:
    window = config.get("sliding_window")
    return window if isinstance(window, int) and config.get("use_sliding_window", True) else 0


def check_model_folder(folder: Path) -> None:
    """Check that a Hugging Face folder has configuration, weights and tokenizer.

    Raises:
        ValueError: one is missing, or the configuration cannot be read.
    """
    _model_config(folder)
    for what, patterns in (("weights", WEIGHT_FILES), ("tokenizer", TOKENIZER_FILES)):
        if not any(any(folder.glob(pattern)) for pattern in patterns):
            raise ValueError(
                f"model.path={folder} has no {what}, neither {' nor '.join(patterns)}; give a folder as"
                " save_pretrained leaves it"
            )


def check_context(folder: Path, max_tokens: int) -> None:
    """Check that the model's context is long enough.

    Raises:
        ValueError: `max_tokens` is above the model's context or its sliding window.
    """
    config = _model_config(folder)
    context, window = _context(config), _window(config)
    if context and max_tokens > context:
        raise ValueError(
            f"model.max_tokens={max_tokens} is beyond the context of {context} tokens of the model in {folder};"
            f" set model.max_tokens to at most {context}"
        )
    if window and max_tokens > window:
        raise ValueError(
            f"model.max_tokens={max_tokens} is beyond the sliding window of {window} tokens of the model in {folder},"
            f" while the learner attends to all earlier tokens; set model.max_tokens to at most {window}"
        )


def check_heads(num_heads: int | None, tensor_parallel_size: int) -> None:
    """Check that the workers of an engine can divide a model's attention heads.

    Args:
        num_heads: attention heads of the model; None if its config.json does not say.
        tensor_parallel_size: workers of an engine.

    Raises:
        ValueError: the number of heads is not a multiple of the number of workers.
    """
    if num_heads and num_heads % tensor_parallel_size:
        raise ValueError(
            f"actor.tensor_parallel_size={tensor_parallel_size} does not divide the model's {num_heads} attention"
            " heads; use a number that does"
        )


def model_heads(folder: Path) -> int | None:
    """Number of attention heads of the model in a Hugging Face folder; None if config.json does not say."""
    heads = _model_config(folder).get("num_attention_heads")
    return heads if isinstance(heads, int) else None


def vocabulary_size(folder: Path) -> int:
    """Number of token ids of the model in a Hugging Face folder; 0 if the folder does not say."""
    try:
        config = _model_config(folder)
    except ValueError:
        return 0
    # A model with images keeps the language model's settings in a part of their own.
    parts = (config, config.get("text_config"))
    sizes = [part["vocab_size"] for part in parts if isinstance(part, dict) and isinstance(part.get("vocab_size"), int)]
    return max(sizes, default=0)


def _model_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(
            f"model.path={folder} is not a Hugging Face folder: {path} does not exist; give a folder that has one"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"model.path={folder} is not usable: {path} cannot be read ({error}); restore it") from error
    if not isinstance(config, dict):
        raise ValueError(f"model.path={folder} is not usable: {path} holds no JSON object; restore it")
    return config


def embedded_settings(
    embedded: EmbeddedConfig, pretraining: PretrainingConfig, task: Task, max_tokens: int
) -> dict[str, Any]:
    """Settings for `learner.sft`, which pretrains an embedded model; the paths of its files are added later."""
    return {
        "alphabet": task.alphabet if embedded.tokenizer == "characters" else "",
        "vocabulary": embedded.vocabulary,
        "hidden_size": embedded.hidden_size,
        "num_layers": embedded.num_layers,
        "num_heads": embedded.num_heads,
        "intermediate_size": embedded.intermediate_size,
        "max_tokens": max_tokens,
        "steps": pretraining.steps,
        "batch_size": pretraining.batch_size,
        "learning_rate": pretraining.learning_rate,
        "seed": pretraining.seed,
    }


def embedded_name(settings: Mapping[str, Any], pretraining: PretrainingConfig, task: Task, config: TaskConfig) -> str:
    """The model's folder name in the cache: a hash of everything that determines the model."""
    training = {name: value for name, value in asdict(pretraining).items() if name != "num_threads"}
    recipe = [BASE_MODEL_RECIPE, settings, training, asdict(config), task.fingerprint]
    return f"base-{task.name}-{hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]}"
