"""The launcher as a process, with the real buffer and a stand-in for processes that need an engine."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest

from tests.containers import with_shared_memory

ROOT = Path(__file__).parents[2]

LAUNCHER = """
import os, sys
from dataclasses import replace
import launch.cluster as cluster
import launch.config.plan as plan
import launch.session as session
from launch.processes import supervisor
from launch.processes.topology import processes

# This check makes the algorithm: the import of PyTorch takes longer than everything else the launcher does.
plan.check_algorithm = lambda *_: None

code = {"learner": sys.argv[1], "actor": os.environ.get("STAND_IN_ACTOR")}
supervisor.LEFT_SECONDS = 3.0

def with_stand_ins(plan):
    specs = {spec.role: spec for spec in processes(plan)}
    stand_ins = [role for role in code if code[role]]
    commands = [(sys.executable, "-c", code[role], str(plan.run_dir)) for role in stand_ins]
    return [specs["buffer"], *(replace(specs[role], command=c) for role, c in zip(stand_ins, commands))]

session.processes = with_stand_ins
if __name__ == "__main__":
    sys.exit(cluster.main(sys.argv[2:]))
"""

HEAD = """
import sys, time
from buffer.transport.connection import Connection
from buffer.config import load_run_config
from buffer.transport.credentials import client_credentials
from buffer.transport.messages import BatchRequest, GroupDelivery, Heartbeat, LearnerHello, LeaseRequest
from tests.buffer.fuzz import group_of
settings = load_run_config(sys.argv[1])["buffer"]
size, fingerprint = settings["groups_per_batch"], settings["data_fingerprint"]
buffer, actor = (Connection(settings["address"], r, client_credentials(sys.argv[1], r)) for r in ("learner", "actor"))
buffer.epoch = buffer.call(LearnerHello(0)).epoch
leasing = None
for version in range(3):
    batch = buffer.request(BatchRequest(version, 0, 1))
    while not batch.done():
        leasing = leasing or actor.request(LeaseRequest("actor-9", version, size, fingerprint))
        if not leasing.done():
            time.sleep(0.01)
            continue
        for lease in leasing.result().leases:
            actor.call(GroupDelivery("actor-9", group_of(lease.group_id, lease.prompt_id, version, newer=0)))
        leasing = None
actor.close()
buffer.call(Heartbeat("learner", "learner-0", 3, "", {"samples_per_second": 8.0, "idle_fraction": 0.5}))
print("trained", flush=True)
"""
ENDS_WELL = f"{HEAD}\nimport os; print('memory', os.environ['SLIPSTREAM_MEMORY'])\ntime.sleep(1)\nbuffer.close()"
GOES_ON = f"{HEAD}\ntime.sleep(60)"
SAVES = f"""
import signal
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
{HEAD}
while not asked:
    time.sleep(0.01)
from pathlib import Path
from buffer.transport.messages import CheckpointCommitted
for seconds in range(SECONDS):
    buffer.call(Heartbeat("learner", "learner-0", 3, "", {{}}, activity="writes the checkpoint of policy 3"))
    time.sleep(1)
(Path(sys.argv[1]) / "checkpoints" / "00000003").mkdir(parents=True)
buffer.call(CheckpointCommitted(3))
print("saved", flush=True)
"""
IS_AN_ACTOR = """
import sys, time
from actors.__main__ import exit_status
from buffer.config import load_run_config
from buffer.transport.connection import Connection, RequestRefused
from buffer.transport.credentials import client_credentials
from buffer.transport.messages import Heartbeat
settings = load_run_config(sys.argv[1])["buffer"]
with Connection(settings["address"], "actor-0", client_credentials(sys.argv[1], "actor")) as buffer:
    try:
        for _ in range(1200):
            buffer.call(Heartbeat("actor", "actor-0", 0, "", {}))
            print("works", flush=True)
            time.sleep(0.1)
    except RequestRefused as error:
        sys.exit(exit_status(ExceptionGroup("", [error])))
"""
FAILS = "import sys; print('out of memory'); sys.exit(2)"

Launch = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def launch(run_dir: Path, model_folder: Path) -> Launch:
    def start(learner: str, *overrides: str, inside: Sequence[str] = ()) -> subprocess.Popen[str]:
        given = overrides or (f"model.path={model_folder}", "total_steps=3", f"run_dir={run_dir}")
        command = [*inside, sys.executable, "-c", LAUNCHER, learner, *given]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    return start


def wait_for_training(process: subprocess.Popen[str], run_dir: Path, times: int) -> list[psutil.Process]:
    """Wait until the learner has reached the buffer `times` times. Returns the launcher's descendants."""
    log, deadline = run_dir / "logs" / "learner.log", time.monotonic() + 60
    while not (log.is_file() and log.read_text().count("trained") == times):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return psutil.Process(process.pid).children(recursive=True)


