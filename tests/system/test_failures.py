"""Failures of a real run: its processes are killed, frozen and abandoned, and the ledger accounts for all prompts."""

from __future__ import annotations

import re
import shlex
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from benchmarks.chaos import account
from buffer.ledger.audit import audit
from tests.system.runs import Launch, Traces, finish, reward_curve

pytestmark = [pytest.mark.system, pytest.mark.timeout(420)]

GROUPS_PER_BATCH = 8
SMALL_AND_QUICK = ("algorithm=grpo", "actor.evaluation_prompts=8", "learner.checkpoint_every=2")


@dataclass
class Run:
    """A run in progress."""

    process: subprocess.Popen[str]
    """Its launcher."""
    run_dir: Path

    def until(self, condition: Callable[[], object], seconds: float = 150.0) -> None:
        """Waits for: `condition`. Gives up after: `seconds`, or when the run ends."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < deadline, "nothing happened"
            time.sleep(0.1)

    def log(self, name: str) -> str:
        path = self.run_dir / "logs" / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def until_trained(self, batches: int) -> None:
        """Waits for: `batches` further batches, also of a restarted learner."""
        wanted = self.log("learner").count("trains on groups") + batches
        self.until(lambda: self.log("learner").count("trains on groups") >= wanted)

    def process_of(self, *words: str) -> psutil.Process:
        """The launcher's child whose command line ends with `words`."""
        children = psutil.Process(self.process.pid).children()
        # A killed child has no command line until the launcher has waited for it.
        alive = [child for child in children if child.status() != psutil.STATUS_ZOMBIE]
        [found] = [child for child in alive if tuple(child.cmdline()[-len(words) :]) == words]
        return found

    @property
    def processes(self) -> list[psutil.Process]:
        """All descendants of the launcher."""
        return psutil.Process(self.process.pid).children(recursive=True)


def assert_nothing_lost(run_dir: Path, steps: int) -> None:
    """Asserts that every batch was full and is in the final weights exactly once, and that prompts came in order."""
    found = account(run_dir)
    assert (found["lost"], found["trained_twice"], found["dropped"]) == (0, 0, {})
    assert found["invariant_holds"], found["problems"]
    with closing(sqlite3.connect(f"file:{run_dir}/ledger.sqlite?mode=ro", uri=True)) as db:
        batches = db.execute(
            "SELECT used_version, count(*) FROM uses JOIN occurrences USING (occurrence)"
            " WHERE state = 'done' GROUP BY 1"
        ).fetchall()
        issued = [row[0] for row in db.execute("SELECT occurrence FROM occurrences ORDER BY 1")]
    assert batches == [(version, GROUPS_PER_BATCH) for version in range(steps)]
    assert issued == list(range(found["issued"]))


