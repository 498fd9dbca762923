"""A disk that forgets at a power cut what was not fsynced: records writes below a folder, and rebuilds what is left.

SQLite's calls are recorded by a VFS, registered through ctypes, that passes every call on to SQLite's own. What Python
does is recorded by replacing functions of `os`; a file that Python wrote is recorded when it is fsynced, its name
when the folder is, and before that they count as lost. Nothing else is needed: no compiler, no tracing, no privileges.

What may be left, per file and independent of other files: everything that the last fsync of the file covered, and of
what was written later nothing, all, a beginning, or any blocks of it. A new size may be lost or kept without the
contents, which then are zeros. A name (created, replaced or removed) is certain after an fsync of its folder, or of a
file that SQLite syncs together with its folder; of later changes in a folder a beginning is left.
"""

from __future__ import annotations

import _sqlite3
import ctypes
import os
import random
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import CFUNCTYPE, POINTER, c_char_p, c_int, c_int64, c_void_p
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import pytest

BLOCK_BYTES = 512
LEDGER = "ledger.sqlite"
"""Files whose names begin so are written by SQLite."""
_WITH_FOLDER = 0x0008_0000 | 0x0000_0800
"""SQLITE_OPEN_WAL and SQLITE_OPEN_MAIN_JOURNAL: SQLite syncs the folder with the first sync of such a file."""


@dataclass(frozen=True)
class Write:
    """Bytes at an offset; or, without bytes, a new size."""

    offset: int
    contents: bytes | None


@dataclass
class Inode:
    """One file, whatever its name."""

    durable: bytes = b""
    pending: list[Write] = field(default_factory=list)
    is_folder: bool = False

    def sync(self) -> None:
        self.durable, self.pending = _written(self.durable, self.pending), []

    def left(self, chance: random.Random) -> bytes:
        """What a power cut leaves of the contents."""
        blocks = [block for write in self.pending for block in _blocks(write)]
        match chance.choice(("nothing", "all", "a beginning", "any blocks")):
            case "nothing":
                blocks = []
            case "a beginning":
                blocks = blocks[: chance.randint(0, len(blocks))]
            case "any blocks":
                share = chance.random()
                blocks = [block for block in blocks if chance.random() < share]
        return _written(self.durable, blocks)


def _written(contents: bytes, writes: list[Write]) -> bytes:
    result = bytearray(contents)
    for write in writes:
        if write.contents is None:
            del result[write.offset :]
            result.extend(bytes(write.offset - len(result)))
        else:
            result.extend(bytes(max(0, write.offset - len(result))))
            result[write.offset : write.offset + len(write.contents)] = write.contents
    return bytes(result)


