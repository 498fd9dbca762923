from pathlib import Path

import pytest
import torch

from benchmarks.learner import compare, gradients
from benchmarks.parts.learner.work import GROUP_SIZE, Work, forward_flops, save_model, sequences


def work(folder: Path) -> Work:
    return Work(
        folder=str(folder),
        vocabulary=40,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=2,
        shortest=8,
        longest=40,
        num_sequences=2 * GROUP_SIZE,
        num_threads=1,
        tokens_per_microbatch=64,
        rows_per_microbatch=GROUP_SIZE,
    )


def test_the_learner_and_a_step_by_hand_make_the_same_gradient(tmp_path: Path):
    save_model(work(tmp_path))
    case = compare(work(tmp_path), ["slipstream", "PyTorch, packed"], 1, "")
    assert case["skipped"] == {} and case["gradients"].keys() == {"ours", "packed"}
    assert max(case["gradients"].values()) < 1e-9
    assert all(rate["tokens_per_second"] > 0 for rate in case["rates"].values())


def test_a_way_with_another_gradient_is_refused(tmp_path: Path):
    for name, value in (("ours", [1.0, 2.0]), ("packed", [1.0, 2.1])):
        torch.save({"weight": torch.tensor(value)}, tmp_path / f"gradient-{name}.pt")
    with pytest.raises(RuntimeError, match=r"another gradient than ours: \{'packed'"):
        gradients(work(tmp_path), ["ours", "packed"])


def test_a_way_that_cannot_start_is_skipped_with_its_reason(tmp_path: Path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'no module named trl' >&2\nexit 1\n")
    python.chmod(0o755)
    assert compare(work(tmp_path), ["TRL"], 1, str(python))["skipped"] == {"TRL": "no module named trl"}


def test_operations_are_counted_without_padding(tmp_path: Path):
    made = work(tmp_path)
    data = sequences(made)
    linear, attention = forward_flops(made, data)
    layers = 2 * (4 * 32 * 32 + 3 * 32 * 48)
    scored = data.num_tokens - sum(data.prompt_lengths)
    assert linear == 2 * data.num_tokens * layers + 2 * scored * 32 * 40
    # In both layers every token has a product with each key and each value that it sees.
    assert attention == 2 * 4 * 32 * sum(t + 1 for ids in data.token_ids for t in range(len(ids)))
