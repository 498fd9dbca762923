"""The launcher as a process, with the real buffer and a stand-in for what needs an engine."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]

LAUNCHER = """
import sys
import launch.cluster as cluster
from launch.topology import processes

learner = ("-c", sys.argv[1])

def with_a_stand_in(plan):
    specs = {spec.role: spec for spec in processes(plan)}
    spec = specs["learner"]
    command = (sys.executable, *learner, str(plan.run_dir))
    return [specs["buffer"], type(spec)(spec.role, spec.name, command, spec.environment)]

cluster.processes = with_a_stand_in
if __name__ == "__main__":
    sys.exit(cluster.main(sys.argv[2:]))
"""

HEAD = """
import sys, time
from buffer.client import Connection
from buffer.config import load_run_config
from buffer.wire import Heartbeat, LearnerHello
buffer = Connection(load_run_config(sys.argv[1])["buffer"]["address"], "learner-0")
buffer.call(LearnerHello(0))
buffer.call(Heartbeat("learner", "learner-0", 3, "", {"samples_per_second": 8.0, "idle_fraction": 0.5}))
print("trained", flush=True)
"""
ENDS_WELL = f"{HEAD}\ntime.sleep(1)\nbuffer.close()"
GOES_ON = f"{HEAD}\ntime.sleep(60)"
FAILS = "import sys; print('out of memory'); sys.exit(2)"

Launch = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def launch(run_dir: Path, model_folder: Path) -> Launch:
    def start(learner: str, *overrides: str) -> subprocess.Popen[str]:
        given = overrides or (f"model.path={model_folder}", "total_steps=40", f"run_dir={run_dir}")
        command = [sys.executable, "-c", LAUNCHER, learner, *given]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    return start


def wait_for_training(process: subprocess.Popen[str], run_dir: Path, times: int) -> list[psutil.Process]:
    """Until the learner has spoken with the buffer, over all its starts. Returns the launcher's descendants."""
    log, deadline = run_dir / "logs" / "learner.log", time.monotonic() + 60
    while not (log.is_file() and log.read_text().count("trained") == times):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return psutil.Process(process.pid).children(recursive=True)


def test_a_run_whose_learner_ends_well_leaves_a_summary(launch: Launch, run_dir: Path):
    output, errors = (process := launch(ENDS_WELL)).communicate(timeout=90)
    assert process.returncode == 0, errors
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["policy_version"], summary["samples_per_second"]) == (3, 8.0)
    assert summary["pass_at_1_before"] is None
    assert f"run directory: {run_dir}" in output
    assert "step 3/40" in output
    assert f"tensorboard --logdir {run_dir}/tensorboard" in output
    assert f"starting buffer: {sys.executable} -m buffer serve {run_dir}" in (run_dir / "logs/launcher.log").read_text()


def test_a_run_that_fails_for_good_says_who_and_where(launch: Launch, run_dir: Path):
    _, errors = (process := launch(FAILS)).communicate(timeout=90)
    assert process.returncode == 1
    assert errors == f"error: learner ended with status 2; its log is {run_dir}/logs/learner.log\nout of memory\n"


def test_a_signal_ends_everything_and_leaves_a_run_to_resume(launch: Launch, run_dir: Path):
    for attempt, (number, status) in enumerate([(signal.SIGINT, 130), (signal.SIGTERM, 143)]):
        process = launch(GOES_ON, *([f"resume={run_dir}"] if attempt else []))
        family = wait_for_training(process, run_dir, times=attempt + 1)
        assert len(family) == 2
        began = time.monotonic()
        process.send_signal(number)
        # Impatience must not leave anybody behind.
        process.send_signal(number)
        output, errors = process.communicate(timeout=30)
        assert time.monotonic() - began < 5.0
        assert (process.returncode, errors) == (status, "")
        assert f"continue with: python launch/cluster.py resume={run_dir}" in output
        assert not any(child.is_running() for child in family)
