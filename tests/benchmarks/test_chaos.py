"""The accounting of `benchmarks/chaos.py`: ledger against learner's log, processes that are hit, and recoveries."""

import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from benchmarks import chaos
from benchmarks.parts.chaos.poison import send_poison
from benchmarks.parts.chaos.storm import Storm
from benchmarks.parts.chaos.targets import Target
from buffer.config import BufferConfig
from buffer.ledger.ledger import Holder, Ledger
from buffer.service.server import Server
from buffer.transport import messages
from buffer.transport.connection import Connection
from buffer.transport.credentials import RunKeys
from buffer.transport.packed_group import pack_group
from tests.learner.samples import make_group

STAND_IN = "import subprocess, sys, time; print('started'); time.sleep(600)"
LAUNCHER = f"""
import subprocess, sys, time
for words in (["-m", "buffer", "serve"], ["-m", "actors", "RUN", "--name", "actor-7"], ["-m", "tensorboard.main"]):
    subprocess.Popen([sys.executable, "-c", {STAND_IN!r}, *words])
time.sleep(600)
"""


@pytest.fixture
def launcher():
    """A process whose children have the command lines of a buffer, an actor and an unrelated program."""
    process = subprocess.Popen([sys.executable, "-c", LAUNCHER], stdout=subprocess.DEVNULL)
    launched = psutil.Process(process.pid)
    deadline = time.monotonic() + 30
    while len(launched.children()) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    descendants = launched.children(recursive=True)
    yield process
    for descendant in descendants:
        if descendant.is_running():
            descendant.kill()
    process.kill()
    process.wait()


class NoGuest:
    """Stands for actors that are started by hand: there are none."""

    processes: tuple[()] = ()

    def step(self) -> None:
        pass


def make_storm(launcher: "subprocess.Popen[bytes]", run_dir: Path, kinds: list[str]) -> Storm:
    """A storm of faults of these kinds."""
    (run_dir / "logs").mkdir(parents=True)
    storm = Storm(
        launcher.pid,
        run_dir,
        run_dir / "logs",
        NoGuest(),
        lease_seconds=0.2,
        addresses=(),
        images=None,
        small_disk=False,
        seed=0,
        interval_seconds=0.01,
    )
    storm._kinds = kinds
    return storm


