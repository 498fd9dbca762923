"""The ledger's file: its tables, how it is opened, and its transactions.

Owned by `buffer/ledger.py`, read by `buffer/audit.py`. One process writes, enforced by a lock that dies with it; any
number may read at the same time. Everything is written inside an explicit transaction or not at all.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1
FILE_NAME = "ledger.sqlite"

_SYNCHRONOUS = {"full": "FULL", "normal": "NORMAL", "memory": "OFF"}

_TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value ANY NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE occurrences (
    occurrence INTEGER PRIMARY KEY,
    prompt_id INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('pending', 'leased', 'ready', 'used', 'done', 'dropped')),
    reason TEXT NOT NULL DEFAULT '',
    holder TEXT NOT NULL,
    actor_id TEXT NOT NULL,
    request_number INTEGER NOT NULL,
    oldest_version INTEGER NOT NULL,
    num_tokens INTEGER NOT NULL DEFAULT 0,
    used_version INTEGER,
    staleness INTEGER,
    batch_order INTEGER
) STRICT;
CREATE INDEX pending ON occurrences (occurrence) WHERE state = 'pending';
CREATE INDEX leased ON occurrences (holder, request_number) WHERE state = 'leased';
CREATE INDEX ready ON occurrences (oldest_version, occurrence) WHERE state = 'ready';
CREATE INDEX used ON occurrences (used_version, batch_order) WHERE state = 'used';
CREATE TABLE payloads (
    occurrence INTEGER PRIMARY KEY REFERENCES occurrences,
    header BLOB NOT NULL,
    arrays BLOB NOT NULL
) STRICT;
CREATE TABLE evaluations (
    requested_version INTEGER PRIMARY KEY,
    state TEXT NOT NULL CHECK (state IN ('pending', 'running', 'reported')),
    holder TEXT NOT NULL DEFAULT '',
    request_number INTEGER NOT NULL DEFAULT -1,
    report BLOB
) STRICT;
"""


class LedgerFile:
    """The only writing connection to one run's ledger.

    Raises:
        ValueError: when another process has the ledger open for writing, or it was written under another schema.
    """

    def __init__(self, run_dir: Path, durability: str) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / FILE_NAME
        self._lock = os.open(run_dir / "ledger.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise ValueError(f"{path} is in use by another buffer; stop that run or give another run_dir") from error
        # Autocommit mode: transactions begin and end only in `transaction`. The thread that opens the file may hand it
        # to the one that serves; they never use it at the same time.
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute(f"PRAGMA synchronous = {_SYNCHRONOUS[durability]}")
            self._create_or_check(path)
        except BaseException:
            self.close()
            raise

    def _create_or_check(self, path: Path) -> None:
        version = self.one("PRAGMA user_version")
        if version == 0:
            self._db.executescript(f"BEGIN IMMEDIATE; {_TABLES} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
        elif version != SCHEMA_VERSION:
            raise ValueError(
                f"{path} was written under ledger schema {version}, this program speaks {SCHEMA_VERSION};"
                " continue the run with the program that wrote it"
            )

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
