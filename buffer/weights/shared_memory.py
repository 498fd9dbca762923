"""Segments: files in shared memory, each holding one version. One process writes; any process on the host maps them.

Writing to fresh shared memory is several times slower than writing to memory that was written before. A segment whose
version has retired is therefore reused for a later version.

Locks on the file keep the writer from overwriting a version that is being read. A reader holds a shared lock, the
writer an exclusive one. The kernel drops both when their process ends for any reason. A segment carries its version's
name only while its contents are complete; at other times the name ends in `.part`.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import shutil
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

log = logging.getLogger(__name__)

SPARE_SEGMENTS = 2
"""Retired segments kept for reuse. Further ones are removed."""


def max_segments(keep_versions: int) -> int:
    """Return the largest number of a writer's segments.

    They hold the kept versions, the next one, and retired ones that are still being read.
    """
    return keep_versions + 1 + SPARE_SEGMENTS


class Segment:
    """A file of `num_bytes` bytes in `folder`, mapped, and locked for writing until `publish`.

    Raises:
        OSError: when there is not enough space; no file is left behind.
    """

    def __init__(self, folder: Path, name: str, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.path = self._unfinished = folder / f"{name}.part"
        self._open()

    def _open(self) -> None:
        """Make the file at `path`, map it and lock it for writing."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._descriptor = os.open(self.path, flags, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
            # Allocate all pages now, because writing to a page without space later would be a bus error.
            os.posix_fallocate(self._descriptor, 0, self.num_bytes)
            mapped = mmap.mmap(self._descriptor, self.num_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        except OSError:
            self.remove()
            raise
        self.array: NDArray[np.uint8] = np.frombuffer(mapped, np.uint8)
        """[num_bytes] uint8: the mapped file."""

    def publish(self, name: str) -> Path:
        """Rename the complete file to `name` and let readers in. Returns the new path.

        Raises:
            OSError: when there is no room or no folder for it.
        """
        if not self._is_there():
            log.warning("%s was removed by somebody else; its contents are written to a new file", self.path)
            contents, descriptor = self.array, self._descriptor
            self._open()
            os.close(descriptor)
            self.array[:] = contents
        self.path = self.path.rename(self.path.with_name(name))
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        return self.path

    def reclaim(self) -> bool:
        """Lock the segment for writing again. Returns False when a reader still holds it.

        Raises:
            FileNotFoundError: when the file was removed by somebody else.
        """
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if not self._is_there():
            raise FileNotFoundError(f"{self.path} was removed by somebody else")
        self.path = self.path.rename(self._unfinished)
        return True

    def _is_there(self) -> bool:
        """Return whether the mapped file is still the one at `path`."""
        try:
            return os.path.samestat(os.fstat(self._descriptor), self.path.stat())
        except FileNotFoundError:
            return False

    def remove(self) -> None:
        """Delete the file. The memory is freed when no process maps it any more."""
        self.path.unlink(missing_ok=True)
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class SegmentPool:
    """The segments of one writer in `folder`. Segments that an earlier process left there are deleted.

    Used by one thread at a time.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._retired: list[Segment] = []
        self._num_made = 0
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in (*folder.glob("*.weights"), *folder.glob("*.part")):
            leftover.unlink()

    def take(self, num_bytes: int) -> Segment:
        """Return a segment to write to: a retired one of this size that no reader holds, or a new one.

        Raises:
            OSError: when there is not enough space for a new one.
        """
        for segment in [segment for segment in self._retired if segment.num_bytes == num_bytes]:
            try:
                if segment.reclaim():
                    self._retired.remove(segment)
                    return segment
            except FileNotFoundError as error:
                log.warning("%s; a new file takes its place", error)
                self._retired.remove(segment)
                segment.remove()
        self._num_made += 1
        return Segment(self._folder, f"segment-{self._num_made}", num_bytes)

    def retire(self, segment: Segment) -> None:
        """Offer `segment` for reuse. Current readers of its version may finish."""
        self._retired.append(segment)
        while len(self._retired) > SPARE_SEGMENTS:
            self._retired.pop(0).remove()

    def close(self) -> None:
        """Remove the retired segments."""
        while self._retired:
            self._retired.pop().remove()


def link_folder(folder: Path, memory: Path | None) -> Path:
    """Make `folder` a symbolic link to the folder `memory`; with None only remove such a link. Returns `folder`.

    A folder that an earlier process left in the link's place is deleted.
    """
    if folder.is_symlink():
        folder.unlink()
    if memory is not None:
        shutil.rmtree(folder, ignore_errors=True)
        memory.mkdir(parents=True, exist_ok=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.symlink_to(memory)
    return folder


def let_go(file: BinaryIO) -> None:
    """Release the lock of `hold`. An explicit unlock is needed because a mapping keeps the lock of a closed file."""
    fcntl.flock(file, fcntl.LOCK_UN)
    file.close()


def hold(path: Path) -> BinaryIO:
    """Open the segment at `path` and lock it, so that its contents stay until `let_go` or the end of this process.

    Raises:
        FileNotFoundError: when the file is gone, or its segment is being reused.
    """
    file = path.open("rb")
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        # Between open and lock the segment may have been reused for another version.
        if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            raise FileNotFoundError(f"{path} was replaced")
    except BlockingIOError as error:
        file.close()
        raise FileNotFoundError(f"{path} is being reused") from error
    except FileNotFoundError:
        file.close()
        raise
    return file