def test_everybody_may_die_or_freeze_while_the_run_goes_on(launch: Launch, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    overrides = (
        *SMALL_AND_QUICK,
        "total_steps=100000",
        "cluster.num_actors=2",
        "cluster.max_restarts=3",
        "buffer.lease_seconds=6",
    )
    run = Run(launch(run_dir, *overrides), run_dir)
    run.until(lambda: all("loaded, generation paused" in run.log(f"actor-{number}") for number in (0, 1)))
    run.until_trained(3)
    run.process_of("--name", "actor-0").kill()
    run.until_trained(3)

    frozen = run.process_of("--name", "actor-1")
    run.until(lambda: freeze_at_work(frozen, "actor-1", run_dir))
    run.until(lambda: re.search(r"actor-1\S* was silent", run.log("buffer")))
    frozen.resume()
    run.until_trained(3)

    run.process_of("-m", "learner", str(run_dir)).kill()
    run.until_trained(3)
    run.process_of("serve", str(run_dir)).kill()
    run.until_trained(3)
    # Each was away for a while, as long as an engine takes to start. Otherwise both run at the same speed.
    run.until(lambda: fair(contributions(run_dir, name) for name in ("actor-0", "actor-1")))

    traces = Traces.of(run.processes)
    run.process.terminate()
    [trained] = re.findall(r"stopped by SIGTERM; at checkpoint (\d+), continue with: ", finish(run.process, run_dir))
    assert_nothing_lost(run_dir, int(trained))
    for name in ("actor-0", "learner", "buffer"):
        assert f"{name} ended with status -9" in run.log("launcher")
    assert "actor-1 ended" not in run.log("launcher")
    assert not traces.left()


def test_a_killed_launcher_leaves_nothing_and_the_run_goes_on_at_once(launch: Launch, tmp_path: Path) -> None:
    """And Ctrl-C ends everything with a checkpoint."""
    run_dir = tmp_path / "run"
    run = Run(launch(run_dir, *SMALL_AND_QUICK, "total_steps=100000"), run_dir)
    run.until(lambda: "another actor joins with:" in run.log("launcher"))
    run.until_trained(2)
    [command] = re.findall(r"another actor joins with: (.*)", run.log("launcher"))
    with (tmp_path / "by-hand.log").open("w") as log:
        by_hand = subprocess.Popen(shlex.split(command), cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT)
    run.until(lambda: contributions(run_dir, f"-{by_hand.pid}") >= 2)
    children = psutil.Process(by_hand.pid).children(recursive=True)
    by_hand.kill()
    by_hand.wait()
    assert not psutil.wait_procs(children, timeout=30)[1]

    traces = Traces.of(run.processes)
    run.process_of("serve", str(run_dir)).suspend()
    run.process.kill()
    run.process.communicate()
    deadline = time.monotonic() + 30
    while traces.left():
        assert time.monotonic() < deadline, traces.left()
        time.sleep(0.1)

    before = newest_checkpoint(run_dir)
    # Only Ctrl-C makes a further checkpoint.
    again = Run(launch(run_dir, f"resume={run_dir}", "learner.checkpoint_every=1000", small=False), run_dir)
    again.until(lambda: f"policy {before + 3} published" in again.log("learner").rpartition("starting at policy")[2])
    processes = again.processes
    traces = Traces.of(processes)
    again.process.send_signal(signal.SIGINT)
    output, _ = again.process.communicate(timeout=30)
    assert again.process.returncode == 130, output
    assert not psutil.wait_procs(processes, timeout=2)[1]
    assert not traces.left()
    assert "Exception ignored" not in again.log("actor-0")
    [last] = re.findall(rf"at checkpoint (\d+), continue with: .* resume={run_dir}", output)
    assert newest_checkpoint(run_dir) == int(last) >= before + 3
    assert_nothing_lost(run_dir, int(last))
    assert [step for step, _ in reward_curve(run_dir)] == list(range(1, int(last) + 1))


def newest_checkpoint(run_dir: Path) -> int:
    """The version of the newest checkpoint."""
    return max(int(path.name) for path in (run_dir / "checkpoints").iterdir() if path.name.isdigit())


def fair(groups: Iterable[int]) -> bool:
    """Return whether the actor with the fewest groups made at least a tenth of them all."""
    numbers = list(groups)
    return min(numbers) >= sum(numbers) / 10


def contributions(run_dir: Path, actor: str) -> int:
    """Number of groups in batches that came from the actor whose id ends with `actor`."""
    with closing(sqlite3.connect(f"file:{run_dir}/ledger.sqlite?mode=ro", uri=True)) as db:
        trained = "SELECT count(*) FROM occurrences WHERE state IN ('used', 'done') AND actor_id LIKE ?"
        return int(db.execute(trained, (f"%{actor}",)).fetchone()[0])


def freeze_at_work(process: psutil.Process, actor: str, run_dir: Path) -> bool:
    """Freezes an actor. If it holds no leases, the test would show nothing: resumes it and returns False."""
    process.suspend()
    # Messages that the actor has sent may still be on their way.
    time.sleep(0.3)
    with closing(sqlite3.connect(f"file:{run_dir}/ledger.sqlite?mode=ro", uri=True)) as db:
        leased = "SELECT count(*) FROM occurrences WHERE state = 'leased' AND holder LIKE ?"
        holds = bool(db.execute(leased, (f"{actor}%",)).fetchone()[0])
    if not holds:
        process.resume()
    return holds


def test_a_removed_run_directory_ends_everything_with_one_sentence(launch: Launch, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run = Run(launch(run_dir, *SMALL_AND_QUICK, "total_steps=100000"), run_dir)
    run.until_trained(2)
    traces = Traces.of(run.processes)
    # Renamed and not deleted: a process may be writing a new file into the folder at that moment.
    run_dir.rename(tmp_path / "removed")
    output, _ = run.process.communicate(timeout=60)
    assert run.process.returncode == 1, output
    assert re.search(r"error: run_dir=\S*run was removed", output), output
    assert "Traceback" not in output
    assert not traces.left()
    assert audit(tmp_path / "removed").holds
