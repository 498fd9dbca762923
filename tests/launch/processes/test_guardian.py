"""The guardian removes what a killed launcher leaves: processes, even frozen ones, sockets and shared memory."""

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.processes.guardian import Guardian
from launch.processes.process_tree import is_stopped, marked_processes

ROOT = Path(__file__).parents[3]
LAUNCHER = """
import os, subprocess, sys, time
from pathlib import Path
from launch.processes.guardian import Guardian
from launch.processes.process_tree import MARK
guardian = Guardian(float(sys.argv[1]), Path("/nonexistent"))
os.environ.update(guardian.environment)
os.environ[MARK] = f"{guardian.run_mark}.{sys.argv[3]}"
child = subprocess.Popen([sys.executable, "-S", "-c", sys.argv[2]], start_new_session=True, stdout=subprocess.PIPE)
said = child.stdout.readline().decode().strip()
print(guardian.run_mark, guardian.folder, child.pid, said, flush=True)
time.sleep(60)
"""
STUBBORN = """
import os, signal, socket, tempfile, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
socket.socket(socket.AF_UNIX).bind(tempfile.mkdtemp() + "/socket")
memory = os.environ["SLIPSTREAM_MEMORY"]
open(memory + "/v1.weights", "wb").write(bytes(1 << 16))
if os.fork():
    print(memory, flush=True)
else:
    os.setsid()
time.sleep(60)
"""


def wait_for(condition: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


BUFFER = """
import signal, sys, time
from pathlib import Path
said = Path(sys.argv[1])
def end(*_):
    (said / "buffer").write_text(str((said / "checkpoint").exists()))
    sys.exit()
signal.signal(signal.SIGTERM, end)
print("up", flush=True)
time.sleep(60)
"""
LEARNER_WITH_BUFFER = f"""
import os, subprocess, sys, time
from pathlib import Path
launcher = os.getppid()
environment = os.environ | {{"SLIPSTREAM_PROCESS": os.environ["SLIPSTREAM_PROCESS"].replace(".learner", ".buffer")}}
command = [sys.executable, "-S", "-c", {BUFFER!r}, SAID]
buffer = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, start_new_session=True)
buffer.stdout.readline()
print("up", flush=True)
while os.getppid() == launcher:
    time.sleep(0.01)
time.sleep(1.0)
(Path(SAID) / "checkpoint").touch()
"""


def launch(
    code: str, grace_seconds: float = 0.2, name: str = "learner"
) -> tuple[subprocess.Popen[str], str, Path, int, str]:
    """A launcher with one child: (process, run mark, temporary folder, the child's id, the child's first word)."""
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(grace_seconds), code, name],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert launcher.stdout is not None
    mark, folder, pid, said = launcher.stdout.readline().split()
    return launcher, mark, Path(folder), int(pid), said


def kill(launcher: subprocess.Popen[str]) -> None:
    launcher.kill()
    launcher.communicate()


def test_nothing_is_left_of_a_run_whose_launcher_was_killed():
    launcher, mark, folder, pid, memory = launch(STUBBORN)
    assert len(marked_processes(mark)) == 2
    assert pid in marked_processes(mark)
    assert list(folder.rglob("socket")) and memory.startswith("/dev/shm/") and list(Path(memory).iterdir())
    kill(launcher)
    wait_for(lambda: not marked_processes(mark) and not folder.exists() and not Path(memory).exists())


def test_a_process_that_is_frozen_while_the_launcher_dies_does_not_stay():
    launcher, mark, folder, pid, _ = launch(STUBBORN)
    os.kill(pid, signal.SIGSTOP)
    wait_for(lambda: is_stopped(pid))
    kill(launcher)
    wait_for(lambda: not marked_processes(mark) and not folder.exists())


def test_shared_memory_goes_with_those_who_shared_it():
    code = """
from multiprocessing.shared_memory import SharedMemory
import time
print(SharedMemory(create=True, size=1 << 12).name, flush=True)
time.sleep(60)
"""
    launcher, mark, *_, name = launch(code)
    segment = Path("/dev/shm") / name
    assert segment.exists()
    kill(launcher)
    wait_for(lambda: not marked_processes(mark) and not segment.exists())


@pytest.mark.parametrize("grace_seconds", [60.0, math.inf])
def test_a_learner_that_ends_within_the_grace_is_not_killed(tmp_path: Path, grace_seconds: float):
    code = f"""
import os, signal, time
from pathlib import Path
launcher = os.getppid()
print("up", flush=True)
while os.getppid() == launcher:
    time.sleep(0.01)
time.sleep(0.3)
Path({str(tmp_path / "checkpoint")!r}).touch()
"""
    launcher, mark, folder, *_ = launch(code, grace_seconds=grace_seconds)
    kill(launcher)
    wait_for(lambda: not folder.exists())
    assert (tmp_path / "checkpoint").exists()
    assert not marked_processes(mark)


def test_without_a_limit_a_frozen_learner_is_not_waited_for():
    launcher, mark, folder, pid, _ = launch(STUBBORN, grace_seconds=math.inf)
    os.kill(pid, signal.SIGSTOP)
    wait_for(lambda: is_stopped(pid))
    kill(launcher)
    wait_for(lambda: not marked_processes(mark) and not folder.exists(), seconds=60.0)


def test_without_a_limit_an_actor_that_ignores_the_request_is_killed():
    launcher, mark, folder, *_ = launch(STUBBORN, grace_seconds=math.inf, name="actor-0")
    kill(launcher)
    wait_for(lambda: not marked_processes(mark) and not folder.exists(), seconds=60.0)


def test_the_buffer_is_asked_to_end_only_after_the_learner(tmp_path: Path):
    code = LEARNER_WITH_BUFFER.replace("SAID", repr(str(tmp_path)))
    launcher, mark, folder, *_ = launch(code, grace_seconds=math.inf)
    kill(launcher)
    wait_for(lambda: not folder.exists(), seconds=60.0)
    assert (tmp_path / "buffer").read_text() == "True"
    assert not marked_processes(mark)


def test_a_launcher_that_ends_in_order_waits_until_everything_is_clean(tmp_path: Path):
    guardian = Guardian(0.0, tmp_path)
    assert len(guardian.folder) < 60
    environment = os.environ | guardian.environment
    child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"], env=environment)
    wait_for(lambda: list(marked_processes(guardian.run_mark)) == [child.pid])
    guardian.close()
    assert child.wait(timeout=5.0) == -signal.SIGKILL
    assert not Path(guardian.folder).exists()


def test_a_long_temporary_folder_leaves_room_for_the_names_of_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / ("long" * 20)))
    guardian = Guardian(0.0, tmp_path)
    assert guardian.folder.startswith("/tmp/slipstream-")
    guardian.close()