def temporary_folder(children: list[psutil.Process]) -> Path:
    """The folder of the run's sockets and temporary files."""
    [folder] = {child.environ()["TMPDIR"] for child in children if "SLIPSTREAM_PROCESS" in child.environ()}
    assert Path(folder).is_dir()
    return Path(folder)


def memory_folder(run_dir: Path) -> str:
    """The folder for weights in shared memory that the learner was given; empty when it was given none."""
    [where] = re.findall(r"^memory (.*)$", (run_dir / "logs/learner.log").read_text(), re.MULTILINE)
    return str(where)


def test_a_run_whose_learner_ends_well_leaves_a_summary(launch: Launch, run_dir: Path):
    output, errors = (process := launch(ENDS_WELL)).communicate(timeout=90)
    assert process.returncode == 0, errors
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["policy_version"], summary["samples_per_second"]) == (3, 8.0)
    assert summary["pass_at_1_before"] is None
    assert f"run directory: {run_dir}" in output
    assert "step 3/3" in output
    assert f"tensorboard --logdir {run_dir}/tensorboard" in output
    log = (run_dir / "logs/launcher.log").read_text()
    assert re.search(rf"starting buffer: env .*{sys.executable} -m buffer serve {run_dir}", log)
    assert re.search(rf"another actor joins with: env .*{sys.executable} -m actors {run_dir}\n", output)
    # The weights of this small model fit in shared memory.
    assert "/dev/shm" not in output and memory_folder(run_dir).startswith("/dev/shm/slipstream-")


def test_weights_that_do_not_fit_in_shared_memory_lie_in_the_run_directory(launch: Launch, run_dir: Path):
    process = launch(ENDS_WELL, inside=with_shared_memory(64 << 10))
    output, errors = process.communicate(timeout=90)
    assert process.returncode == 0, errors
    [note] = [line for line in output.splitlines() if "/dev/shm" in line]
    assert f"/dev/shm has 0.1 MB free, so they lie in {run_dir}/weights" in note and "--shm-size=1g" in note
    assert not memory_folder(run_dir)


def test_the_launcher_has_one_thread_however_many_cores_there_are():
    code = "import os, launch.cluster, numpy; print(len(os.listdir('/proc/self/task')))"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=environment, text=True) == "1\n"


def test_a_learner_that_somebody_else_asked_to_stop_is_started_again(launch: Launch, run_dir: Path, model_folder: Path):
    process = launch(ENDS_WELL, f"model.path={model_folder}", "total_steps=4", f"run_dir={run_dir}")
    children = wait_for_training(process, run_dir, times=1)
    _ = wait_for_training(process, run_dir, times=2)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert "learner ended with status 0" in (run_dir / "logs/launcher.log").read_text()
    assert not any(child.is_running() for child in children)


def test_a_run_that_fails_for_good_says_who_and_where(launch: Launch, run_dir: Path):
    _, errors = (process := launch(FAILS)).communicate(timeout=90)
    assert process.returncode == 1
    assert errors == f"error: learner ended with status 2; its log is {run_dir}/logs/learner.log\nout of memory\n"


def test_a_signal_ends_everything_and_leaves_a_run_to_resume(launch: Launch, run_dir: Path):
    for attempt, (number, status) in enumerate([(signal.SIGINT, 130), (signal.SIGTERM, 0)]):
        process = launch(GOES_ON, *([f"resume={run_dir}"] if attempt else []))
        children = wait_for_training(process, run_dir, times=attempt + 1)
        assert len(children) == 3  # buffer, learner and the guardian
        began, folder = time.monotonic(), temporary_folder(children)
        process.send_signal(number)
        # A second signal must not leave processes behind.
        process.send_signal(number)
        output, errors = process.communicate(timeout=30)
        assert time.monotonic() - began < 20.0
        assert (process.returncode, errors) == (status, "")
        assert f"before the first checkpoint, continue with: python launch/cluster.py resume={run_dir}" in output
        assert not any(child.is_running() for child in children)
        assert not folder.exists()


def test_the_checkpoint_of_a_large_model_is_waited_for_and_the_wait_is_shown(launch: Launch, run_dir: Path):
    process = launch(SAVES.replace("SECONDS", "6"))
    children = wait_for_training(process, run_dir, times=1)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, "")
    assert re.search(
        r"waiting for the learner's last checkpoint, \d+ s( \(writes the checkpoint of policy 3\))?;"
        r" policy 3 is reached, newest checkpoint: none yet; Ctrl-C or SIGTERM once more ends at once, without it",
        output,
    )
    # The buffer heard of it.
    assert (run_dir / "logs" / "learner.log").read_text().endswith("saved\n")
    assert "at checkpoint 3, continue with" in output
    assert not any(child.is_running() for child in children)


