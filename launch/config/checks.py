"""What must be true of this machine and of the user's files before a run may start; each function raises ValueError.

Every message is one sentence: what is wrong, where, the value, and the way out.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from actors.tasks.templates import template_names

WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def free_address(port: int, name: str, host: str = "127.0.0.1") -> str:
    """An endpoint at this machine's address `host`; port 0 becomes a free one.

    Raises:
        ValueError: the port is taken or not ours to take.
    """
    with socket.socket() as probe:
        # As the servers do: a port that only waits for the last packets of an ended process is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            why = (
                "is in use on this machine" if error.errno == errno.EADDRINUSE else f"cannot be taken: {error.strerror}"
            )
            if error.errno == errno.EADDRNOTAVAIL:
                raise ValueError(f"cluster.host={host} is no address of this machine; choose one of those") from error
            raise ValueError(f"{name}={port} {why}; choose another, or 0 for any free one") from error
        return f"tcp://{host}:{probe.getsockname()[1]}"


def absolute_files(task: Mapping[str, Any]) -> dict[str, Any]:
    """The section `task` with the user's files by their absolute paths: other processes may be started elsewhere.

    Names of templates, `hf:` sources and what does not exist stay as they are.
    """
    files = {name: task.get(name) for name in ("data_path", "eval_path", "template")}
    return {**task} | {
        name: str(Path(value).expanduser().absolute())
        for name, value in files.items()
        if isinstance(value, str) and value and value not in template_names() and Path(value).expanduser().exists()
    }


def check_folder(folder: Path, name: str) -> None:
    """Make `folder` and prove that files can be written there.

    Raises:
        ValueError: they cannot.
    """
    marker = folder / f".writable-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        marker.touch()
        marker.unlink()
    except OSError as error:
        raise ValueError(f"{name}={folder} cannot be written: {error.strerror}; choose another") from error


def check_space(folder: Path, name: str, min_free_bytes: int) -> None:
    """Compare what is free where `folder` lies with what the run must have.

    Raises:
        ValueError: too little is free.
    """
    free = shutil.disk_usage(folder).free
    if free < min_free_bytes:
        raise ValueError(
            f"{name}={folder} has {free / 1e6:.0f} MB free, less than the {min_free_bytes / 1e6:.0f} MB of"
            " cluster.min_free_bytes; free some or choose another"
        )


def check_model_folder(folder: Path, max_tokens: int) -> None:
    """A Hugging Face folder with configuration, weights and tokenizer, whose context is long enough.

    Raises:
        ValueError: something is missing or unreadable, or `max_tokens` is beyond the model's context or its window.
    """
    config = _model_config(folder)
    for what, patterns in (("weights", WEIGHT_FILES), ("tokenizer", TOKENIZER_FILES)):
        if not any(any(folder.glob(pattern)) for pattern in patterns):
            raise ValueError(
                f"model.path={folder} has no {what}, neither {' nor '.join(patterns)}; give a folder as"
                " save_pretrained leaves it"
            )
    context = config.get("max_position_embeddings")
    if isinstance(context, int) and max_tokens > context:
        raise ValueError(
            f"model.max_tokens={max_tokens} is beyond the context of {context} tokens of the model in {folder};"
            f" set model.max_tokens to at most {context}"
        )
    window = config.get("sliding_window")
    if isinstance(window, int) and config.get("use_sliding_window", True) and max_tokens > window:
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
