"""Whole runs as a user starts them, checked by their ledger, checkpoints, event files and summary."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from buffer.ledger.audit import audit
from tests.system.runs import ROOT, Launch, finish, reward_curve

pytestmark = [pytest.mark.system, pytest.mark.timeout(420)]


def used_rows(run_dir: Path) -> list[tuple[int, int]]:
    """Returns (used_version, oldest_version) of every group that was trained on."""
    with sqlite3.connect(f"file:{run_dir}/ledger.sqlite?mode=ro", uri=True) as db:
        rows = db.execute(
            "SELECT used_version, oldest_version FROM uses JOIN occurrences USING (occurrence)"
        ).fetchall()
    db.close()
    return rows


def assert_sound(run_dir: Path, *, steps: int, groups_per_batch: int, max_staleness: int) -> None:
    """Asserts that every batch was full, no group too stale, the invariant holds, and all used groups are committed."""
    ledger = audit(run_dir)
    assert ledger.holds, ledger.problems
    rows = used_rows(run_dir)
    assert sorted({version for version, _ in rows}) == list(range(steps))
    for version in range(steps):
        assert sum(used == version for used, _ in rows) == groups_per_batch
    assert all(0 <= used - oldest <= max_staleness for used, oldest in rows)
    assert ledger.counts["done"] == steps * groups_per_batch
    assert ledger.counts["used"] == 0
    assert not ledger.dropped


def assert_checkpoint_loads(run_dir: Path, version: int) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = run_dir / "checkpoints" / f"{version:08d}" / "policy"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("12+34=", add_special_tokens=False, return_tensors="pt")
    completion = model.generate(prompt["input_ids"], max_new_tokens=30, do_sample=False)
    assert "=" in tokenizer.decode(completion[0, prompt["input_ids"].shape[1] :])


def assert_keys_stay_in_their_folder(run_dir: Path) -> None:
    """Asserts that no log, configuration, ledger or event file contains a secret key."""
    keys = [json.loads(path.read_text()) for path in (run_dir / "keys").iterdir()]
    secrets = [value.encode() for content in keys for name, value in content.items() if name == "secret"]
    # One of each role, of the buffer, and of the weight stores.
    assert [len(secret) for secret in secrets] == [40] * 5
    files = [path for path in run_dir.rglob("*") if path.is_file() and path.parent.name != "keys"]
    assert {"config.yaml", "learner.log", "ledger.sqlite"} <= {path.name for path in files}
    for path in files:
        content = path.read_bytes()
        assert not any(secret in content for secret in secrets), path


def test_ppo_trains_with_stale_data_and_reports(launch: Launch, tmp_path: Path) -> None:
    run_dir = tmp_path / "ppo"
    output = finish(launch(run_dir, "total_steps=8", "max_staleness=2", "learner.evaluate_every=4"), run_dir)
    assert_sound(run_dir, steps=8, groups_per_batch=8, max_staleness=2)
    assert max(used - oldest for used, oldest in used_rows(run_dir)) > 0
    assert_checkpoint_loads(run_dir, 8)

    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["policy_version"] == 8
    assert 0 <= summary["pass_at_1_before"] <= 1
    assert 0 <= summary["pass_at_1_after"] <= 1
    assert summary["samples_per_second"] > 0
    assert summary["tokens_per_second"] > 0
    assert 0 <= summary["actor_idle_fraction"] < 1
    assert 0 <= summary["learner_idle_fraction"] < 1
    assert summary["staleness_max"] <= 2
    assert "pass@1" in output
    assert "tensorboard --logdir" in output
    assert [step for step, _ in reward_curve(run_dir)] == list(range(1, 9))
    assert "log-probabilities agree" in (run_dir / "logs" / "learner.log").read_text()
    assert "parameters verified after the first load" in (run_dir / "logs" / "actor-0.log").read_text()
    assert_keys_stay_in_their_folder(run_dir)
    command = [sys.executable, "-m", "buffer", "inspect", str(run_dir), "--json"]
    inspected = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(inspected.stdout)["counts"]["done"] == 8 * 8


def test_grpo_with_two_learner_ranks_under_zero_3(launch: Launch, tmp_path: Path) -> None:
    run_dir = tmp_path / "grpo"
    overrides = (
        "algorithm=grpo",
        "total_steps=4",
        "max_staleness=1",
        "learner.num_ranks=2",
        "learner.zero_stage=3",
        "cluster.pin_cores=false",
    )
    finish(launch(run_dir, *overrides), run_dir)
    assert_sound(run_dir, steps=4, groups_per_batch=8, max_staleness=1)
    assert_checkpoint_loads(run_dir, 4)


def test_runs_in_turn_repeat_themselves(launch: Launch, tmp_path: Path) -> None:
    curves = []
    for attempt in ("first", "second"):
        run_dir = tmp_path / attempt
        finish(launch(run_dir, "mode=sync", "total_steps=4"), run_dir)
        assert_sound(run_dir, steps=4, groups_per_batch=8, max_staleness=0)
        curves.append(reward_curve(run_dir))
    assert curves[0] == curves[1]


def wait_for_versions(
    process: subprocess.Popen[str], run_dir: Path, at_least: int, within_seconds: float = 240.0
) -> list[psutil.Process]:
    """Waits for: policy version `at_least`. Returns the launcher's descendants."""
    deadline = time.monotonic() + within_seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        log = run_dir / "logs" / "learner.log"
        if log.is_file() and f"policy {at_least} published" in log.read_text():
            return psutil.Process(process.pid).children(recursive=True)
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGTERM)
    pytest.fail(f"no policy {at_least} within {within_seconds:.0f} s: {process.communicate()[0]}")
