"""Small real processes are restarted, given up, and ended with all their descendants."""

import math
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from buffer.process import REPLACED
from launch.processes.supervisor import RunFailedError, Supervisor
from launch.processes.topology import ProcessSpec

ROOT = Path(__file__).parents[3]
IGNORES_SIGTERM = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); "
SLEEPS = "import time; time.sleep(60)"


def spec(role: str, code: str, name: str = "") -> ProcessSpec:
    return ProcessSpec(role, name or role, (sys.executable, "-S", "-c", code), {})


def make(
    specs: Sequence[ProcessSpec], tmp_path: Path, max_restarts: int = 0, healthy_seconds: float = 0.0
) -> Supervisor:
    return Supervisor(
        specs,
        tmp_path / "logs",
        max_restarts=max_restarts,
        healthy_seconds=healthy_seconds,
        run_mark=f"test-{uuid.uuid4().hex}",
    )


@pytest.fixture
def supervise(tmp_path: Path) -> Iterator[Callable[..., Supervisor]]:
    started: list[Supervisor] = []

    def start(*specs: ProcessSpec, max_restarts: int = 3, healthy_seconds: float = 60.0) -> Supervisor:
        supervisor = make(specs, tmp_path, max_restarts=max_restarts, healthy_seconds=healthy_seconds)
        started.append(supervisor)
        supervisor.start()
        return supervisor

    yield start
    for supervisor in started:
        supervisor.stop(0.0)


def log(tmp_path: Path, name: str) -> str:
    path = tmp_path / "logs" / f"{name}.log"
    return path.read_text() if path.is_file() else ""


