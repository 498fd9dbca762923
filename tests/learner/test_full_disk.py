"""The learner while the ledger's disk is full: it waits, says so, goes on by itself, and ends when told to."""

import contextlib
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from buffer.ledger.ledger_file import LedgerFile
from buffer.transport.connection import Connection
from buffer.transport.messages import Message
from learner.algorithms.grpo import GRPO
from learner.checkpoints.manifest import newest_checkpoint
from learner.monitoring import patient_requests
from tests.learner.scripted_run import ScriptedRun
from tests.learner.test_train import assert_trained_once

pytestmark = pytest.mark.usefixtures("one_rank", "quickly")

OLD_LIMIT_SECONDS = 1.0
"""Every request of the learner with a deadline gets this one instead."""
FULL_SECONDS = 2.5
STOPPING_SECONDS = 2.0
MOMENTS = ("LearnerHello", "BatchRequest", "CheckpointBegun", "CheckpointCommitted", "EvaluationRequest", "Close")


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patient_requests, "FIRST_LINE_SECONDS", 0.2)
    monkeypatch.setattr(patient_requests, "STATUS_SECONDS", 0.2)
    monkeypatch.setattr(patient_requests, "STOPPING_SECONDS", STOPPING_SECONDS)
    monkeypatch.setattr("buffer.service.turn.SPACE_SECONDS", 0.5)


class FullDisk:
    """A run whose ledger has a small file system of its own. It fills with the first request of each of `moments`.

    A request that is sent while the disk is full anyway is not the moment's.
    """

    def __init__(self, run: ScriptedRun) -> None:
        self.run = run
        self.moments: set[str] = set()
        self.filled = threading.Event()

    def look(self, message: Message) -> None:
        """Fill the disk if this message, which is sent next, is the one for it."""
        name = type(message).__name__
        if name in self.moments and not self.filled.is_set():
            self.moments.remove(name)
            self.fill()

    def fill(self) -> None:
        """Leave no byte on the disk."""
        with (self.run.directory / "ballast").open("wb", buffering=0) as ballast:
            try:
                while True:
                    ballast.write(bytes(1 << 12))
            except OSError:
                self.filled.set()

    def free(self) -> None:
        """Make space again."""
        (self.run.directory / "ballast").unlink()
        self.filled.clear()


@pytest.fixture
def disk(
    tmp_path: Path, socket_folder: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FullDisk]:
    directory = tmp_path / "run"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(directory)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs privileges")
    try:
        for name in ("checkpoints", "weights", "tensorboard"):
            (tmp_path / name).mkdir()
            (directory / name).symlink_to(tmp_path / name)
        disk = FullDisk(ScriptedRun(directory, socket_folder, model_folder))
        request = Connection.request

        def watched(self: Connection, message: Message, timeout_seconds: float | None = None) -> Any:
            disk.look(message)
            short = timeout_seconds is not None and timeout_seconds < float("inf")
            return request(self, message, OLD_LIMIT_SECONDS if short else timeout_seconds)

        monkeypatch.setattr(Connection, "request", watched)
        try:
            yield disk
        finally:
            (directory / "ballast").unlink(missing_ok=True)
            disk.run.close()
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


def test_a_full_disk_is_waited_for_longer_than_any_deadline(disk: FullDisk, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    disk.moments = set(MOMENTS)
    disk.run.start_actor()
    said: list[list[str]] = []
    """What the learner said, by moment."""

    def lines() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.name == patient_requests.__name__]

    def make_space() -> None:
        for _ in MOMENTS:
            assert disk.filled.wait(120)
            before, left = len(lines()), set(disk.moments)
            threading.Event().wait(FULL_SECONDS)
            said.append(lines()[before:])
            assert disk.moments == left
            disk.free()

    freeing = threading.Thread(target=make_space)
    freeing.start()
    trainer, _ = disk.run.learn(GRPO(), 3, checkpoint_every=1, evaluate_every=1)
    freeing.join()
    assert trainer.version == 3 and not disk.moments
    assert_trained_once(disk.run, 3, max_staleness=2)
    assert any("no space for the ledger" in record.getMessage() for record in caplog.records)
    assert len(said) == len(MOMENTS) and all(any(line.startswith("waits for ") for line in part) for part in said), said
    assert sum(line.startswith("waited for ") for line in lines()) >= len(MOMENTS), lines()


