"""Files in shared memory that hold one version each, written by one process, mapped by any on this host, and reused.

Fresh shared memory is several times slower to write than memory that was written before, so a segment whose version has
retired takes a later one. Nobody is overwritten while reading: a reader holds a shared lock on the file, the writer an
exclusive one, and the kernel lets go of both when their process ends, however it ends. A segment has its version's name
only while it is whole; before that it is called `*.part`.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import shutil
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

SPARE_SEGMENTS = 2
"""Retired segments that are kept for reuse; of more than these the memory is given back."""


def max_segments(keep_versions: int) -> int:
    """Slots that a writer has at most: of the versions it keeps, of the next one, and retired ones still being read."""
    return keep_versions + 1 + SPARE_SEGMENTS


class Segment:
    """`num_bytes` of memory under a name in `folder`, locked for writing until `publish`.

    Raises:
        OSError: when there is no room; nothing is left behind.
    """

    def __init__(self, folder: Path, name: str, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.path = self._unfinished = folder / f"{name}.part"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._descriptor = os.open(self.path, flags, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
            # Taken now: a mapped page for which there is no room later would be a bus error.
            os.posix_fallocate(self._descriptor, 0, num_bytes)
            mapped = mmap.mmap(self._descriptor, num_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        except OSError:
            self.remove()
            raise
        self.array: NDArray[np.uint8] = np.frombuffer(mapped, np.uint8)
        """[num_bytes] uint8: the segment's memory."""

    def publish(self, name: str) -> Path:
        """Give the finished contents their name and let readers in."""
        self.path = self.path.rename(self.path.with_name(name))
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        return self.path

    def reclaim(self) -> bool:
        """Take the segment back for writing. False when somebody still reads it."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        self.path = self.path.rename(self._unfinished)
        return True

    def remove(self) -> None:
        """Give the memory back as soon as nobody maps it; the segment is of no use afterwards."""
        self.path.unlink(missing_ok=True)
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class SegmentPool:
    """The segments of one writer in `folder`, which is emptied of an earlier one's. Used by one thread at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._retired: list[Segment] = []
        self._num_made = 0
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in (*folder.glob("*.weights"), *folder.glob("*.part")):
            leftover.unlink()

    def take(self, num_bytes: int) -> Segment:
        """A segment to write: a retired one that nobody reads any more, or a fresh one.

        Raises:
            OSError: when there is no room for a fresh one.
        """
        for segment in self._retired:
            if segment.num_bytes == num_bytes and segment.reclaim():
                self._retired.remove(segment)
                return segment
        self._num_made += 1
        return Segment(self._folder, f"segment-{self._num_made}", num_bytes)

    def retire(self, segment: Segment) -> None:
        """The version in `segment` is not wanted any more; whoever reads it may finish."""
        self._retired.append(segment)
        while len(self._retired) > SPARE_SEGMENTS:
            self._retired.pop(0).remove()

    def close(self) -> None:
        """Remove the retired segments."""
        while self._retired:
            self._retired.pop().remove()


def link_folder(folder: Path, memory: Path | None) -> Path:
    """Let `folder` lead to the folder `memory`, or nowhere, whatever it was to an earlier process. Returns `folder`."""
    if folder.is_symlink():
        folder.unlink()
    if memory is not None:
        shutil.rmtree(folder, ignore_errors=True)
        memory.mkdir(parents=True, exist_ok=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.symlink_to(memory)
    return folder


def let_go(file: BinaryIO) -> None:
    """End what `hold` began, also where the file is still mapped: a mapping keeps the file's lock."""
    fcntl.flock(file, fcntl.LOCK_UN)
    file.close()


def hold(path: Path) -> BinaryIO:
    """The finished file at `path`, locked so that its contents stay until `let_go`, or until this process ends.

    Raises:
        FileNotFoundError: it is gone, or its memory is being reused.
    """
    file = path.open("rb")
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        # Between opening and locking it may have become another version's.
        if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            raise FileNotFoundError(f"{path} was replaced")
    except BlockingIOError as error:
        file.close()
        raise FileNotFoundError(f"{path} is being reused") from error
    except FileNotFoundError:
        file.close()
        raise
    return file
