"""Checkpoints that are complete or absent: written under a temporary name, flushed to disk, then renamed.

Between flush and rename the training loop asks the buffer to make durable what the checkpoint contains.

`RUN_DIR/checkpoints/00000050/` holds `policy/` (a Hugging Face folder), `policy_state/` and `critic_state/` (what
DeepSpeed needs to go on), `adapter/` (only with LoRA, in peft's format; `policy/` has it merged), `reference.pt` (only
where the reference is refreshed), `rng/` (random generators, a file per rank), `learner.json` and `manifest.json`
(size and digest of every file). Only folders whose name is a number are checkpoints. A checkpoint whose files changed
after they were written is reported, and the next older one is used.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from torch import nn

from buffer.files import has_no_space, sync
from learner.checkpoints.manifest import complete_checkpoints, defect, write_manifest
from learner.checkpoints.rng import load_generators, save_generators
from learner.config import LoraConfig
from learner.distributed.collectives import any_rank, barrier, rank_and_world_size
from learner.distributed.deepspeed_engine import TrainingEngine
from learner.distributed.state_file import read_state_file, write_state
from learner.models.lora import save_adapter

logger = logging.getLogger(__name__)

POLICY_PREFIX = "causal_lm."
REFERENCE = "reference.pt"
INCOMPLETE, BROKEN = ".incomplete", ".broken"
FULL_BYTES = 1 << 20
"""A disk with less free space than this counts as full when a write to it fails."""


class CheckpointError(ValueError):
    """There are checkpoints, but the learner can resume from none of them."""


class CheckpointWriteError(OSError):
    """There is no new checkpoint: a rank could not write its part, or the learner ends. Older ones are untouched.

    Args:
        problem: the sentence.
        is_disk_full: whether a rank had no space; the same on every rank.
    """

    def __init__(self, problem: str, *, is_disk_full: bool = False) -> None:
        super().__init__(problem)
        self.is_disk_full = is_disk_full


def sound_checkpoint(directory: Path) -> Path | None:
    """Return the newest checkpoint whose files are as they were written; None before the first checkpoint.

    Newer broken checkpoints are reported and renamed to VERSION.broken; unfinished ones are removed. Only one rank may
    call this.

    Raises:
        CheckpointError: there are checkpoints, but none is sound; starting at version 0 would lose the run's progress.
    """
    for leftover in directory.glob(f"*{INCOMPLETE}"):
        shutil.rmtree(leftover)
    broken: list[tuple[Path, str]] = []
    for checkpoint in complete_checkpoints(directory):
        problem = defect(checkpoint)
        if problem is None:
            for path, _ in broken:
                shutil.rmtree(path.with_suffix(BROKEN), ignore_errors=True)
                path.rename(path.with_suffix(BROKEN))
            return checkpoint
        logger.error("checkpoint %s is broken: %s", checkpoint, problem)
        broken.append((checkpoint, problem))
    if broken:
        raise CheckpointError(
            f"none of the {len(broken)} checkpoints in {directory} is sound (the newest, {broken[0][0].name}:"
            f" {broken[0][1]}); restore one from a copy, or remove them all to start again at policy 0"
        )
    return None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return the `state` that `save_checkpoint` was given, with `policy_version` and `num_ranks`."""
    state: dict[str, Any] = json.loads((checkpoint / "learner.json").read_text())
    return state


def save_checkpoint(
    directory: Path,
    policy_version: int,
    policy: TrainingEngine,
    critic: TrainingEngine | None,
    *,
    reference: nn.Module | None = None,
    base_path: Path,
    dtype: torch.dtype,
    lora: LoraConfig | None = None,
    state: dict[str, Any],
    keep: int,
    may_be_named: Callable[[], bool] = lambda: True,
) -> Path:
    """Write one checkpoint; every rank must call it.

    Args:
        directory: RUN_DIR/checkpoints.
        policy_version: names the folder.
        policy: gathered into a Hugging Face folder, and saved with its optimizer.
        critic: saved with its optimizer; None without one.
        reference: saved by rank 0; None if it can be loaded from the model's folder.
        base_path: the model's folder that the run started from; configuration and tokenizer are copied from it.
        dtype: type of the exported weights.
        lora: the policy's adapters; None without.
        state: small JSON-able values to resume with.
        keep: number of checkpoints to keep; the oldest are removed when the new one is complete.
        may_be_named: called on every rank when the checkpoint is on the disk under its temporary name; False, on every
            rank alike, discards the checkpoint.

    Raises:
        CheckpointWriteError: on every rank, when any rank could not write its part, or the checkpoint may not be named;
            the partial files are removed.
    """
    rank, world_size = rank_and_world_size()
    final = directory / f"{policy_version:08d}"
    temporary = final.with_suffix(INCOMPLETE)

    def together(write: Callable[[], None]) -> None:
        _together(write, policy.device, directory)

    def on_rank_0(write: Callable[[], None]) -> None:
        together(write if rank == 0 else lambda: None)

    def describe() -> None:
        state_of_run = {"policy_version": policy_version, "num_ranks": world_size, **state}
        (temporary / "learner.json").write_text(json.dumps(state_of_run, indent=2))
        write_manifest(temporary)
        _flush(temporary)

    def name() -> None:
        temporary.rename(final)
        try:
            sync(directory)
            sync(directory.parent)
        except OSError:
            # If the rename is not durable, discard the checkpoint.
            shutil.rmtree(final, ignore_errors=True)
            raise

    try:
        on_rank_0(lambda: _make_empty(temporary))
        together(lambda: export_policy(policy, temporary / "policy", base_path=base_path, dtype=dtype))
        if lora is not None and lora.rank:
            together(lambda: export_adapter(policy, temporary / "adapter", lora, base_path))
        together(lambda: policy.save(temporary / "policy_state"))
        if critic is not None:
            together(lambda: critic.save(temporary / "critic_state"))
        if reference is not None:
            on_rank_0(lambda: write_state(reference.state_dict(), temporary / REFERENCE))
        together(lambda: save_generators(_generators(temporary, rank)))
        on_rank_0(describe)
        if not may_be_named():
            raise CheckpointWriteError(
                f"policy {policy_version} has no checkpoint: the buffer, which has to record it, is gone, and this"
                " learner is to end; resume from the checkpoint before"
            )
        on_rank_0(name)
    except CheckpointWriteError:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if rank == 0:
        _remove_old(directory, keep)
        logger.info("checkpoint of policy %d written to %s", policy_version, final)
    barrier()
    return final