def _blocks(write: Write) -> Iterator[Write]:
    if write.contents is None:
        yield write
        return
    # A size that grows may be left without the contents.
    end, start = write.offset + len(write.contents), write.offset
    while start < end:
        stop = min(end, (start // BLOCK_BYTES + 1) * BLOCK_BYTES)
        yield Write(start, write.contents[start - write.offset : stop - write.offset])
        start = stop


@dataclass(frozen=True)
class Event:
    """One call: write, size, sync, sync folder, create, create folder, rename or remove."""

    kind: str
    path: str
    offset: int = 0
    contents: bytes = b""
    target: str = ""


class ForgetfulDisk:
    """The record of all calls below `folder` since it was empty, or since the last power cut."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.events = folder, list[Event]()
        self._before: dict[str, Inode] = {}

    def add(self, kind: str, path: str | Path, *rest: Any, **more: Any) -> None:
        """Record a call, unless its file is elsewhere or SQLite's shared memory, which no power cut keeps."""
        name = os.path.relpath(path, self.folder)
        if not name.startswith("..") and not name.endswith(("-shm", ".lock")):
            self.events.append(Event(kind, name, *rest, **more))

    def cut(self, after: int, chance: random.Random, into: Path) -> None:
        """Rebuild in the empty folder `into` what a power cut after the first `after` calls leaves, and go on there."""
        inodes = dict(self._before)
        certain, pending = dict(inodes), list[tuple[str, Change]]()
        for event in self.events[:after]:
            folder = str(Path(event.path).parent)
            match event.kind:
                case "create" | "create folder" if event.path not in inodes:
                    made = inodes[event.path] = Inode(is_folder=event.kind == "create folder")
                    pending.append((folder, _naming(event.path, made)))
                case "rename":
                    pending.append((folder, _renaming(event.path, event.target)))
                    _renaming(event.path, event.target)(inodes)
                case "remove":
                    pending.append((folder, _removing(event.path)))
                    _removing(event.path)(inodes)
                case "write":
                    inodes[event.path].pending.append(Write(event.offset, event.contents))
                case "size":
                    inodes[event.path].pending.append(Write(event.offset, None))
                case "sync":
                    inodes[event.path].sync()
                case "sync folder":
                    for where, change in pending:
                        if where == event.path:
                            change(certain)
                    pending = [(where, change) for where, change in pending if where != event.path]
        for _, change in pending[: chance.randint(0, len(pending))]:
            change(certain)
        self.folder, self.events, self._before = into, [], {}
        for name, inode in sorted(certain.items()):
            # What is in a folder is gone with the name of the folder.
            if inode.is_folder and (into / name).parent.is_dir():
                (into / name).mkdir()
            elif (into / name).parent.is_dir():
                (into / name).write_bytes(inode.left(chance))
            else:
                continue
            left = b"" if inode.is_folder else (into / name).read_bytes()
            self._before[name] = Inode(left, is_folder=inode.is_folder)

    @contextmanager
    def recording(self) -> Iterator[ForgetfulDisk]:
        """Record what this process does inside the block."""
        fsync, rename, unlink, rmdir, mkdir = os.fsync, os.rename, os.unlink, os.rmdir, os.mkdir

        def recorded_fsync(descriptor: int) -> None:
            fsync(descriptor)
            path = _opened(descriptor)
            if path.is_dir():
                for file in path.iterdir():
                    self.add("create folder" if file.is_dir() else "create", file)
                return self.add("sync folder", path)
            if not path.name.startswith(LEDGER):
                self.add("create", path)
                self.add("write", path, contents=path.read_bytes())
            self.add("sync", path)

        def recorded_rename(source: Any, target: Any) -> None:
            rename(source, target)
            self.add("rename", source, target=os.path.relpath(target, self.folder))

        def recorded_mkdir(path: Any, *arguments: Any) -> None:
            mkdir(path, *arguments)
            self.add("create folder", path)

        def recorded_removal(remove: Any) -> Callable[..., None]:
            def recorded(path: Any, *, dir_fd: int | None = None) -> None:
                remove(path, dir_fd=dir_fd)
                self.add("remove", path if dir_fd is None else _opened(dir_fd) / path)

            return recorded

        functions = {"fsync": recorded_fsync, "rename": recorded_rename, "mkdir": recorded_mkdir}
        functions |= {"unlink": recorded_removal(unlink), "rmdir": recorded_removal(rmdir)}
        with mock.patch.multiple(os, **functions), _RecordingVfs(self).registered():
            yield self


Change = Callable[[dict[str, Inode]], None]


def _opened(descriptor: int) -> Path:
    return Path(f"/proc/self/fd/{descriptor}").resolve()


def _naming(name: str, inode: Inode) -> Change:
    return lambda names: names.update({name: inode})


def _renaming(source: str, target: str) -> Change:
    """Rename a file, or a folder with all that is in it."""

    def change(names: dict[str, Inode]) -> None:
        for name in [name for name in names if name == source or name.startswith(f"{source}/")]:
            names[target + name.removeprefix(source)] = names.pop(name)

    return change


def _removing(name: str) -> Change:
    return lambda names: names.pop(name, None) and None


class _Methods(ctypes.Structure):
    """sqlite3_io_methods, whose entries after xSync are passed on as they are."""

    _fields_: ClassVar[Any] = [
        ("iVersion", c_int),
        ("xClose", c_void_p),
        ("xRead", c_void_p),
        ("xWrite", c_void_p),
        ("xTruncate", c_void_p),
        ("xSync", c_void_p),
        ("others", c_void_p * 13),
    ]


class _File(ctypes.Structure):
    _fields_: ClassVar[Any] = [("pMethods", POINTER(_Methods))]


class _Vfs(ctypes.Structure):
    _fields_: ClassVar[Any] = [
        ("iVersion", c_int),
        ("szOsFile", c_int),
        ("mxPathname", c_int),
        ("pNext", c_void_p),
        ("zName", c_char_p),
        ("pAppData", c_void_p),
        ("xOpen", c_void_p),
        ("xDelete", c_void_p),
        ("others", c_void_p * 14),
    ]


_Open = CFUNCTYPE(c_int, c_void_p, c_void_p, POINTER(_File), c_int, POINTER(c_int))
"""The name is a void pointer, because SQLite reads parameters behind its end."""
_Delete = CFUNCTYPE(c_int, c_void_p, c_char_p, c_int)
_XWrite = CFUNCTYPE(c_int, c_void_p, c_void_p, c_int, c_int64)
_XTruncate = CFUNCTYPE(c_int, c_void_p, c_int64)
_XSync = CFUNCTYPE(c_int, c_void_p, c_int)


class _RecordingVfs:
    """SQLite's default VFS with recorded writes, sizes, syncs and removals."""

    def __init__(self, disk: ForgetfulDisk) -> None:
        try:
            self._library: Any = ctypes.CDLL(_sqlite3.__file__)
            find, register, unregister = (getattr(self._library, f"sqlite3_vfs_{name}") for name in _FUNCTIONS)
        except (AttributeError, OSError):
            pytest.skip("this Python's SQLite exports no functions")
        find.restype, find.argtypes = POINTER(_Vfs), [c_char_p]
        register.argtypes, unregister.argtypes = [POINTER(_Vfs), c_int], [POINTER(_Vfs)]
        self._register, self._unregister = register, unregister
        self._disk = disk
        self._below = find(None)
        self._kept: list[Any] = []
        """What SQLite has pointers to."""

    @contextmanager
    def registered(self) -> Iterator[None]:
        """Make this the VFS of all files opened inside the block."""
        ours = _Vfs.from_buffer_copy(self._below.contents)
        below_open, below_delete = _Open(ours.xOpen), _Delete(ours.xDelete)

        def opened(_: Any, name: int | None, file: Any, flags: int, out: Any) -> int:
            status = below_open(ctypes.cast(self._below, c_void_p), name, file, flags, out)
            if status == sqlite3.SQLITE_OK and name and file.contents.pMethods:
                path = os.fsdecode(ctypes.string_at(name))
                self._disk.add("create", path)
                self._record(file.contents, path, syncs_folder=bool(flags & _WITH_FOLDER))
            return int(status)

        def deleted(_: Any, name: bytes, syncs_folder: int) -> int:
            status = below_delete(ctypes.cast(self._below, c_void_p), name, syncs_folder)
            if status == sqlite3.SQLITE_OK:
                self._disk.add("remove", os.fsdecode(name))
                if syncs_folder:
                    self._disk.add("sync folder", Path(os.fsdecode(name)).parent)
            return int(status)

        callbacks = _Open(opened), _Delete(deleted)
        ours.xOpen, ours.xDelete = (ctypes.cast(callback, c_void_p) for callback in callbacks)
        ours.zName = b"recording"
        self._kept += [ours, callbacks]
        self._register(ctypes.byref(ours), 1)
        try:
            yield
        finally:
            self._unregister(ctypes.byref(ours))
            self._register(self._below, 1)

    def _record(self, file: _File, path: str, *, syncs_folder: bool) -> None:
        disk, methods = self._disk, _Methods.from_buffer_copy(file.pMethods.contents)
        below_write, below_truncate, below_sync = (
            _XWrite(methods.xWrite),
            _XTruncate(methods.xTruncate),
            _XSync(methods.xSync),
        )
        folder_is_due = syncs_folder

        def write(this: int, data: int, length: int, offset: int) -> int:
            disk.add("write", path, offset=offset, contents=ctypes.string_at(data, length))
            return int(below_write(this, data, length, offset))

        def truncate(this: int, size: int) -> int:
            disk.add("size", path, offset=size)
            return int(below_truncate(this, size))

        def sync(this: int, flags: int) -> int:
            nonlocal folder_is_due
            status = int(below_sync(this, flags))
            disk.add("sync", path)
            if folder_is_due:
                disk.add("sync folder", Path(path).parent)
            folder_is_due = False
            return status

        callbacks = _XWrite(write), _XTruncate(truncate), _XSync(sync)
        methods.xWrite, methods.xTruncate, methods.xSync = (ctypes.cast(c, c_void_p) for c in callbacks)
        self._kept += [methods, callbacks]
        file.pMethods = ctypes.pointer(methods)


_FUNCTIONS = ("find", "register", "unregister")
