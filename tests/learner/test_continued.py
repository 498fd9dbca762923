"""A run that went on from a checkpoint in new processes is, bit for bit, the run that never stopped."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from learner.distributed.deepspeed_engine import STATE_CLASSES
from learner.distributed.state_file import read_state_file
from tests.learner.torchrun import run_ranks

pytestmark = pytest.mark.system


def contents(checkpoint: Path) -> dict[str, list[Tensor]]:
    """By file: the exported weights, both engines' states and the generators of every rank."""
    found = {path.name: list(load_file(path).values()) for path in (checkpoint / "policy").glob("*.safetensors")}
    for path in checkpoint.rglob("*.pt"):
        found[path.relative_to(checkpoint).as_posix()] = tensors(read_state_file(path, STATE_CLASSES))
    return found


def tensors(value: object) -> list[Tensor]:
    """All numbers in nested containers."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, int | float):
        return [torch.tensor(value, dtype=torch.float64)]
    if isinstance(value, dict | list | tuple):
        return [leaf for item in (value.values() if isinstance(value, dict) else value) for leaf in tensors(item)]
    return []


def differing(one: dict[str, list[Tensor]], other: dict[str, list[Tensor]]) -> set[str]:
    """The files that are not equal bit for bit."""
    assert one.keys() == other.keys()
    return {
        name
        for name in one
        if len(one[name]) != len(other[name])
        or not all(torch.equal(a, b) for a, b in zip(one[name], other[name], strict=True))
    }


@pytest.mark.parametrize(("num_ranks", "stage"), [(1, 0), (2, 3)])
def test_two_steps_and_two_more_in_new_processes_are_four(
    model_folder: Path, tmp_path: Path, num_ranks: int, stage: int
):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    run_ranks("continued.py", num_ranks, model_folder, straight, stage, 2, 4)
    shutil.copytree(straight / "00000002", resumed / "00000002")
    run_ranks("continued.py", num_ranks, model_folder, resumed, stage, 4)
    expected, before = contents(straight / "00000004"), contents(straight / "00000002")
    assert differing(expected, contents(resumed / "00000004")) == set()
    # All compared states have changed since the checkpoint: weights and optimizers of both networks, every generator.
    moved = differing(expected, before)
    assert {"model.safetensors", *(f"rng/rank-{rank}.pt" for rank in range(num_ranks))} < moved
    assert {name.partition("/")[0] for name in moved} >= {"policy_state", "critic_state", "reference.pt"}
