"""Makes the embedded base models: pretrained once on the text of a noisy teacher, then kept in the cache."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from actors.tasks.task import write_traces
from buffer.machine import THREADS_VARIABLE, num_usable_cores
from launch.config.model import embedded_settings
from launch.config.plan import RunPlan
from launch.config.settings import EmbeddedConfig
from launch.processes.supervisor import last_line
from launch.processes.topology import ROOT
from learner.models.cpu_heap import heap_environment

MAKING = "-making-"

Progress = Callable[[int, int, float], None]
"""Called with the number of steps done, the number of all steps, and the loss."""


def prepare_base_model(plan: RunPlan, embedded: EmbeddedConfig, progress: Progress) -> Path:
    """Make the run's embedded model if it is not in the cache. Returns its folder, `plan.model_folder`.

    Raises:
        ValueError: pretraining failed; the message names the log.
    """
    folder = plan.model_folder
    cache = folder.parent
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    _remove_unfinished(cache)
    # Runs that start at the same time may make the same model, so each has a folder of its own.
    with tempfile.TemporaryDirectory(dir=cache, prefix=f"{folder.name}{MAKING}{os.getpid()}-") as name:
        making = Path(name)
        _write_pairs(plan, making / "pairs.jsonl")
        request = making / "settings.json"
        settings = embedded_settings(embedded, plan.pretraining, plan.task, plan.sections["model"]["max_tokens"])
        request.write_text(
            json.dumps({**settings, "pairs": str(making / "pairs.jsonl"), "output": str(making / "model")})
        )
        _train(request, plan, progress)
        if not folder.is_dir():
            (making / "model").rename(folder)
    return folder


def _remove_unfinished(cache: Path) -> None:
    """Remove the unfinished folders of launchers that were killed."""
    for folder in cache.glob(f"*{MAKING}*"):
        pid = folder.name.partition(MAKING)[2].partition("-")[0]
        if not Path("/proc", pid).exists():
            shutil.rmtree(folder, ignore_errors=True)


def _write_pairs(plan: RunPlan, path: Path) -> None:
    pretraining = plan.pretraining
    if pretraining.num_traces:
        write_traces(
            plan.task_config,
            path,
            num_traces=pretraining.num_traces,
            error_rate=pretraining.error_rate,
            clean_share=pretraining.clean_share,
            seed=pretraining.seed,
        )
        return
    # Without traces the tokenizer is trained on the prompts and golds themselves.
    rows = ({"prompt": plan.task.prompt(p), "completion": p.gold} for p in plan.task.train)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _train(request: Path, plan: RunPlan, progress: Progress) -> None:
    log_path = plan.run_dir / "logs" / "pretraining.log"
    log_path.parent.mkdir(parents=True, exist_ok=True)
    threads = str(min(plan.pretraining.num_threads, num_usable_cores()))
    # The second limits the threads that train a tokenizer.
    limits = {THREADS_VARIABLE: threads, "RAYON_NUM_THREADS": threads}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **limits, **heap_environment()}
    command = [sys.executable, "-m", "learner.sft", str(request)]
    with (
        log_path.open("w") as log,
        # One stream for both outputs keeps the order of the lines in the log.
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                log.write(line)
                if line.startswith("{"):
                    report = json.loads(line)
                    progress(report["step"], report["steps"], report["loss"])
        except BaseException:
            process.terminate()
            raise
    if process.returncode:
        raise ValueError(
            f"pretraining the base model ended with status {process.returncode}; its log {log_path} ends with:"
            f" {last_line(log_path)}"
        )