def rage(storm: Storm, until: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not until():
        assert time.monotonic() < deadline
        storm.step()
        time.sleep(0.01)


def test_only_the_runs_own_processes_are_hit(launcher, tmp_path):
    children = {tuple(child.cmdline()[3:]): child for child in psutil.Process(launcher.pid).children()}
    storm = make_storm(launcher, tmp_path, ["kill", "freeze", "freeze", "kill a child"])
    rage(storm, lambda: storm.faults["kill"] and storm.faults["freeze"])
    storm.end()
    assert set(storm.hits) <= {"buffer", "actor"}
    # The stand-ins have no child processes, so this kind waits for its turn.
    assert set(storm.faults) == {"kill", "freeze"}
    bystander = children["-m", "tensorboard.main"]
    assert bystander.is_running()
    assert all(child.status() != psutil.STATUS_STOPPED for child in children.values() if child.is_running())


def test_a_frozen_container_thaws_after_its_leases_have_ended(launcher, tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.parts.chaos.storm.CONTAINER_SECONDS", (0.1, 0.2))
    storm = make_storm(launcher, tmp_path, ["freeze a container"])
    [actor] = [child for child in psutil.Process(launcher.pid).children() if "actors" in child.cmdline()]
    rage(storm, lambda: actor.status() == psutil.STATUS_STOPPED)
    frozen = time.monotonic()
    storm._kinds = storm._deck = []
    storm._next_fault = float("inf")
    rage(storm, lambda: actor.status() != psutil.STATUS_STOPPED)
    assert time.monotonic() - frozen > 0.2


def test_a_target_has_recovered_when_its_log_says_so_after_the_first_fault(launcher, tmp_path):
    storm = make_storm(launcher, tmp_path, ["kill"])
    log = tmp_path / "logs" / "actor-7.log"
    log.write_text("policy 1 loaded\n")
    [actor] = [child for child in psutil.Process(launcher.pid).children() if "actors" in child.cmdline()]
    target = Target("actor", "actor-7", actor, log)
    storm.recoveries.ended(target)
    storm.recoveries.look()
    assert not storm.recoveries.complete
    # It is hit again before it works: the clock goes on.
    time.sleep(0.1)
    storm.recoveries.ended(target)
    with log.open("a") as appended:
        appended.write("starting\npolicy 2 loaded, generation paused\n")
    storm.recoveries.look()
    assert storm.recoveries.complete
    [seconds] = storm.recoveries.seconds["actor"]
    assert seconds > 0.1


def test_the_last_lineage_is_what_was_written_last():
    log = "\n".join(
        [
            "1 INFO learner: policy 0 trains on groups 0-1",
            "2 INFO learner: policy 1 trains on groups 2-3",
            "3 INFO learner: policy 2 trains on groups 4,6",
            "4 INFO learner: starting at policy 1; 4 groups are ready again",
            "5 INFO learner: policy 1 trains on groups 2,4",
        ]
    )
    assert chaos.lineage(log) == {0: [0, 1], 1: [2, 4]}


@pytest.mark.parametrize(("text", "numbers"), [("5", [5]), ("3-5,9", [3, 4, 5, 9]), ("0,2-3", [0, 2, 3])])
def test_ranges_are_read(text, numbers):
    assert chaos.occurrences(text) == numbers


def make_run(run_dir: Path, learner_log: str, uses: int = 1) -> dict:
    """Makes a ledger in which occurrences 0 and 1 were trained on in `uses` batches and are done.

    Returns the account of it and of the learner's log.
    """
    config = BufferConfig(
        run_dir=str(run_dir),
        address=f"ipc://{run_dir}/unused",
        num_prompts=10,
        data_fingerprint="prompts",
        groups_per_batch=2,
        max_staleness=1,
        max_uses=uses,
    )
    ledger = Ledger(config, now=0.0)
    with ledger.transaction():
        for _ in range(2):
            group_id, prompt_id = ledger.issue(Holder("actor-aa", "actor", 1), 0, now=0.0)
            ledger.deliver(pack_group(make_group(group_id, prompt_id)), 0)
        for version in range(uses):
            ledger.use([0, 1], version)
        ledger.commit(uses, uses)
    ledger.close()
    (run_dir / "logs").mkdir()
    (run_dir / "logs" / "learner.log").write_text(learner_log)
    return chaos.account(run_dir)


def test_what_ledger_and_log_agree_on_is_not_lost(tmp_path):
    figures = make_run(tmp_path, "policy 0 trains on groups 0-1\n")
    assert (figures["issued"], figures["trained"]) == (2, 2)
    assert (figures["lost"], figures["trained_twice"]) == (0, 0)
    assert figures["invariant_holds"]
    json.dumps(figures)


def test_a_group_that_no_weights_contain_is_lost(tmp_path):
    assert make_run(tmp_path, "policy 0 trains on groups 0\n")["lost"] == 1


def test_a_group_in_two_batches_of_one_lineage_is_trained_twice(tmp_path):
    log = "policy 0 trains on groups 0-1\npolicy 1 trains on groups 1-2\n"
    assert make_run(tmp_path, log)["trained_twice"] == 1


@pytest.mark.parametrize(("third", "expected"), [("2-3", 0), ("1-2", 1)])
def test_a_group_may_be_trained_on_as_often_as_the_ledger_says(tmp_path, third, expected):
    log = f"policy 0 trains on groups 0-1\npolicy 1 trains on groups 0-1\npolicy 2 trains on groups {third}\n"
    figures = make_run(tmp_path, log, uses=2)
    assert (figures["trained"], figures["lost"], figures["trained_twice"]) == (2, 0, expected)


def test_poison_reaches_an_encrypted_buffer_which_goes_on(tmp_path: Path):
    keys = RunKeys.new("run")
    config = BufferConfig(str(tmp_path), "tcp://127.0.0.1:*", 8, "prompts", groups_per_batch=2, max_staleness=1)
    server = Server(config, keys.buffer)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        chance = random.Random(0)
        answered = [send_poison(keys.clients["actor"], server.address, chance) for _ in range(5)]
        assert all(answered)
        with Connection(server.address, "launcher", keys.clients["observer"]) as launcher:
            status = launcher.call(messages.StatusRequest())
        assert isinstance(status, messages.Status)
        assert status.counts["wire_errors"] > 0 and status.counts["wrong_role"] > 0
        assert not status.closing and status.counts["leased"] == 0
    finally:
        server.stop()
        thread.join()