def wait_for(condition: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


def lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def poll_until_ended(supervisor: Supervisor) -> None:
    wait_for(supervisor.poll)


def test_a_learner_that_ends_well_ends_the_run(supervise: Callable[..., Supervisor], tmp_path: Path):
    supervisor = supervise(spec("buffer", SLEEPS), spec("learner", "print('trained')"))
    poll_until_ended(supervisor)
    assert log(tmp_path, "learner") == "trained\n"
    buffer = supervisor.pids["buffer"]
    assert lives(buffer)
    supervisor.stop(1.0)
    assert not lives(buffer)


def test_a_failed_process_starts_again_after_a_pause(supervise: Callable[..., Supervisor], tmp_path: Path):
    marker = tmp_path / "failed-once"
    code = f"""
import pathlib, sys, time
marker = pathlib.Path({str(marker)!r})
if not marker.exists():
    marker.touch()
    sys.exit("first attempt")
print("second attempt", flush=True)
time.sleep(60)
"""
    supervisor = supervise(spec("actor", code))
    first, began = supervisor.pids["actor"], time.monotonic()
    wait_for(lambda: supervisor.poll() or "second attempt" in log(tmp_path, "actor"))
    assert time.monotonic() - began >= 1.0
    assert log(tmp_path, "actor") == "first attempt\nsecond attempt\n"
    assert supervisor.pids["actor"] != first


def test_an_actor_that_ends_well_is_missed_too(supervise: Callable[..., Supervisor]):
    supervisor = supervise(spec("actor", "pass"), max_restarts=0)
    with pytest.raises(RunFailedError, match="actor ended with status 0"):
        poll_until_ended(supervisor)


def test_a_process_that_keeps_failing_ends_the_run_with_its_last_words(
    supervise: Callable[..., Supervisor], tmp_path: Path
):
    supervisor = supervise(
        spec("actor", "import sys; print('a'); sys.exit('no more memory')", "actor-0"), max_restarts=1
    )
    with pytest.raises(RunFailedError) as failed:
        poll_until_ended(supervisor)
    assert f"actor-0 ended with status 1; its log is {tmp_path}/logs/actor-0.log\nno more memory" == str(failed.value)
    assert log(tmp_path, "actor-0").count("no more memory") == 2


@pytest.mark.parametrize("status", [2, 3])
def test_what_would_end_the_same_is_not_tried_again(supervise: Callable[..., Supervisor], tmp_path: Path, status: int):
    supervisor = supervise(spec("learner", f"import sys; print('once'); sys.exit({status})"), max_restarts=5)
    with pytest.raises(RunFailedError, match=f"status {status}"):
        poll_until_ended(supervisor)
    assert log(tmp_path, "learner") == "once\n"


DIES_ONCE_MORE = """
import pathlib, sys, time
number = len(pathlib.Path(sys.argv[1]).read_text())
pathlib.Path(sys.argv[1]).write_text("." * (number + 1))
print("start", number, flush=True)
time.sleep(60 if number else 0)
sys.exit(1)
"""


def test_restarts_are_forgotten_once_the_run_got_ahead_with_the_process(
    supervise: Callable[..., Supervisor], tmp_path: Path
):
    starts = tmp_path / "starts"
    starts.touch()
    command = (sys.executable, "-S", "-c", DIES_ONCE_MORE, str(starts))
    supervisor = supervise(ProcessSpec("actor", "actor-0", command, {}), max_restarts=1, healthy_seconds=0.2)
    supervisor.progress(7)
    wait_for(lambda: supervisor.poll() or "start 1" in log(tmp_path, "actor-0"))
    assert supervisor.notes == {"actor-0": "actor-0 was restarted once, last because it ended with status 1"}
    wait_for(lambda: supervisor.running_seconds()["actor-0"] > 0.2)
    # The process lives, but the run has made no progress.
    supervisor.progress(7)
    assert supervisor.notes
    supervisor.progress(8)
    assert not supervisor.notes
    supervisor.kill("actor-0", "was tired")
    # Without progress this would be one failure too many.
    wait_for(lambda: supervisor.poll() or "start 2" in log(tmp_path, "actor-0"))
    supervisor.kill("actor-0", "was tired again")
    with pytest.raises(RunFailedError, match="actor-0 was tired again; its log is "):
        poll_until_ended(supervisor)


def test_the_run_goes_on_with_the_actors_that_are_left(supervise: Callable[..., Supervisor], tmp_path: Path):
    supervisor = supervise(
        spec("actor", "import sys; sys.exit(2)", "actor-0"), spec("actor", SLEEPS, "actor-1"), max_restarts=0
    )
    wait_for(lambda: supervisor.poll() or supervisor.notes)
    assert supervisor.notes == {"actor-0": f"actor-0 is given up; its log is {tmp_path}/logs/actor-0.log"}
    assert set(supervisor.running_seconds()) == {"actor-1"}
    supervisor.kill("actor-1", "was next")
    with pytest.raises(RunFailedError, match="actor-1 was next; its log is "):
        poll_until_ended(supervisor)


def test_the_only_actor_waits_while_another_process_works_under_its_name(
    supervise: Callable[..., Supervisor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    marker = tmp_path / "replaced-once"
    code = f"""
import pathlib, sys, time
marker = pathlib.Path({str(marker)!r})
if not marker.exists():
    marker.touch()
    sys.exit({REPLACED})
print("back", flush=True)
time.sleep(60)
"""
    clock = [100.0]
    supervisor = supervise(spec("actor", code, "actor-0"), max_restarts=0)
    wait_for(lambda: supervisor.poll() or supervisor.notes)
    assert supervisor.notes == {
        "actor-0": "another process took the name actor-0 over; when it has left, actor-0 is started again"
    }
    monkeypatch.setattr("launch.processes.supervisor.time.monotonic", lambda: clock[0])
    # It works, the buffer is restarted and knows nobody, it works again, and then it is silent.
    for known in [{"actor-0": 0.5}] * 30 + [{}] * 9 + [{"actor-0": 0.5}] + [{"actor-0": 6.0}, {}] * 5:
        supervisor.heard(known)
        assert not supervisor.poll() and not supervisor.running_seconds()
        clock[0] += 1.0
    supervisor.heard({})
    assert not supervisor.poll()
    monkeypatch.undo()
    wait_for(lambda: log(tmp_path, "actor-0") == "back\n")
    assert not supervisor.notes
    supervisor.heard({})
    supervisor.kill("actor-0", "was next")
    with pytest.raises(RunFailedError, match="actor-0 was next; its log is "):
        poll_until_ended(supervisor)


def test_only_an_actor_has_a_name_to_lose(supervise: Callable[..., Supervisor]):
    supervisor = supervise(spec("learner", f"import sys; sys.exit({REPLACED})"), max_restarts=0)
    with pytest.raises(RunFailedError, match=f"learner ended with status {REPLACED}"):
        poll_until_ended(supervisor)


def test_a_halted_process_is_found_also_among_descendants_and_can_be_killed(
    supervise: Callable[..., Supervisor], tmp_path: Path
):
    supervisor = supervise(spec("learner", f"{DESCENDANTS}\ntime.sleep(60)"), spec("buffer", SLEEPS))
    descendants = descendants_of(tmp_path, "learner")
    assert supervisor.stopped() == set()
    os.kill(descendants[1], signal.SIGSTOP)
    wait_for(lambda: supervisor.stopped() == {"learner"})
    supervisor.kill("learner", "was halted")
    wait_for(lambda: not any(lives(pid) for pid in descendants), seconds=5.0)
    assert supervisor.stopped() == set()


DESCENDANTS = f"""
import subprocess, sys, time
for session in (False, True):
    child = subprocess.Popen([sys.executable, "-S", "-c", {SLEEPS!r}], start_new_session=session)
    print(child.pid, flush=True)
"""


def descendants_of(tmp_path: Path, name: str) -> list[int]:
    wait_for(lambda: len(log(tmp_path, name).split()) >= 2)
    return [int(pid) for pid in log(tmp_path, name).split()]


def test_stopping_ends_what_processes_have_started_wherever_they_put_it(
    supervise: Callable[..., Supervisor], tmp_path: Path
):
    supervisor = supervise(spec("learner", f"{DESCENDANTS}\ntime.sleep(60)"))
    everyone = [supervisor.pids["learner"], *descendants_of(tmp_path, "learner")]
    assert len(everyone) == 3
    assert all(lives(pid) for pid in everyone)
    supervisor.stop(1.0)
    wait_for(lambda: not any(lives(pid) for pid in everyone), seconds=2.0)


def test_what_a_dead_process_leaves_behind_is_ended_before_it_starts_again(
    supervise: Callable[..., Supervisor], tmp_path: Path
):
    supervisor = supervise(spec("learner", f"{DESCENDANTS}\nsys.exit(1)"))
    orphans = descendants_of(tmp_path, "learner")
    wait_for(lambda: supervisor.poll() or not any(lives(pid) for pid in orphans), seconds=5.0)


def test_a_process_that_ignores_the_request_is_killed_in_time(supervise: Callable[..., Supervisor], tmp_path: Path):
    code = f"{IGNORES_SIGTERM} time.sleep(60)"
    supervisor = supervise(spec("buffer", code), spec("learner", code), spec("actor", code))
    pids = list(supervisor.pids.values())
    wait_for(lambda: all(log(tmp_path, name) for name in ("buffer", "learner", "actor")))
    began = time.monotonic()
    supervisor.stop(0.5)
    assert 0.5 <= time.monotonic() - began < 30.0
    assert not any(lives(pid) for pid in pids)


def test_what_ignores_the_request_is_killed_at_once_on_a_second_one(
    supervise: Callable[..., Supervisor], tmp_path: Path
):
    code = f"{IGNORES_SIGTERM} time.sleep(60)"
    supervisor = supervise(spec("buffer", code), spec("learner", code))
    pids = list(supervisor.pids.values())
    wait_for(lambda: all(log(tmp_path, name) for name in ("buffer", "learner")))
    shown: list[float] = []
    supervisor.stop(math.inf, at_once=lambda: len(shown) > 3, show=shown.append)
    assert shown == sorted(shown) and len(shown) == 4
    assert not any(lives(pid) for pid in pids)


def test_a_learner_that_is_halted_is_not_waited_for_without_a_limit(
    supervise: Callable[..., Supervisor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("launch.processes.supervisor.HALTED_SECONDS", 0.5)
    supervisor = supervise(spec("learner", f"{IGNORES_SIGTERM} time.sleep(60)"))
    learner = supervisor.pids["learner"]
    wait_for(lambda: log(tmp_path, "learner"))
    os.kill(learner, signal.SIGSTOP)
    supervisor.stop(math.inf)
    assert not lives(learner)


@pytest.mark.parametrize("grace_seconds", [60.0, math.inf])
def test_the_learner_ends_first_and_has_time_for_a_checkpoint(
    supervise: Callable[..., Supervisor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grace_seconds: float
):
    monkeypatch.setattr("launch.processes.supervisor.OTHERS_SECONDS", 0.5)
    buffer = spec("buffer", SLEEPS)
    code = """
import os, pathlib, signal, sys, time
def finish(*_):
    # Longer than any other process has to end.
    time.sleep(2)
    buffer = int(pathlib.Path(sys.argv[1]).read_text())
    os.kill(buffer, 0)
    print("checkpoint written", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, finish)
print("up", flush=True)
time.sleep(60)
"""
    pid_file = tmp_path / "buffer.pid"
    command = (sys.executable, "-S", "-c", code, str(pid_file))
    stubborn = spec("actor", f"{IGNORES_SIGTERM} time.sleep(60)", "actor-0")
    supervisor = supervise(buffer, stubborn, ProcessSpec("learner", "learner", command, {}))
    pid_file.write_text(str(supervisor.pids["buffer"]))
    wait_for(lambda: "up" in log(tmp_path, "learner") and "up" in log(tmp_path, "actor-0"))
    actor_left: list[bool] = []
    supervisor.stop(grace_seconds, show=lambda _: actor_left.append(lives(supervisor.pids["actor-0"])))
    assert log(tmp_path, "learner") == "up\ncheckpoint written\n"
    # An actor that does not end is not waited for.
    assert actor_left[0] and not actor_left[-1]
    assert not lives(supervisor.pids["buffer"])


def test_a_start_that_fails_half_way_can_be_stopped(tmp_path: Path):
    absent = ProcessSpec("actor", "actor", (str(tmp_path / "absent"),), {})
    supervisor = make([spec("buffer", SLEEPS), absent], tmp_path)
    with pytest.raises(FileNotFoundError):
        supervisor.start()
    buffer = supervisor.pids["buffer"]
    assert lives(buffer)
    supervisor.stop(1.0)
    assert not lives(buffer)


def test_children_end_with_a_launcher_that_is_killed(tmp_path: Path):
    script = f"""
import sys, time
from pathlib import Path
from launch.processes.supervisor import Supervisor
from launch.processes.topology import ProcessSpec
specs = [ProcessSpec(role, role, (sys.executable, "-S", "-c", {SLEEPS!r}), {{}}) for role in ("actor", "learner")]
supervisor = Supervisor(specs, Path({str(tmp_path / "logs")!r}), max_restarts=0, healthy_seconds=0, run_mark="test")
supervisor.start()
print(*supervisor.pids.values(), flush=True)
time.sleep(60)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment
    ) as launcher:
        assert launcher.stdout is not None
        children = [int(pid) for pid in launcher.stdout.readline().split()]
        assert len(children) == 2
        assert all(lives(pid) for pid in children)
        launcher.send_signal(signal.SIGKILL)
    wait_for(lambda: not any(lives(pid) for pid in children), seconds=5.0)
