"""TensorBoard's event file, on a disk that may be full for a while.

TensorBoard's own writer ends with the first write that fails, and may leave half a record, which hides all later ones.
Here what was written of such a record is cut off, and its event, like all later ones, waits in memory until there is
space. Nothing raises because of a full disk.
"""

from __future__ import annotations

import io
import itertools
import logging
import os
import socket
import time
from collections import deque
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]
from torch.utils.tensorboard import FileWriter, SummaryWriter

from buffer.files import has_no_space

log = logging.getLogger(__name__)

RETRY_SECONDS = 2.0
MOST_WAITING = 5_000
"""Events kept in memory; without space for more than that, the oldest are lost."""
_numbers = itertools.count()


class EventFile:
    """Appends events to a new file in `directory`. Used by torch's `FileWriter`, so the names are those it calls."""

    def __init__(self, directory: Path) -> None:
        self._directory, self._file = directory, -1
        self._size = 0
        self._waiting: deque[bytes] = deque(maxlen=MOST_WAITING)
        self._retry_at: float | None = None
        self.add_event(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def add_event(self, event: Event) -> None:
        """Write the event, after those that wait."""
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        self._waiting.append(record.getvalue())
        if self._retry_at is None or time.monotonic() >= self._retry_at:
            self.flush()

    def flush(self) -> None:
        """Write what waits. An error that is not about space is raised.

        Raises:
            OSError: when the file cannot be written for another reason than a full disk.
        """
        try:
            self._open()
            while self._waiting:
                self._append(self._waiting[0])
                self._waiting.popleft()
        except OSError as error:
            if not has_no_space(error):
                raise
            if self._retry_at is None:
                log.warning("no space for TensorBoard's events in %s; they wait", self._directory)
            self._retry_at = time.monotonic() + RETRY_SECONDS
        else:
            if self._retry_at is not None:
                log.info("TensorBoard's events are written again")
            self._retry_at = None

    def _open(self) -> None:
        if self._file < 0:
            self._directory.mkdir(parents=True, exist_ok=True)
            host, number = socket.gethostname(), next(_numbers)
            name = f"events.out.tfevents.{int(time.time()):010d}.{host}.{os.getpid()}.{number}"
            self._file = os.open(self._directory / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)

    def _append(self, record: bytes) -> None:
        """Write the whole record, or nothing of it."""
        try:
            written = 0
            while written < len(record):
                written += os.write(self._file, record[written:])
        except OSError:
            os.ftruncate(self._file, self._size)
            os.lseek(self._file, self._size, os.SEEK_SET)
            raise
        self._size += len(record)

    def close(self) -> None:
        """Write what waits, if there is space, and close the file."""
        self.flush()
        if self._waiting:
            log.warning("%d of TensorBoard's events are lost: no space in %s", len(self._waiting), self._directory)
            self._waiting.clear()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class _FileWriter(FileWriter):
    def __init__(self, directory: Path) -> None:
        self.event_writer = EventFile(directory)


def open_summary_writer(directory: Path, first_step: int) -> SummaryWriter:
    """Return a writer for `directory`. TensorBoard hides what earlier writers wrote from `first_step` on."""
    return _SummaryWriter(str(directory), purge_step=first_step)


class _SummaryWriter(SummaryWriter):
    def _get_file_writer(self) -> Any:
        # `SummaryWriter` itself sets these attributes, so mypy takes them for None.
        known: dict[str, Any] = self.__dict__
        if known["file_writer"] is None:
            writer = _FileWriter(Path(self.log_dir))
            known |= {"file_writer": writer, "all_writers": {self.log_dir: writer}}
            start = SessionLog(status=SessionLog.START)
            writer.add_event(Event(step=self.purge_step, session_log=start))
        return known["file_writer"]
