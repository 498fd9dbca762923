"""TensorBoard's events on a disk that is full for a while."""

import errno
import os
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from learner.monitoring import event_file
from learner.monitoring.event_file import open_summary_writer


class Disk:
    """Stands for the disk: when full, half of what is written gets there, then nothing more."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_full, self.error, self._write = False, errno.ENOSPC, os.write
        self._half_written = False
        monkeypatch.setattr(event_file.os, "write", self._maybe_write)

    def _maybe_write(self, file: int, data: bytes) -> int:
        if not self.is_full:
            return self._write(file, data)
        self._half_written = not self._half_written
        if self._half_written:
            return self._write(file, data[: len(data) // 2])
        raise OSError(self.error, os.strerror(self.error))


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    monkeypatch.setattr(event_file, "RETRY_SECONDS", 0.0)
    return Disk(monkeypatch)


def read(folder: Path) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("reward")] if events.Tags()["scalars"] else []


def test_a_full_disk_delays_events_and_loses_none(disk: Disk, tmp_path: Path):
    writer = open_summary_writer(tmp_path, 1)
    for step in range(1, 13):
        disk.is_full = step in (3, 4, 5, 9)
        writer.add_scalar("reward", step / 2, step)
        if step == 4:
            assert read(tmp_path) == [(1, 0.5), (2, 1.0)], "half a record would hide all later ones"
    writer.close()
    assert read(tmp_path) == [(step, step / 2) for step in range(1, 13)]


def test_a_disk_that_stays_full_harms_nobody(disk: Disk, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    writer = open_summary_writer(tmp_path, 1)
    disk.is_full = True
    writer.add_scalar("reward", 1.0, 1)
    writer.add_scalar("reward", 1.0, 2)
    writer.close()
    assert sum("no space for TensorBoard's events" in record.message for record in caplog.records) == 1
    assert f"2 of TensorBoard's events are lost: no space in {tmp_path}" in caplog.text


def test_a_disk_that_is_full_at_the_start_delays_the_file(disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    disk.is_full = True
    writer = open_summary_writer(tmp_path, 1)
    writer.add_scalar("reward", 1.0, 1)
    disk.is_full = False
    writer.close()
    assert read(tmp_path) == [(1, 1.0)]


def test_another_error_of_the_disk_is_raised(disk: Disk, tmp_path: Path):
    writer = open_summary_writer(tmp_path, 1)
    disk.is_full, disk.error = True, errno.EIO
    with pytest.raises(OSError, match="Input/output error"):
        writer.add_scalar("reward", 1.0, 1)


def test_a_resumed_run_hides_the_steps_that_it_repeats(tmp_path: Path):
    first = open_summary_writer(tmp_path, 1)
    for step in range(1, 6):
        first.add_scalar("reward", 1.0, step)
    second = open_summary_writer(tmp_path, 4)
    second.add_scalar("reward", 2.0, 4)
    for writer in (first, second):
        writer.close()
    assert read(tmp_path) == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0)]
