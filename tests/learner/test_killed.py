"""The learner as a real process, killed with SIGKILL at any line, over and over, until the run is done."""

import random
import re
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from buffer.ledger.ledger_file import FILE_NAME
from tests.learner.scripted_run import GROUPS_PER_BATCH, ScriptedRun

pytestmark = pytest.mark.system

ROOT = Path(__file__).parents[2]
TOTAL_STEPS = 16
SIGKILL = -9
LINES = {
    "checkpoints/checkpoint.py": 600,
    "checkpoints/manifest.py": 150,
    "checkpoints/rng.py": 20,
    "train.py": 570,
    "batch_trainer.py": 540,
    "distributed/deepspeed_engine.py": 2900,
    "weights/store.py": 1200,
    "passes.py": 900,
}
"""Approximate number of lines of each file that one life executes until shortly after its second checkpoint."""


@pytest.fixture
def run(tmp_path: Path, socket_folder: Path, model_folder: Path) -> Iterator[ScriptedRun]:
    scripted = ScriptedRun(tmp_path, socket_folder, model_folder)
    yield scripted
    scripted.close()


def occurrences(ranges: str) -> set[int]:
    found: set[int] = set()
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


class Lineage:
    """The groups that the current weights were trained on, by version, read from the learners' log."""

    def __init__(self, log: Path) -> None:
        self._log, self._read = log, 0
        self.trained: dict[int, set[int]] = {}
        self.started_at: list[int] = []

    def follow(self) -> None:
        """Read the lines that the last life wrote."""
        with self._log.open() as file:
            file.seek(self._read)
            text = file.read()
            self._read = file.tell()
        for line in text.splitlines():
            if start := re.match(r"starting at policy (\d+);", line):
                version = int(start[1])
                self.started_at.append(version)
                self.trained = {v: groups for v, groups in self.trained.items() if v < version}
            elif step := re.match(r"policy (\d+) trains on groups (\S+)$", line):
                version = int(step[1])
                # Versions are contiguous: nothing was skipped to get here.
                assert set(self.trained) == set(range(version)), (sorted(self.trained), version)
                self.trained[version] = occurrences(step[2])


def done(run_dir: Path) -> dict[int, set[int]]:
    """The done occurrences in the ledger, by the version whose batch they were in."""
    with closing(sqlite3.connect(run_dir / FILE_NAME)) as ledger:
        sql = "SELECT used_version, occurrence FROM uses JOIN occurrences USING (occurrence) WHERE state = 'done'"
        rows = ledger.execute(sql).fetchall()
    account: dict[int, set[int]] = {}
    for version, occurrence in rows:
        account.setdefault(version, set()).add(occurrence)
    return account


def test_killed_at_any_line_nothing_is_lost_and_nothing_trained_twice(
    run: ScriptedRun, tmp_path: Path, socket_folder: Path, model_folder: Path
):
    actor = run.start_actor()
    chance = random.Random(0)
    files = [*LINES] * 2
    chance.shuffle(files)
    deaths = [f"{file} {chance.randint(1, LINES[file])}" for file in files]
    command = [
        sys.executable,
        "-m",
        "tests.learner.lives",
        *map(str, (tmp_path, socket_folder, model_folder, TOTAL_STEPS)),
    ]
    lineage, statuses = Lineage(tmp_path / "learner.log"), []
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as lives:
        assert lives.stdin is not None and lives.stdout is not None
        for death in [*deaths, ". 0"]:
            print(death, file=lives.stdin, flush=True)
            statuses.append(int(lives.stdout.readline()))
            assert statuses[-1] in (SIGKILL, 0), (death, (tmp_path / "learner.log").read_text()[-3000:])
            assert run.audit().problems == (), death
            lineage.follow()
            if statuses[-1] == 0:
                break
        lives.stdin.close()
    assert statuses[-1] == 0 and len(statuses) > 6, statuses
    assert len(set(lineage.started_at)) > 3, lineage.started_at
    # The versions of the final lineage were trained on different groups, and on the same ones as the ledger says.
    assert set(lineage.trained) == set(range(TOTAL_STEPS))
    assert sum(map(len, lineage.trained.values())) == TOTAL_STEPS * GROUPS_PER_BATCH
    assert len(set().union(*lineage.trained.values())) == TOTAL_STEPS * GROUPS_PER_BATCH
    assert done(tmp_path) == lineage.trained
    # After a restart the actor loaded the older version of the checkpoint, and then newer ones again.
    assert actor.loaded[-1] == TOTAL_STEPS
    assert any(later < earlier for earlier, later in zip(actor.loaded, actor.loaded[1:], strict=False))
