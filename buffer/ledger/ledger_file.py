"""The ledger's file: its tables, how it is opened, and its transactions.

Owned by `buffer/ledger/ledger.py`, read by `buffer/ledger/audit.py`. One process writes, enforced by a lock that dies
with it; any number may read at the same time. Everything is written inside an explicit transaction or not at all.

Large pages, because a group is large: its contents are a few pages instead of dozens. Contents of done groups are
deleted, their pages are used again, and without `secure_delete` they are not overwritten first. So the file is as
large as the most groups that were ever outstanding, plus the rows that stay. The write-ahead log is folded into the
file every `WAL_BYTES`; it grows past that only while a reader holds an older snapshot, and is cut back afterwards.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from buffer.ledger.states import STATES, enforcing_triggers

SCHEMA_VERSION = 5
FILE_NAME = "ledger.sqlite"
PAGE_BYTES = 1 << 15
WAL_BYTES = 1 << 26
LOCK_SECONDS = 10.0
"""How long to wait for a predecessor that is about to die."""
_LOCK_POLL_SECONDS = 0.05

_OUT_OF_SPACE = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE)
_SYNCHRONOUS = {"full": "FULL", "normal": "NORMAL", "memory": "OFF"}

SUCCESS = "CAST(num_correct AS REAL) / num_samples"
"""SQL: the share of correct completions in a group; NULL before it is delivered."""

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


class LedgerFile:
    """The only writing connection to one run's ledger.

    Waits for: another process that has it open for writing. Unblocked by: its end. Gives up after: `LOCK_SECONDS`.

    Raises:
        ValueError: when that process does not end, or the file cannot be used or was written under another schema.
    """

    def __init__(self, run_dir: Path, durability: str) -> None:
        self._path = run_dir / FILE_NAME
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(run_dir / "ledger.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ValueError(f"{self._path} cannot be written: {error.strerror}; choose another run_dir") from error
        try:
            self._take_lock()
            # Autocommit mode: transactions begin and end only in `transaction`. The thread that opens the file may
            # hand it to the one that serves; they never use it at the same time.
            self._db = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
        except BaseException:
            os.close(self._lock)
            raise
        try:
            self._set_up(durability)
            self._inode = self._path.stat().st_ino
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
        """The file is still the one that was opened.

        Raises:
            ValueError: when it, or its directory, was deleted or replaced.
        """
        try:
            present = self._path.stat().st_ino == self._inode
        except OSError:
            present = False
        if not present:
            raise ValueError(
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
        """Rows written since the file was opened; what was rolled back counts too."""
        return self._db.total_changes

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All writes inside are kept together when it ends, or none of them when it raises."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    def write(self, sql: str, *arguments: Any) -> int:
        """Run one statement inside the open transaction; returns the number of rows it changed."""
        if not self._db.in_transaction:
            raise RuntimeError(f"{sql[:40]!r} outside a transaction")
        return self._db.execute(sql, arguments).rowcount

    def rows(self, sql: str, *arguments: Any) -> list[tuple[Any, ...]]:
        """All rows of a query."""
        return self._db.execute(sql, arguments).fetchall()

    def one(self, sql: str, *arguments: Any) -> Any:
        """The first value of the first row, None without rows."""
        row = self._db.execute(sql, arguments).fetchone()
        return None if row is None else row[0]

    def meta(self, key: str, default: Any) -> Any:
        """A stored fact of the run, or `default`."""
        value = self.one("SELECT value FROM meta WHERE key = ?", key)
        return default if value is None else value

    def set_meta(self, key: str, value: int | str) -> None:
        """Store a fact of the run."""
        self.write("INSERT OR REPLACE INTO meta VALUES (?, ?)", key, value)

    def count(self, name: str, number: int = 1) -> None:
        """Add to a counter; counters only grow."""
        sql = "INSERT INTO counters VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = value + excluded.value"
        self.write(sql, name, number)

    def counters(self) -> dict[str, int]:
        """Late, duplicate and unknown copies, reissued and rolled back groups, and whatever else was counted."""
        return dict(self.rows("SELECT name, value FROM counters ORDER BY name"))

    def close(self) -> None:
        """Close the file and let another process write."""
        self._db.close()
        os.close(self._lock)


def is_out_of_space(error: sqlite3.Error) -> bool:
    """Whether the file system took no more: waiting may help, and nothing of the transaction was kept."""
    return getattr(error, "sqlite_errorcode", 0) in _OUT_OF_SPACE
