"""The ledger's SQLite file: tables, opening, transactions.

Owned by `buffer/ledger/ledger.py`, read by `buffer/ledger/audit.py`. One process writes; a file lock, which the kernel
drops when the process ends, excludes others. Any number of processes may read at the same time. Every write is part of
an explicit transaction.

Pages are large because groups are: the contents of a group take a few pages instead of dozens. Pages of deleted
contents are reused, and with `secure_delete` off they are not overwritten first. The file is therefore as large as the
largest number of groups whose contents were ever kept at once, plus the rows that stay. The write-ahead log is merged
into the file every `WAL_BYTES`, by another thread, so that nobody waits for the disk meanwhile (`LogMerger`). The log
grows beyond that while a reader holds an older snapshot, and is truncated afterwards.

What is short and changes often, the run's values (`meta`) and counters, is kept in memory and written once at the end
of each transaction.

`quick_check` reads the whole file, 2.5 s per million groups ever issued. It runs when the file is opened, unless the
file is as the last process left it when it closed the file (`FileMark`).
"""

from __future__ import annotations

import fcntl
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, MutableMapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from buffer.files import sync
from buffer.ledger.states import FROM_SCHEMA_5, TABLES

log = logging.getLogger(__name__)

SCHEMA_VERSION = 6
FILE_NAME = "ledger.sqlite"
PAGE_BYTES = 1 << 15
WAL_BYTES = 1 << 26
MERGE_BYTES = 1 << 25
"""Contents written since the last merge of the log after which the next one begins."""
CACHE_BYTES = 1 << 24
"""Pages kept in memory, so that a group's contents need not be read again to be deleted."""
LOCK_SECONDS = 10.0
"""How long to wait for a previous buffer process that is about to exit."""
_LOCK_POLL_SECONDS = 0.05

_MERGE = "PRAGMA wal_checkpoint(PASSIVE)"
"""Waits neither for readers nor for the writer, and copies what it can."""

_OUT_OF_SPACE = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE)
_OF_A_STATEMENT = (
    *(sqlite3.SQLITE_ERROR, sqlite3.SQLITE_TOOBIG, sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_MISMATCH),
    *(sqlite3.SQLITE_MISUSE, sqlite3.SQLITE_RANGE),
)
"""Primary error codes whose cause is a statement or its values. Every other code is about the file."""
_ABSENT = object()
_SYNCHRONOUS = {"full": "FULL", "normal": "NORMAL", "memory": "OFF"}

K = TypeVar("K")
V = TypeVar("V")

SUCCESS = "CAST(num_correct AS REAL) / num_samples"
"""SQL: the share of correct completions in a group; NULL before the group is delivered."""


class LedgerLostError(ValueError):
    """The file was deleted or replaced while in use. A restart would begin an empty ledger in its place."""


class LogSyncError(OSError):
    """The log did not get to the disk. A second attempt would prove nothing, because the kernel forgets the failure.

    The process must end: closing the ledger merges the log into the file, which writes everything once more.
    """


