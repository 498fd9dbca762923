"""A worker ends with its actor, even if the actor is killed. Other processes watch nothing."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

from actors.lifeline import end_with_actor

ROOT = Path(__file__).parents[2]
WORKER = (
    "from actors.lifeline import end_with_actor; end_with_actor(); print('up', flush=True); import time; time.sleep(60)"
)
# As in vLLM, the worker is a grandchild of the actor: a process between them survives the actor.
BETWEEN = f"import os, subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {WORKER!r}]); time.sleep(60)"
ACTOR = f"""
import subprocess, sys, time
from actors.lifeline import end_with_actor, name_actor
name_actor()
end_with_actor()
subprocess.Popen([sys.executable, "-c", {BETWEEN!r}])
time.sleep(60)
"""


def test_workers_end_with_a_killed_actor():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    actor = subprocess.Popen([sys.executable, "-c", ACTOR], stdout=subprocess.PIPE, text=True, env=environment)
    assert actor.stdout is not None
    assert actor.stdout.readline() == "up\n"
    between, worker = psutil.Process(actor.pid).children(recursive=True)
    actor.kill()
    deadline = time.monotonic() + 20
    # The process between them has not waited for the worker, so the worker becomes a zombie.
    while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert between.status() != psutil.STATUS_ZOMBIE
    between.kill()
    actor.communicate()


def test_without_an_actor_nothing_is_watched():
    end_with_actor()
    assert "watch-actor" not in {thread.name for thread in threading.enumerate()}