def export_policy(policy: TrainingEngine, folder: Path, *, base_path: Path, dtype: torch.dtype) -> None:
    """Write the policy as a Hugging Face folder that transformers and vLLM can load; every rank must call it.

    Raises:
        OSError: when the folder cannot be written; raised after the gather, so no rank is left waiting.
    """
    rank, _ = rank_and_world_size()
    weights = {name.removeprefix(POLICY_PREFIX): tensor for name, tensor in policy.gather(dtype)}
    if rank:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(base_path.iterdir()):
        if path.is_file() and path.suffix not in (".safetensors", ".bin", ".pt", ".pth") and "index" not in path.name:
            shutil.copy2(path, folder / path.name)
    try:
        save_torch_state_dict(weights, folder, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{folder} cannot be written: {error}") from error


def export_adapter(policy: TrainingEngine, folder: Path, lora: LoraConfig, base_path: Path) -> None:
    """Write the policy's adapters as a folder that peft can load; every rank must call it.

    Raises:
        OSError: as `export_policy` does.
    """
    tensors = {name.removeprefix(POLICY_PREFIX): tensor for name, tensor in policy.gather(torch.float32, adapters=True)}
    if rank_and_world_size()[0] == 0:
        save_adapter(tensors, folder, lora, base_path)


def check_same_adapters(checkpoint: Path, written: LoraConfig, wanted: LoraConfig) -> None:
    """Check that the adapters in `checkpoint` have the shape of those that this run trains.

    Raises:
        CheckpointError: rank, alpha or layers differ.
    """
    names = written.differences(wanted)
    if names:
        theirs, ours = (
            " and ".join(f"learner.lora.{name}={getattr(lora, name)}" for name in names) for lora in (written, wanted)
        )
        raise CheckpointError(
            f"{checkpoint} was written with {theirs}, which {ours} cannot go on from; set what it was, or start a new"
            f" run from it with model.path={checkpoint / 'policy'}"
        )


def load_checkpoint(
    checkpoint: Path, policy: TrainingEngine, critic: TrainingEngine | None, reference: nn.Module | None = None
) -> None:
    """Restore weights, master weights, optimizer state and random generators; every rank must call it.

    A `reference` must be given only if one was saved; its weights are restored too.

    Raises:
        CheckpointError: the state is sharded and another number of ranks wrote it.
    """
    rank, world_size = rank_and_world_size()
    written_by = int(read_state(checkpoint)["num_ranks"])
    if written_by != world_size and policy.is_sharded:
        raise CheckpointError(
            f"{checkpoint} was written by {written_by} learner ranks and its state is sharded; continue with"
            f" learner.num_ranks={written_by} instead of {world_size}"
        )
    policy.load(checkpoint / "policy_state")
    if critic is not None:
        critic.load(checkpoint / "critic_state")
    if reference is not None:
        reference.load_state_dict(read_state_file(checkpoint / REFERENCE))
    if written_by == world_size:
        load_generators(_generators(checkpoint, rank))
    logger.info("resumed from %s", checkpoint)


def _generators(checkpoint: Path, rank: int) -> Path:
    return checkpoint / "rng" / f"rank-{rank}.pt"


def _together(write: Callable[[], None], device: torch.device, folder: Path) -> None:
    """Call `write` on every rank; if it raises OSError on any, raise CheckpointWriteError on all. Also a barrier."""
    problem, is_full = "", False
    try:
        write()
    except OSError as error:
        problem, is_full = str(error), has_no_space(error) or _is_full(folder)
    if any_rank(bool(problem), device):
        problem = problem or "another rank could not write its part; its log says why"
        raise CheckpointWriteError(problem, is_disk_full=any_rank(is_full, device))


def _is_full(folder: Path) -> bool:
    """Return whether the disk is full. The libraries that write tensors do not say why they failed."""
    try:
        return shutil.disk_usage(folder).free < FULL_BYTES
    except OSError:
        return False


def _make_empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _remove_old(directory: Path, keep: int) -> None:
    complete = complete_checkpoints(directory)
    kept = complete[: max(keep, 1)]
    set_aside = [path for path in directory.glob(f"*{BROKEN}") if int(path.stem) < int(kept[-1].name)]
    for old in (*complete[len(kept) :], *set_aside):
        shutil.rmtree(old, ignore_errors=True)


def _flush(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        sync(path)