class LedgerFile:
    """The only writing connection to a run's ledger.

    Waits for: another process that has the file open for writing. Unblocked by: the end of that process. Gives up
    after: `LOCK_SECONDS`.

    Raises:
        ValueError: when the other process does not end, the file cannot be used, or it has another schema.
    """

    def __init__(self, run_dir: Path, durability: str) -> None:
        self._path = run_dir / FILE_NAME
        self._undo: list[Callable[[], None]] = []
        self._mark = FileMark(self._path)
        self._durability = durability
        self._merger: LogMerger | None = None
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(run_dir / "ledger.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ValueError(f"{self._path} cannot be written: {error.strerror}; choose another run_dir") from error
        try:
            self._take_lock()
            # Before SQLite opens the file and begins a log.
            self._is_checked = self._mark.fits()
            # Autocommit mode: transactions begin and end only in `transaction`. One thread may open the file and
            # another one use it, but never both at the same time.
            self._db = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
        except BaseException:
            os.close(self._lock)
            raise
        self._syncs_log = False
        try:
            self._set_up(durability)
            self._merger = LogMerger(self._path, _SYNCHRONOUS[durability])
            self._inode = self._path.stat().st_ino
            # The names of the file and its log; SQLite itself makes only the name of a log durable.
            sync(run_dir)
        except BaseException:
            self.close()
            raise

    def _take_lock(self) -> None:
        gives_up = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                return fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if time.monotonic() >= gives_up:
                    raise ValueError(
                        f"{self._path} is in use by another buffer; stop that run or give another run_dir"
                    ) from error
            time.sleep(_LOCK_POLL_SECONDS)

    def _set_up(self, durability: str) -> None:
        try:
            self._db.execute(f"PRAGMA page_size = {PAGE_BYTES}")
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute(f"PRAGMA synchronous = {_SYNCHRONOUS[durability]}")
            self._db.execute("PRAGMA secure_delete = OFF")
            # Reached only if `LogMerger` cannot keep up, or many rows and few contents are written.
            self._db.execute(f"PRAGMA wal_autocheckpoint = {2 * WAL_BYTES // PAGE_BYTES}")
            self._db.execute(f"PRAGMA journal_size_limit = {WAL_BYTES}")
            self._db.execute(f"PRAGMA cache_size = {-CACHE_BYTES // 1024}")
            found = "ok" if self._is_checked else self.one("PRAGMA quick_check(1)")
            self._mark.remove()
            if found == "ok":
                self._create_or_check(self._path)
                self._read_values()
        except sqlite3.DatabaseError as error:
            if is_out_of_space(error):
                raise
            found = error
        if found != "ok":
            reason = " ".join(str(found).split())
            raise ValueError(f"{self._path} is damaged or unusable: {reason}; restore it, or start a new run_dir")

    def check_present(self) -> None:
        """Check that the open file still exists under its path.

        Raises:
            LedgerLostError: when the file or its directory was deleted or replaced.
        """
        try:
            present = self._path.stat().st_ino == self._inode
        except OSError:
            present = False
        if not present:
            raise LedgerLostError(
                f"{self._path} was deleted or replaced while in use; what it held is lost, start a new run"
            )

    def _create_or_check(self, path: Path) -> None:
        version = self.one("PRAGMA user_version")
        if version == 0:
            self._db.executescript(f"BEGIN IMMEDIATE; {TABLES} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
        elif version == 5:
            self._db.executescript(f"BEGIN IMMEDIATE; {FROM_SCHEMA_5} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
        elif version != SCHEMA_VERSION:
            raise ValueError(
                f"{path} was written under ledger schema {version}, this program speaks {SCHEMA_VERSION};"
                " continue the run with the program that wrote it"
            )

    @property
    def num_changes(self) -> int:
        """Number of rows written since the file was opened, including those rolled back."""
        return self._db.total_changes

    def _read_values(self) -> None:
        self._values: dict[str, Any] = dict(self.rows("SELECT key, value FROM meta"))
        self._counters: dict[str, int] = dict(self.rows("SELECT name, value FROM counters"))
        self._changed: set[str] = set()
        self._counted: set[str] = set()

    def _write_values(self) -> None:
        """Write what `set_meta` and `count` changed since the last transaction."""
        for key in self._changed:
            self.write("INSERT OR REPLACE INTO meta VALUES (?, ?)", key, self._values[key])
        for name in self._counted:
            self.write("INSERT OR REPLACE INTO counters VALUES (?, ?)", name, self._counters[name])
        self._changed.clear()
        self._counted.clear()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit all writes inside the block when it ends; undo all of them when it raises."""
        self._syncs_log = False
        self._db.execute("BEGIN IMMEDIATE")
        self._undo.clear()
        try:
            yield
            self._write_values()
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            self._read_values()
            for undo in reversed(self._undo):
                undo()
            raise
        finally:
            self._undo.clear()
        if self._merger is not None:
            self._merger.committed(self._db)
        if self._syncs_log:
            # Under synchronous = NORMAL all commits since SQLite's last sync are in the log, and a sync by any
            # descriptor covers what others wrote. A second descriptor of the log does no harm; closing one of the
            # file itself would end SQLite's locks.
            try:
                sync(Path(f"{self._path}-wal"))
            except OSError as error:
                raise LogSyncError(error.errno, f"{self._path}-wal cannot be synced: {error.strerror}") from error

    def on_undo(self, undo: Callable[[], None]) -> None:
        """Call `undo` if the open transaction is undone, to restore what the caller keeps in memory."""
        self._undo.append(undo)

    def guard(self, mapping: MutableMapping[K, V], key: K) -> None:
        """Restore `mapping[key]`, or its absence, if the open transaction is undone. Call before the change."""
        before: Any = mapping.get(key, _ABSENT)

        def undo() -> None:
            if before is _ABSENT:
                mapping.pop(key, None)
            else:
                mapping[key] = before

        self._undo.append(undo)

    def make_durable(self) -> None:
        """Make the open transaction, and all before it, survive a power cut: its end then waits for the disk.

        Under the durability `memory` only until the log is next merged into the file, which is not synced.
        """
        self._check_open()
        self._syncs_log = True

    def _check_open(self) -> None:
        if not self._db.in_transaction:
            raise RuntimeError("a write to the ledger outside a transaction")

    def write(self, sql: str, *arguments: Any) -> int:
        """Run one statement inside the open transaction. Returns the number of changed rows."""
        self._check_open()
        return self._db.execute(sql, arguments).rowcount

    def write_contents(self, occurrence: int, header: bytes, arrays: bytes) -> None:
        """Store the contents of a group inside the open transaction."""
        self.write("INSERT INTO payloads VALUES (?, ?, ?)", occurrence, header, arrays)
        if self._merger is not None:
            self._merger.num_bytes += len(header) + len(arrays)

    def rows(self, sql: str, *arguments: Any) -> list[tuple[Any, ...]]:
        """Return all rows of a query."""
        return self._db.execute(sql, arguments).fetchall()

    def one(self, sql: str, *arguments: Any) -> Any:
        """Return the first value of the first row; None without rows."""
        row = self._db.execute(sql, arguments).fetchone()
        return None if row is None else row[0]

    def meta(self, key: str, default: Any) -> Any:
        """Return the run's value for `key`, or `default`."""
        return self._values.get(key, default)

    def set_meta(self, key: str, value: int | str) -> None:
        """Store the run's value for `key`, inside the open transaction."""
        self._check_open()
        self._values[key] = value
        self._changed.add(key)

    def count(self, name: str, number: int = 1) -> None:
        """Add `number` to a counter, inside the open transaction. Counters never decrease."""
        self._check_open()
        self._counters[name] = self._counters.get(name, 0) + number
        self._counted.add(name)

    def counters(self) -> dict[str, int]:
        """Return all counters: late, duplicate and unknown deliveries, reissued and rolled back groups, and others."""
        return dict(sorted(self._counters.items()))

    def close(self) -> None:
        """Close the file and let another process write."""
        if self._merger is not None:
            self._merger.close()
        self._db.close()
        if self._merger is not None and self._durability != "memory":
            self._mark.write()
        os.close(self._lock)


class LogMerger:
    """Merges the write-ahead log into the file while the buffer goes on. Call `committed` after every transaction.

    Without it the transaction that fills the log would merge it and wait for the disk: a tenth of a second and more, in
    which no message is answered. Here a thread, with a connection of its own, copies and syncs what is in the log. What
    is committed meanwhile is little; a later transaction's end merges that, and SQLite starts the log anew.

    Args:
        path: the ledger's file, which is open already.
        synchronous: the same value of SQLite's setting as for the writing connection.
    """

    def __init__(self, path: Path, synchronous: str) -> None:
        self.num_bytes = 0
        """Bytes of contents written since the last merge began; the writer adds to it."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ledger-merger")
        self._running: Future[None] | None = None
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._db.execute(f"PRAGMA synchronous = {synchronous}")

    def committed(self, writer: sqlite3.Connection) -> None:
        """Begin a merge if there is enough to do; finish one with `writer` if its larger part is done."""
        if self._running is None:
            if self.num_bytes >= MERGE_BYTES:
                self.num_bytes = 0
                self._running = self._thread.submit(_merge, self._db)
        elif self._running.done():
            self._running.result()
            self._running = None
            _merge(writer)

    def close(self) -> None:
        """End the thread and its connection. Waits for: a merge that has begun."""
        self._thread.shutdown()
        self._db.close()


def _merge(db: sqlite3.Connection) -> None:
    try:
        db.execute(_MERGE).fetchall()
    except sqlite3.Error as error:
        if not is_out_of_space(error):
            raise
        # The log keeps what could not be merged. Later merges try again.
        log.info("the ledger's log could not be merged yet: %s", error)


class FileMark:
    """A small file beside the ledger: the ledger's size and time of change when a process closed it in good order.

    As long as both are the same, nobody has written to the ledger since, and its whole check can be left out.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._mark = path, path.with_name("ledger.closed")

    def _now(self) -> str:
        found = self._path.stat()
        log = self._path.with_name(f"{FILE_NAME}-wal")
        return f"{found.st_size} {found.st_mtime_ns} {log.exists()}"

    def fits(self) -> bool:
        """Return whether the ledger is as it was closed."""
        try:
            return self._mark.read_text() == self._now()
        except OSError:
            return False

    def remove(self) -> None:
        """Forget the mark, because the ledger may change from now on."""
        with suppress(OSError):
            self._mark.unlink(missing_ok=True)

    def write(self) -> None:
        """Remember the ledger as it is. Without space for the mark the next process checks the whole ledger."""
        with suppress(OSError):
            self._mark.write_text(self._now())


def is_out_of_space(error: Exception) -> bool:
    """Return whether the file system is full. The transaction was rolled back then, and may succeed later."""
    return getattr(error, "sqlite_errorcode", 0) in _OUT_OF_SPACE


def is_about_the_file(error: Exception) -> bool:
    """Return whether SQLite cannot read or write the file, so that no message can be handled until that is repaired."""
    if isinstance(error, LogSyncError):
        return True
    code = getattr(error, "sqlite_errorcode", None)
    return isinstance(error, sqlite3.Error) and code is not None and code & 0xFF not in _OF_A_STATEMENT
