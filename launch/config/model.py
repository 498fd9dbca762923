"""The run's model: a folder of the user's, one of the Hugging Face hub, or a small one that is made here.

What `configs/model/path.yaml` leaves to the model is settled here: number format, context and ZeRO stage.
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
from launch.config.adapters import folder_shapes
from launch.config.devices import has_cuda
from launch.config.settings import EmbeddedConfig, PretrainingConfig

WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
OTHER_FILES = ("*.json", "*.txt", "*.jinja", "*.model")
"""Configuration and tokenizer of a model of the hub; folders in it hold other formats of the same weights."""

AUTO = "auto"
PROMPT_TOKENS = 2048
"""Room for prompts in a context that is chosen here."""
SHARDED_FROM = 1_000_000_000
"""Parameters from which several ranks share a model: its 16 bytes for each are then more than 16 GB on every rank."""

BASE_MODEL_RECIPE = 1
"""Part of an embedded model's key: raised when the same settings would make another model."""


def local_folder(path: str) -> Path:
    """The absolute folder of `model.path`; a model of the hub is fetched, or found in the hub's cache.

    Args:
        path: a folder, or `hf:OWNER/NAME` with `@REVISION` where another than the newest is wanted.

    Raises:
        ValueError: the hub has no such model, or cannot be reached and the cache does not hold it.
    """
    if not path.startswith(HUB):
        return Path(path).expanduser().absolute()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    name, _, revision = path.removeprefix(HUB).partition("@")
    try:
        # The other format is fetched only where a model has no safetensors: some have both.
        for weights in WEIGHT_FILES:
            folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=[weights, *OTHER_FILES]))
            if any(folder.glob(weights)):
                break
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"model.path={path} is not in the Hugging Face cache and the hub cannot be reached; download it where there"
            " is a network, or give a folder"
        ) from error
    # The library answers an unknown or private name, a bad revision and a full disk with errors of many kinds.
    except Exception as error:
        said = " ".join((str(error) or type(error).__name__).split())
        raise ValueError(
            f"model.path={path} cannot be fetched from the Hugging Face hub ({said}); check OWNER/NAME and HF_TOKEN, or"
            " give a folder"
        ) from error
    return folder


def settle(sections: Mapping[str, Any], folder: Path | None, *, max_turns: int) -> None:
    """Replace `auto` in the sections by what follows from the model and this machine.

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
            # Processors compute bfloat16 many times slower than float32, but for the newest.
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
    """Parameters of the model in a Hugging Face folder; estimated from the files' size where they do not say."""
    shapes = folder_shapes(folder)
    if shapes:
        return sum(math.prod(shape) for shape in shapes.values())
    return sum(path.stat().st_size for path in folder.glob("pytorch_model*.bin")) // 2


def longest_context(folder: Path) -> int:
    """Tokens that the model can attend to, all of them from each; 0 where it does not say."""
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
    """Whether a Hugging Face folder has configuration, weights and tokenizer.

    Raises:
        ValueError: something is missing or unreadable.
    """
    _model_config(folder)
    for what, patterns in (("weights", WEIGHT_FILES), ("tokenizer", TOKENIZER_FILES)):
        if not any(any(folder.glob(pattern)) for pattern in patterns):
            raise ValueError(
                f"model.path={folder} has no {what}, neither {' nor '.join(patterns)}; give a folder as"
                " save_pretrained leaves it"
            )


def check_context(folder: Path, max_tokens: int) -> None:
    """Whether the model's context is long enough.

    Raises:
        ValueError: `max_tokens` is beyond the model's context or its sliding window.
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
            f" within which the learner attends to everything; set model.max_tokens to at most {window}"
        )


def check_heads(num_heads: int | None, tensor_parallel_size: int) -> None:
    """Whether the workers of an engine can share a model's attention heads.

    Args:
        num_heads: None where the model does not say.
        tensor_parallel_size: workers of an engine.

    Raises:
        ValueError: they cannot.
    """
    if num_heads and num_heads % tensor_parallel_size:
        raise ValueError(
            f"actor.tensor_parallel_size={tensor_parallel_size} does not divide the model's {num_heads} attention"
            " heads; use a number that does"
        )


def model_heads(folder: Path) -> int | None:
    """The attention heads of the model in a Hugging Face folder; None where it does not say."""
    heads = _model_config(folder).get("num_attention_heads")
    return heads if isinstance(heads, int) else None


def _model_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(
            f"model.path={folder} is not a Hugging Face folder: {path} does not exist; give one that has it"
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
    """What the training of an embedded model is told, its files aside."""
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
    """The folder's name in the cache; another one when anything differs that the model is made of."""
    made = {name: value for name, value in asdict(pretraining).items() if name != "num_threads"}
    made_of = [BASE_MODEL_RECIPE, settings, made, asdict(config), task.fingerprint]
    return f"base-{task.name}-{hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:12]}"
