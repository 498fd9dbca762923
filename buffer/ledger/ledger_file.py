"""The ledger's SQLite file: tables, opening, transactions.

Owned by `buffer/ledger/ledger.py`, read by `buffer/ledger/audit.py`. One process writes; a file lock, which the kernel
drops when the process ends, excludes others. Any number of processes may read at the same time. Every write is part of
an explicit transaction.

Pages are large because groups are: the contents of a group take a few pages instead of dozens. Pages of deleted
contents are reused, and with `secure_delete` off they are not overwritten first. The file is therefore as large as the
largest number of groups whose contents were ever kept at once, plus the rows that stay. SQLite checkpoints the
write-ahead log into the file every `WAL_BYTES`. The log grows beyond that only while a reader holds an older snapshot,
and is truncated afterwards.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from buffer.ledger.states import STATES, enforcing_triggers

SCHEMA_VERSION = 5
FILE_NAME = "ledger.sqlite"
PAGE_BYTES = 1 << 15
WAL_BYTES = 1 << 26
LOCK_SECONDS = 10.0
"""How long to wait for a previous buffer process that is about to exit."""
_LOCK_POLL_SECONDS = 0.05

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

_TABLES = f"""
CREATE TABLE meta (key TEXT PRIMARY KEY, value ANY NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE occurrences (
    occurrence INTEGER PRIMARY KEY,
    prompt_id INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    state TEXT NOT NULL CHECK (state IN {STATES}),
    reason TEXT NOT NULL DEFAULT '',
    holder TEXT NOT NULL,
    actor_id TEXT NOT NULL,
    request_number INTEGER NOT NULL,
    oldest_version INTEGER NOT NULL,
    num_tokens INTEGER NOT NULL DEFAULT 0,
    num_tokens_squared INTEGER NOT NULL DEFAULT 0,
    useful_version INTEGER,
    reward_spread REAL,
    num_stale INTEGER NOT NULL DEFAULT 0,
    num_samples INTEGER,
    num_correct INTEGER
) STRICT;
CREATE INDEX pending ON occurrences (occurrence) WHERE state = 'pending';
CREATE INDEX leased ON occurrences (holder, request_number) WHERE state = 'leased';
CREATE INDEX ready ON occurrences (oldest_version, occurrence) WHERE state = 'ready';
CREATE INDEX used ON occurrences (occurrence) WHERE state = 'used';
CREATE TABLE uses (
    used_version INTEGER NOT NULL,
    batch_order INTEGER NOT NULL,
    occurrence INTEGER NOT NULL REFERENCES occurrences,
    PRIMARY KEY (used_version, batch_order),
    UNIQUE (occurrence, used_version)
) STRICT, WITHOUT ROWID;
CREATE TABLE payloads (
    occurrence INTEGER PRIMARY KEY REFERENCES occurrences,
    header BLOB NOT NULL,
    arrays BLOB NOT NULL
) STRICT;
CREATE TABLE stages (
    stage INTEGER PRIMARY KEY,
    first_occurrence INTEGER NOT NULL,
    policy_version INTEGER NOT NULL,
    began_at REAL NOT NULL,
    success_before REAL NOT NULL,
    groups_before INTEGER NOT NULL,
    epoch INTEGER NOT NULL,
    epoch_first_occurrence INTEGER NOT NULL,
    num_passed_over INTEGER NOT NULL,
    passed_over BLOB NOT NULL
) STRICT;
CREATE TABLE evaluations (
    requested_version INTEGER PRIMARY KEY,
    state TEXT NOT NULL CHECK (state IN ('pending', 'running', 'reported')),
    holder TEXT NOT NULL DEFAULT '',
    request_number INTEGER NOT NULL DEFAULT -1,
    report BLOB
) STRICT;
{enforcing_triggers()}"""


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
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(run_dir / "ledger.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ValueError(f"{self._path} cannot be written: {error.strerror}; choose another run_dir") from error
        try:
            self._take_lock()
            # Autocommit mode: transactions begin and end only in `transaction`. One thread may open the file and
            # another one use it, but never both at the same time.
            self._db = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
        except BaseException:
            os.close(self._lock)
            raise
        self._syncs_log = False
        try:
            self._set_up(durability)
            self._inode = self._path.stat().st_ino
            # The names of the file and its log; SQLite itself makes only the name of a log durable.
            _sync(run_dir)
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
            self._db.execute(f"PRAGMA wal_autocheckpoint = {WAL_BYTES // PAGE_BYTES}")
            self._db.execute(f"PRAGMA journal_size_limit = {WAL_BYTES}")
            self._create_or_check(self._path)
            found = self.one("PRAGMA quick_check(1)")
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
            self._db.executescript(f"BEGIN IMMEDIATE; {_TABLES} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
        elif version != SCHEMA_VERSION:
            raise ValueError(
                f"{path} was written under ledger schema {version}, this program speaks {SCHEMA_VERSION};"
                " continue the run with the program that wrote it"
            )

    @property
    def num_changes(self) -> int:
        """Number of rows written since the file was opened, including those rolled back."""
        return self._db.total_changes

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit all writes inside the block when it ends; undo all of them when it raises."""
        self._syncs_log = False
        self._db.execute("BEGIN IMMEDIATE")
        self._undo.clear()
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            for undo in reversed(self._undo):
                undo()
            raise
        finally:
            self._undo.clear()
        if self._syncs_log:
            # Under synchronous = NORMAL all commits since SQLite's last sync are in the log, and a sync by any
            # descriptor covers what others wrote. A second descriptor of the log does no harm; closing one of the
            # file itself would end SQLite's locks.
            try:
                _sync(Path(f"{self._path}-wal"))
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
        if not self._db.in_transaction:
            raise RuntimeError("make_durable outside a transaction")
        self._syncs_log = True

    def write(self, sql: str, *arguments: Any) -> int:
        """Run one statement inside the open transaction. Returns the number of changed rows."""
        if not self._db.in_transaction:
            raise RuntimeError(f"{sql[:40]!r} outside a transaction")
        return self._db.execute(sql, arguments).rowcount

    def rows(self, sql: str, *arguments: Any) -> list[tuple[Any, ...]]:
        """Return all rows of a query."""
        return self._db.execute(sql, arguments).fetchall()

    def one(self, sql: str, *arguments: Any) -> Any:
        """Return the first value of the first row; None without rows."""
        row = self._db.execute(sql, arguments).fetchone()
        return None if row is None else row[0]

    def meta(self, key: str, default: Any) -> Any:
        """Return the run's value for `key`, or `default`."""
        value = self.one("SELECT value FROM meta WHERE key = ?", key)
        return default if value is None else value

    def set_meta(self, key: str, value: int | str) -> None:
        """Store the run's value for `key`."""
        self.write("INSERT OR REPLACE INTO meta VALUES (?, ?)", key, value)

    def count(self, name: str, number: int = 1) -> None:
        """Add `number` to a counter. Counters never decrease."""
        sql = "INSERT INTO counters VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = value + excluded.value"
        self.write(sql, name, number)

    def counters(self) -> dict[str, int]:
        """Return all counters: late, duplicate and unknown deliveries, reissued and rolled back groups, and others."""
        return dict(self.rows("SELECT name, value FROM counters ORDER BY name"))

    def close(self) -> None:
        """Close the file and let another process write."""
        self._db.close()
        os.close(self._lock)


def _sync(path: Path) -> None:
    """Wait until everything written to the file is on the disk; for a folder: the names in it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_out_of_space(error: Exception) -> bool:
    """Return whether the file system is full. The transaction was rolled back then, and may succeed later."""
    return getattr(error, "sqlite_errorcode", 0) in _OUT_OF_SPACE


def is_about_the_file(error: Exception) -> bool:
    """Return whether SQLite cannot read or write the file, so that no message can be handled until that is repaired."""
    if isinstance(error, LogSyncError):
        return True
    code = getattr(error, "sqlite_errorcode", None)
    return isinstance(error, sqlite3.Error) and code is not None and code & 0xFF not in _OF_A_STATEMENT
