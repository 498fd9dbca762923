"""Two real ranks that wait for each other for ever are found by their heartbeats, ended and started again."""

import sys
import time
import uuid
from pathlib import Path

from buffer.transport.connection import Connection
from buffer.transport.messages import Status, StatusRequest
from launch.processes.supervisor import Supervisor
from launch.processes.topology import ProcessSpec
from launch.processes.watch import Watch
from tests.learner.scripted_run import CREDENTIALS, ScriptedRun

ROOT = Path(__file__).parents[3]
LONGEST_SECONDS = 400


def test_a_deadlock_of_the_ranks_ends_and_the_learner_goes_on(tmp_path: Path, socket_folder: Path):
    run, address = ScriptedRun(tmp_path, socket_folder, tmp_path), f"ipc://{socket_folder}/buffer"
    command = (sys.executable, str(ROOT / "tests/learner/stuck_ranks.py"), address, str(tmp_path))
    spec = ProcessSpec("learner", "learner", command, {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    supervisor = Supervisor([spec], tmp_path / "logs", max_restarts=1, healthy_seconds=60.0, run_mark=uuid.uuid4().hex)
    watch, reasons, deadline = Watch(1.0), list[str](), time.monotonic() + LONGEST_SECONDS
    try:
        supervisor.start()
        with Connection(address, "launcher", CREDENTIALS) as launcher:
            while not supervisor.poll():
                assert time.monotonic() < deadline, (tmp_path / "logs" / "learner.log").read_text()
                status = launcher.call(StatusRequest())
                assert isinstance(status, Status)
                hung = watch.turn(time.monotonic(), status, supervisor.stopped(), supervisor.running_seconds())
                for name, reason in hung.items():
                    reasons.append(reason)
                    supervisor.kill(name, reason)
                time.sleep(0.25)
        [reason] = reasons
        assert reason.startswith("stands still: ") and reason.endswith("(the limit is 5 s)")
        for rank in (0, 1):
            assert f"learner-{rank} trains on the batch for policy 2" in reason
        assert supervisor.notes == {"learner": f"learner was restarted once, last because it {reason}"}
    finally:
        supervisor.stop(0.0)
        run.close()
