"""Checkpoints that are complete or absent: written under a temporary name, flushed, then renamed.

`RUN_DIR/checkpoints/00000050/` holds `policy/` (a Hugging Face folder), `policy_state/` and `critic_state/` (what
DeepSpeed needs to go on) and `learner.json`. A folder without the temporary suffix is whole.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict

from learner.engine import TrainingEngine, barrier, rank_and_world_size

logger = logging.getLogger(__name__)

POLICY_PREFIX = "causal_lm."


def newest_checkpoint(directory: Path) -> Path | None:
    """The complete checkpoint with the highest version, if there is one."""
    complete = [path for path in directory.glob("*") if path.name.isdigit() and (path / "learner.json").is_file()]
    return max(complete, key=lambda path: int(path.name), default=None)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What `save_checkpoint` was given as `state`."""
    state: dict[str, Any] = json.loads((checkpoint / "learner.json").read_text())
    return state


def save_checkpoint(
    directory: Path,
    policy_version: int,
    policy: TrainingEngine,
    critic: TrainingEngine | None,
    *,
    base_path: Path,
    dtype: torch.dtype,
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Write one checkpoint; every rank must call it.

    Args:
        directory: RUN_DIR/checkpoints.
        policy_version: names the folder.
        policy: gathered into a Hugging Face folder, and saved with its optimizer.
        critic: saved with its optimizer; None without one.
        base_path: the folder the policy started from; configuration and tokenizer are copied from it.
        dtype: of the exported weights.
        state: small JSON-able values to resume with.
        keep: how many checkpoints stay; the oldest are removed after the new one is complete.
    """
    rank, _ = rank_and_world_size()
    final = directory / f"{policy_version:08d}"
    temporary = directory / f"{policy_version:08d}.incomplete"
    if rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    barrier()
    export_policy(policy, temporary / "policy", base_path=base_path, dtype=dtype)
    policy.save(temporary / "policy_state")
    if critic is not None:
        critic.save(temporary / "critic_state")
    barrier()
    if rank == 0:
        (temporary / "learner.json").write_text(json.dumps({"policy_version": policy_version, **state}, indent=2))
        _flush(temporary)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        _flush_one(directory)
        _remove_old(directory, keep)
        logger.info("checkpoint of policy %d written to %s", policy_version, final)
    barrier()
    return final


def export_policy(policy: TrainingEngine, folder: Path, *, base_path: Path, dtype: torch.dtype) -> None:
    """The policy as a Hugging Face folder that transformers and vLLM load; every rank must call it."""
    rank, _ = rank_and_world_size()
    weights = {name.removeprefix(POLICY_PREFIX): tensor for name, tensor in policy.gather(dtype)}
    if rank:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(base_path.iterdir()):
        if path.is_file() and path.suffix not in (".safetensors", ".bin", ".pt", ".pth") and "index" not in path.name:
            shutil.copy2(path, folder / path.name)
    save_torch_state_dict(weights, folder, metadata={"format": "pt"})


def load_checkpoint(checkpoint: Path, policy: TrainingEngine, critic: TrainingEngine | None) -> None:
    """Weights, master weights and optimizer state back into the engines; every rank must call it."""
    policy.load(checkpoint / "policy_state")
    if critic is not None:
        critic.load(checkpoint / "critic_state")
    logger.info("resumed from %s", checkpoint)


def _remove_old(directory: Path, keep: int) -> None:
    complete = sorted(path for path in directory.glob("*") if path.name.isdigit())
    for old in complete[: -max(keep, 1)]:
        shutil.rmtree(old, ignore_errors=True)


def _flush(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        _flush_one(path)


def _flush_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