def test_a_second_ctrl_c_ends_at_once(launch: Launch, run_dir: Path):
    process = launch(SAVES.replace("SECONDS", "600"))
    children = wait_for_training(process, run_dir, times=1)
    folder = temporary_folder(children)
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("waiting for the learner's last checkpoint"):
            break
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "")
    assert "before the first checkpoint, continue with" in output
    assert not any(child.is_running() for child in children)
    assert not folder.exists()


def test_a_scheduler_may_limit_the_wait_for_the_checkpoint(launch: Launch, run_dir: Path, model_folder: Path):
    overrides = (f"model.path={model_folder}", "total_steps=4", f"run_dir={run_dir}", "cluster.grace_seconds=2")
    process = launch(SAVES.replace("SECONDS", "600"), *overrides)
    children = wait_for_training(process, run_dir, times=1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "before the first checkpoint" in output
    assert not any(child.is_running() for child in children)


def test_a_killed_launcher_lets_the_learner_save_and_then_leaves_nothing(launch: Launch, run_dir: Path):
    process = launch(SAVES.replace("SECONDS", "6"))
    children = wait_for_training(process, run_dir, times=1)
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive
    # Only the buffer's answer lets it say so.
    assert (run_dir / "logs" / "learner.log").read_text().endswith("saved\n")
    assert (run_dir / "checkpoints" / "00000003").is_dir()


def test_a_killed_launcher_leaves_nothing_behind_and_the_run_can_be_continued(launch: Launch, run_dir: Path):
    process = launch(GOES_ON)
    children = wait_for_training(process, run_dir, times=1)
    learner = next(child for child in children if "-c" in child.cmdline())
    learner.suspend()
    folder = temporary_folder(children)
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive
    assert not folder.exists()
    again = launch(GOES_ON, f"resume={run_dir}")
    wait_for_training(again, run_dir, times=2)
    again.send_signal(signal.SIGINT)
    again.communicate(timeout=30)
    assert again.returncode == 130


def test_a_run_directory_that_is_removed_ends_the_run_with_one_sentence(launch: Launch, run_dir: Path):
    process = launch(GOES_ON)
    children = wait_for_training(process, run_dir, times=1)
    shutil.rmtree(run_dir)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert errors.startswith(f"error: run_dir={run_dir} was removed or emptied while the run went on")
    assert len(errors.splitlines()) == 1
    assert not any(child.is_running() for child in children)


def test_a_buffer_that_is_halted_for_long_is_replaced(launch: Launch, run_dir: Path, model_folder: Path):
    overrides = (f"model.path={model_folder}", "total_steps=3", f"run_dir={run_dir}", "cluster.hung_seconds=1")
    process = launch(GOES_ON, *overrides)
    children = wait_for_training(process, run_dir, times=1)
    buffer = next(child for child in children if "serve" in child.cmdline())
    buffer.suspend()
    log, deadline = run_dir / "logs" / "buffer.log", time.monotonic() + 60
    while log.read_text().count("buffer listens") < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, "")
    assert re.search(
        r"WARNING buffer (was halted|did not answer) for 1 s: killed", (run_dir / "logs/launcher.log").read_text()
    )


def test_the_run_goes_on_while_another_process_works_under_the_name_of_the_only_actor(
    launch: Launch, run_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("STAND_IN_ACTOR", IS_AN_ACTOR)
    process = launch(GOES_ON)
    actor_log, launcher_log = run_dir / "logs" / "actor-0.log", run_dir / "logs" / "launcher.log"

    def wait_for(condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 90
        while not condition():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)

    wait_for(lambda: actor_log.is_file() and "works" in actor_log.read_text())
    with subprocess.Popen(
        [sys.executable, "-c", IS_AN_ACTOR, str(run_dir)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
    ) as newer:
        why = "another process took the name actor-0 over"
        wait_for(lambda: f"WARNING {why}; when it has left, actor-0 is started again" in launcher_log.read_text())
        assert actor_log.read_text().endswith(f"error: {why}; give this one another --name\n")
        # Longer than a process may be unheard that still works.
        time.sleep(10.0)
        assert process.poll() is None and newer.poll() is None
        assert launcher_log.read_text().count("starting actor-0") == 1
        newer.kill()
    wait_for(lambda: launcher_log.read_text().count("starting actor-0") == 2)
    wait_for(lambda: actor_log.read_text().endswith("works\n"))
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "")
    assert f"{why}; when it has left, actor-0 is started again" in output


def test_a_run_that_is_ended_before_it_has_begun_is_not_offered_for_resuming(launch: Launch, run_dir: Path):
    process = launch(GOES_ON, f"run_dir={run_dir}", "pretraining.steps=100000")
    log, deadline = run_dir / "logs" / "pretraining.log", time.monotonic() + 60
    while not log.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "nothing was trained yet, start it again with the same command" in output
    assert not any(child.is_running() for child in children)
