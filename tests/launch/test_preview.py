"""`--check` prints what would run; it starts no process and leaves no file."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launch.cluster import main
from launch.preview import print_preview


def shown(plan: Any) -> dict[str, str]:
    """The rows of all tables, by their first cell."""
    text = io.StringIO()
    print_preview(plan, Console(file=text, width=200))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.getvalue().splitlines() if "│" in line]
    return {row[0]: " ".join(row[1:]).strip() for row in rows}


def test_the_arithmetic_of_batches(make_plan: Any):
    limits = ("groups_per_batch=16", "samples_per_group=8", "updates_per_batch=2", "max_staleness=4", "total_steps=100")
    rows = shown(make_plan("algorithm=grpo", *limits, "learner.evaluate_every=30", "task.num_train=400"))
    assert rows["prompts"] == "400 to train on, 400 held out"
    assert rows["a batch"] == "16 prompts x 8 completions = 128"
    assert rows["updates"] == "2 per batch, of 64 completions each"
    assert rows["the run"] == "100 versions = 50 batches = 800 prompts"
    assert rows["epochs"] == "2.00"
    assert rows["staleness"] == "at most 4 versions when a batch is handed out, 5 at the last update"
    # Versions 0, 30, 60, 90 and 100.
    assert rows["evaluations"] == "5, of 400 prompts each"


def test_every_process_is_named(make_plan: Any):
    rows = shown(make_plan("cluster.num_actors=3", "cluster.tensorboard=true", "cluster.tensorboard_port=0"))
    assert {"buffer", "learner", "actor-0", "actor-1", "actor-2", "tensorboard"} <= rows.keys()


def test_sizes_of_a_model_of_the_users(make_plan: Any, model_folder: Path):
    """64 x 64 parameters in float32. PPO's critic needs as much as the policy; GRPO has none."""
    grpo, ppo = (shown(make_plan(f"model.path={model_folder}", f"algorithm={name}")) for name in ("grpo", "ppo"))
    assert grpo["parameters"] == "4,096, float32 in the learner, float32 in the actors"
    assert (grpo["learner"], ppo["learner"]) == ("65.5 kB over 1 rank", "131.1 kB over 1 rank")
    assert grpo["published versions"] == "up to 6 x 16.4 kB"
    assert (grpo["checkpoints"], ppo["checkpoints"]) == ("2 x 65.5 kB on disk", "2 x 114.7 kB on disk")


def test_check_ends_with_0_and_leaves_nothing(run_dir: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["--check", "total_steps=30", f"run_dir={run_dir}"]) == 0
    assert f"would start: {run_dir}" in capsys.readouterr().out.replace("\n", "")
    assert not run_dir.exists()
    assert main(["--check", "total_steps=0", f"run_dir={run_dir}"]) == 2
