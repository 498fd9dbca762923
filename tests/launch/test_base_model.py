"""The cache of embedded base models, filled by the real pretraining of a few steps."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from launch.base_model import prepare_base_model

SMALL = (
    *("pretraining.steps=2", "pretraining.num_traces=32", "pretraining.batch_size=4", "pretraining.num_threads=1"),
    *("embedded.hidden_size=32", "embedded.num_heads=1", "embedded.intermediate_size=32", "embedded.num_layers=1"),
    *("task.num_train=50", "task.num_held_out=10"),
)


def prepare(plan: Any) -> tuple[Path, list[tuple[int, int]]]:
    steps: list[tuple[int, int]] = []
    return prepare_base_model(plan, plan.embedded, lambda step, total, _: steps.append((step, total))), steps


def test_a_base_model_is_made_once_and_then_taken_from_the_cache(make_plan: Any, cache_dir: Path):
    folder, steps = prepare(make_plan(*SMALL))
    assert steps == [(2, 2)]
    assert folder.parent == cache_dir
    assert json.loads((folder / "config.json").read_text())["hidden_size"] == 32
    assert (folder / "model.safetensors").stat().st_size > 10_000
    assert (folder / "tokenizer.json").is_file()
    assert [path.name for path in cache_dir.iterdir()] == [folder.name]

    again, steps = prepare(make_plan(*SMALL, "learner.optimizer.learning_rate=1e-5", "pretraining.num_threads=2"))
    assert (again, steps) == (folder, [])


@pytest.mark.parametrize(
    "change",
    [
        *("pretraining.error_rate=0.5", "pretraining.num_traces=33", "pretraining.steps=3", "pretraining.seed=1"),
        *("embedded.num_layers=2", "task.seed=1", "task.options.digits=3", "model.max_tokens=300"),
    ],
)
def test_another_model_is_wanted_when_anything_it_is_made_of_changes(
    make_plan: Any, change: str, monkeypatch: pytest.MonkeyPatch
):
    made: list[str] = []

    def make_folder(request: Path, *_: object) -> None:
        made.append(request.parent.name)
        (request.parent / "model").mkdir()

    monkeypatch.setattr("launch.base_model._train", make_folder)
    folders = {prepare(make_plan(*SMALL, *overrides))[0] for overrides in ([], [change], [])}
    assert len(folders) == len(made) == 2


@pytest.mark.parametrize(("wanted", "usable", "threads"), [(8, 2, "2"), (1, 2, "1")])
def test_pretraining_has_no_more_threads_than_there_are_cores(
    make_plan: Any, monkeypatch: pytest.MonkeyPatch, wanted: int, usable: int, threads: str
):
    class Started(Exception):
        """Replaces the pretraining process."""

    def popen(*_: object, env: dict[str, str], **__: object) -> None:
        raise Started(env["OMP_NUM_THREADS"], env["RAYON_NUM_THREADS"])

    monkeypatch.setattr("launch.base_model.subprocess.Popen", popen)
    monkeypatch.setattr("launch.base_model.num_usable_cores", lambda: usable)
    with pytest.raises(Started) as started:
        prepare(make_plan(*SMALL, f"pretraining.num_threads={wanted}"))
    assert started.value.args == (threads, threads)


def test_what_a_killed_launcher_left_in_the_cache_is_removed(
    make_plan: Any, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    cache_dir.mkdir()
    nobody = int(Path("/proc/sys/kernel/pid_max").read_text()) + 1
    for pid in (os.getpid(), nobody):
        (cache_dir / f"base-arithmetic-0123456789ab-making-{pid}-x").mkdir()
    monkeypatch.setattr("launch.base_model._train", lambda request, *_: (request.parent / "model").mkdir())
    folder, _ = prepare(make_plan(*SMALL))
    left = {path.name for path in cache_dir.iterdir()}
    assert left == {folder.name, f"base-arithmetic-0123456789ab-making-{os.getpid()}-x"}


def test_a_failure_names_the_log_and_its_last_line(
    make_plan: Any, run_dir: Path, cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'loading' && echo 'error: no pair fits 8 tokens' >&2 && exit 2\n")
    python.chmod(0o755)
    monkeypatch.setattr("launch.base_model.sys.executable", str(python))
    with pytest.raises(ValueError) as failed:
        prepare(make_plan(*SMALL))
    log = run_dir / "logs" / "pretraining.log"
    assert f"ended with status 2; its log {log} ends with: error: no pair fits 8 tokens" in str(failed.value)
    assert "loading" in log.read_text()
    assert list(cache_dir.iterdir()) == []