def stop_in_the_wait(disk: FullDisk, caplog: pytest.LogCaptureFixture) -> threading.Thread:
    """Set `stopping` when the log says that the learner waits."""

    def stop() -> None:
        assert disk.filled.wait(120)
        while not any("waits for the buffer" in record.getMessage() for record in caplog.records):
            threading.Event().wait(0.05)
        disk.run.stopping.set()

    thread = threading.Thread(target=stop)
    thread.start()
    return thread


def test_a_learner_that_waits_to_begin_ends_when_told_to(disk: FullDisk, caplog: pytest.LogCaptureFixture):
    disk.moments = {"LearnerHello"}
    disk.run.start_actor()
    stopping = stop_in_the_wait(disk, caplog)
    trainer, manifests = disk.run.learn(GRPO(), 3)
    stopping.join()
    assert (trainer.version, manifests) == (0, [])
    disk.free()


def test_a_learner_that_is_told_to_end_waits_for_space_and_has_its_checkpoint(
    disk: FullDisk, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    disk.moments = {"CheckpointBegun"}
    # The question would write nothing, so the buffer could answer it between two attempts to write.
    make_durable = LedgerFile.make_durable

    def writes(file: LedgerFile) -> None:
        if disk.filled.is_set():
            file.set_meta("ballast", "x" * (1 << 16))
        make_durable(file)

    monkeypatch.setattr(LedgerFile, "make_durable", writes)
    disk.run.start_actor()
    told = threading.Event()

    def free_much_later() -> None:
        assert disk.run.stopping.wait(120)
        # Longer than a learner waits that is told to end and waits for something else.
        threading.Event().wait(3 * STOPPING_SECONDS)
        told.set()
        disk.free()

    threads = [stop_in_the_wait(disk, caplog), threading.Thread(target=free_much_later)]
    threads[1].start()
    trainer, _ = disk.run.learn(GRPO(), 3, checkpoint_every=1)
    for thread in threads:
        thread.join()
    assert told.is_set() and trainer.version == 1
    assert newest_checkpoint(disk.run.directory / "checkpoints") == disk.run.directory / "checkpoints" / "00000001"
    waits = [record.getMessage() for record in caplog.records if record.name == patient_requests.__name__]
    assert any("which waits for space on the ledger's disk" in line for line in waits), waits
    disk.run.stopping.clear()
    trainer, _ = disk.run.learn(GRPO(), 3, checkpoint_every=1)
    assert trainer.version == 3
    assert_trained_once(disk.run, 3, max_staleness=2)


def test_the_last_checkpoint_waits_for_space_on_its_own_disk(
    tmp_path: Path,
    socket_folder: Path,
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    monkeypatch.setattr("learner.train.SPACE_SECONDS", 0.2)
    directory = tmp_path / "run"
    checkpoints = directory / "checkpoints"
    checkpoints.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(checkpoints)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs privileges")
    run = ScriptedRun(directory, socket_folder, model_folder)
    try:
        with contextlib.suppress(OSError), (checkpoints / "ballast").open("wb", buffering=0) as ballast:
            while True:
                ballast.write(bytes(1 << 16))

        def make_space() -> None:
            while not any("waits for space on its disk" in record.getMessage() for record in caplog.records):
                threading.Event().wait(0.05)
            threading.Event().wait(1.0)
            assert newest_checkpoint(checkpoints) is None
            (checkpoints / "ballast").unlink()

        freeing = threading.Thread(target=make_space)
        freeing.start()
        run.start_actor()
        trainer, _ = run.learn(GRPO(), 2, checkpoint_every=1000)
        freeing.join()
        assert trainer.version == 2
        assert newest_checkpoint(checkpoints) == checkpoints / "00000002"
        assert_trained_once(run, 2, max_staleness=2)
    finally:
        run.close()
        subprocess.run(["umount", "-l", str(checkpoints)], check=True)
