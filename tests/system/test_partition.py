"""A network partition between two hosts: network namespaces joined by a cable that is slow, lossy, cut and repaired.

The launcher's host has the buffer, the learner and one actor. An actor that is started by hand has an address of its
own. Only the cable connects the two hosts: the sockets are encrypted TCP, and the weights come in chunks.
"""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.chaos import account
from buffer.ledger.audit import audit
from tests.system.cable import Cable, Quality
from tests.system.runs import ROOT, SMALL_RUN

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]

LEASE_SECONDS = 8
ECHO = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
    server.bind((sys.argv[1], 7777))
    print("ready", flush=True)
    while True:
        server.sendto(*server.recvfrom(100))
"""
ASK = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
    client.settimeout(float(sys.argv[2]))
    client.sendto(b"hello", (sys.argv[1], 7777))
    client.recv(100)
"""


@pytest.fixture
def cable() -> Iterator[Cable]:
    """The cable; skips the test without the rights of an administrator."""
    try:
        made = Cable(f"ss{os.getpid() % 100000}")
    except OSError as error:
        pytest.skip(f"network namespaces cannot be joined here: {error}")
    yield made
    made.close()


def test_the_cable_carries_delays_and_cuts(cable: Cable) -> None:
    def ping(seconds: float) -> bool:
        words = ["ip", "netns", "exec", cable.far, sys.executable, "-c", ECHO, cable.far_address]
        with subprocess.Popen(words, stdout=subprocess.PIPE) as receiver:
            assert receiver.stdout is not None
            assert receiver.stdout.readline() == b"ready\n"
            words = ["ip", "netns", "exec", cable.home, sys.executable, "-c", ASK, cable.far_address, str(seconds)]
            answered = subprocess.run(words, stderr=subprocess.DEVNULL, check=False).returncode == 0
            receiver.kill()
        return answered

    assert ping(20)
    cable.quality = Quality(delay_seconds=0.3)
    assert not ping(0.5)
    assert ping(20)
    cable.quality = Quality(loss=1.0)
    lost = cable.num_lost
    assert not ping(1.0)
    assert cable.num_lost > lost
    cable.quality = Quality()
    assert ping(20)


def wait_until(
    condition: Callable[[], bool], what: str, processes: list[subprocess.Popen[str]], seconds: float
) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert all(process.poll() is None for process in processes), f"a process ended while waiting for {what}"
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds:.0f} s"
        time.sleep(0.3)


@dataclass(frozen=True)
class Run:
    """The ledger file and the logs of a run in progress."""

    run_dir: Path

    def number(self, sql: str) -> int:
        """The number that a query of the ledger returns; 0 before the buffer listens, when there may be no ledger."""
        log = self.run_dir / "logs" / "buffer.log"
        if not log.exists() or "buffer listens" not in log.read_text():
            return 0
        with closing(sqlite3.connect(f"file:{self.run_dir / 'ledger.sqlite'}?mode=ro", uri=True)) as db:
            found = db.execute(sql).fetchone()
        return int(found[0]) if found and found[0] is not None else 0

    @property
    def version(self) -> int:
        """The learner's policy version."""
        return self.number("SELECT value FROM meta WHERE key = 'policy_version'")

    @property
    def far_groups(self) -> int:
        """Groups that the actor behind the cable has delivered."""
        return self.number(
            "SELECT COUNT(*) FROM occurrences WHERE actor_id = 'far' AND state IN ('ready', 'used', 'done')"
        )

    @property
    def far_leases(self) -> int:
        """Leases that the actor behind the cable holds."""
        return self.number("SELECT COUNT(*) FROM occurrences WHERE actor_id = 'far' AND state = 'leased'")

    @property
    def expired(self) -> int:
        """Number of expired leases."""
        return self.number("SELECT value FROM counters WHERE name = 'expired'")


def test_a_run_outlives_a_slow_a_leaky_and_a_cut_cable(cable: Cable, cache_dir: Path, tmp_path: Path) -> None:
    run, environment = Run(tmp_path / "run"), os.environ | {"SLIPSTREAM_CACHE": str(cache_dir), "PYTHONPATH": str(ROOT)}
    overrides = [
        *SMALL_RUN,
        f"run_dir={run.run_dir}",
        f"cluster.host={cable.home_address}",
        "total_steps=100000",
        f"buffer.lease_seconds={LEASE_SECONDS}",
        "actor.share_files=false",
        "algorithm=grpo",
        "learner.checkpoint_every=20",
        "learner.evaluate_every=0",
        "actor.max_groups_in_flight=8",
        # Weights that arrive late through the slow cable must still be fresh enough to sample with.
        "max_staleness=32",
    ]

    def start(namespace: str, *command: str) -> subprocess.Popen[str]:
        words = ["ip", "netns", "exec", namespace, sys.executable, *command]
        with (tmp_path / f"{namespace}.out").open("w") as output:
            return subprocess.Popen(
                words, cwd=ROOT, env=environment, text=True, stdout=output, stderr=subprocess.STDOUT
            )

    home = start(cable.home, "launch/cluster.py", *overrides)
    processes = [home]
    try:
        wait_until(lambda: run.version >= 1, "the first step", processes, 240)
        processes.append(start(cable.far, "-m", "actors", str(run.run_dir), "--name", "far"))
        wait_until(lambda: run.far_groups >= 4, "the far actor's first groups", processes, 180)

        cable.quality = Quality(delay_seconds=0.04, jitter_seconds=0.01, loss=0.03)
        lost, groups = cable.num_lost, run.far_groups

        def came_through() -> bool:
            # Frames are few and large, so many groups may arrive before the cable loses a frame.
            return run.far_groups >= groups + 4 and cable.num_lost > lost

        wait_until(came_through, "groups through a slow cable that has lost something", processes, 180)

        wait_until(lambda: run.far_leases > 0, "leases at the far actor", processes, 60)
        expired = run.expired
        cable.quality = Quality(loss=1.0)
        wait_until(lambda: run.expired > expired, "the end of the leases behind the cut", processes, 60)
        version = run.version
        wait_until(lambda: run.version >= version + 3, "training without the far actor", processes, 120)
        assert run.far_leases == 0

        cable.quality = Quality()
        groups = run.far_groups
        wait_until(lambda: run.far_groups >= groups + 4, "groups after the cable was repaired", processes, 180)
        home.send_signal(signal.SIGTERM)
        assert home.wait(timeout=60) == 0
    finally:
        for process in processes:
            process.terminate()
            process.wait(timeout=60)
    said = (tmp_path / f"{cable.home}.out").read_text()
    assert re.search(rf"stopped by SIGTERM; at checkpoint \d+, continue with: .* resume={run.run_dir}", said), said
    assert audit(run.run_dir).holds, audit(run.run_dir).problems
    figures = account(run.run_dir)
    assert figures["trained"] > 0
    assert (figures["lost"], figures["trained_twice"]) == (0, 0)
