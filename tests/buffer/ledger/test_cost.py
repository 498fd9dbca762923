"""What opening the ledger, dropping, undoing and merging the log cost: what is live, and not what was ever issued."""

import contextlib
import os
import re
import sqlite3
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from buffer.ledger import ledger_file
from buffer.ledger.audit import audit
from buffer.ledger.ledger import Holder, Ledger
from buffer.ledger.ledger_file import FILE_NAME, LedgerFile
from buffer.ledger.states import FROM_SCHEMA_5

HOLDER = Holder("actor-0-aa", "actor-0", 1)


def lease(ledger: Ledger) -> tuple[str, int]:
    with ledger.transaction():
        return ledger.issue(HOLDER, 0, 0.0)


def with_many_done(ledger: Ledger, number: int) -> None:
    """Add done occurrences behind the ledger's back, as a long run leaves them."""
    rows = ", ".join(f"({k}, {k % 10}, 0, 'leased', 'a', 'a', 1, 0)" for k in range(number))
    columns = "occurrence, prompt_id, attempt, state, holder, actor_id, request_number, oldest_version"
    with ledger.transaction():
        ledger.file.write(f"INSERT INTO occurrences ({columns}) VALUES {rows}")
        for state in ("ready", "used", "done"):
            ledger.file.write(f"UPDATE occurrences SET state = '{state}'")
        ledger.file.write("INSERT INTO uses SELECT occurrence, 0, occurrence FROM occurrences")
        ledger.counts["done"] += number
        ledger.file.set_meta("issued", number)


def test_opening_dropping_and_undoing_read_no_row_of_what_is_done(make_config: Any, make_group: Any):
    """SQLite counts the instructions of its machine: as many with 10 done groups as with 3,000."""
    steps = {}
    for number in (10, 3_000):
        config = make_config(run_dir=make_config().run_dir + f"/{number}", on_stale="drop", max_staleness=2)
        ledger = Ledger(config, 0.0)
        with_many_done(ledger, number)
        ledger.close()
        ledger = Ledger(config, 0.0)
        counted = 0

        def step() -> int:
            nonlocal counted
            counted += 1
            return 0

        group_id, prompt_id = lease(ledger)
        with ledger.transaction():
            assert ledger.deliver(make_group(group_id, prompt_id, 0), 0) == "stored"
        ledger.file._db.set_progress_handler(step, 1)
        with ledger.transaction():
            assert ledger.drop_stale(9) == 1
        with contextlib.suppress(KeyError), ledger.transaction():
            ledger.issue(HOLDER, 0, 0.0)
            raise KeyError
        ledger._load()
        ledger.file._db.set_progress_handler(None, 1)
        assert (ledger.counts["done"], ledger.counts["pending"], ledger.counts["leased"]) == (number, 1, 0)
        assert audit(config.run_dir).problems == ()
        steps[number] = counted
        ledger.close()
    assert steps[3_000] < 1.2 * steps[10]


def test_stored_counts_that_are_wrong_are_found(make_config: Any):
    config = make_config()
    ledger = Ledger(config, 0.0)
    lease(ledger)
    with ledger.transaction():
        ledger.file.write("UPDATE state_counts SET value = value + 1 WHERE name = 'leased'")
    assert audit(config.run_dir).problems == ("1 states whose stored number of occurrences is wrong",)
    ledger.close()


def test_a_ledger_of_the_schema_before_gets_its_counts_when_it_is_opened(make_config: Any):
    config = make_config()
    ledger = Ledger(config, 0.0)
    for _ in range(3):
        lease(ledger)
    with ledger.transaction():
        ledger.give_back("1.0", HOLDER.name, "")
        ledger.give_back("2.0", HOLDER.name, "unscored")
        for table in set(re.findall(r"CREATE TABLE (\w+)", FROM_SCHEMA_5)):
            ledger.file.write(f"DROP TABLE {table}")
        ledger.counts = ledger._saved_counts.copy()
    ledger.file._db.execute("PRAGMA user_version = 5")
    ledger.close()
    reopened = Ledger(config, 0.0)
    assert +reopened.counts == Counter({"leased": 1, "pending": 1, "dropped:unscored": 1})
    assert audit(config.run_dir).problems == ()
    reopened.close()


def test_a_ledger_is_checked_as_a_whole_unless_it_is_as_it_was_closed(
    make_config: Any, monkeypatch: pytest.MonkeyPatch
):
    config, asked = make_config(durability="normal"), []
    one = LedgerFile.one
    monkeypatch.setattr(LedgerFile, "one", lambda file, sql, *rest: asked.append(sql) or one(file, sql, *rest))

    def is_checked() -> bool:
        asked.clear()
        Ledger(config, 0.0).close()
        return "PRAGMA quick_check(1)" in asked

    assert is_checked(), "it is new"
    assert not is_checked()
    os.utime(Path(config.run_dir) / FILE_NAME)
    assert is_checked(), "somebody wrote to it"
    assert not is_checked()
    (Path(config.run_dir) / "ledger.closed").unlink()
    assert is_checked(), "the last process was killed"


def test_a_thread_merges_the_log_while_transactions_go_on(
    make_config: Any, make_group: Any, monkeypatch: pytest.MonkeyPatch
):
    """The thread's merge is held up; meanwhile transactions are committed. Then the log starts anew."""
    monkeypatch.setattr(ledger_file, "MERGE_BYTES", 100_000)
    merging, go_on, merge = threading.Event(), threading.Event(), ledger_file._merge

    def slow(db: sqlite3.Connection) -> None:
        if threading.current_thread() is not threading.main_thread():
            merging.set()
            assert go_on.wait(60)
        merge(db)

    monkeypatch.setattr(ledger_file, "_merge", slow)
    ledger = Ledger(make_config(durability="normal"), 0.0)

    def deliver() -> None:
        group_id, prompt_id = lease(ledger)
        with ledger.transaction():
            assert ledger.deliver(make_group(group_id, prompt_id, num_tokens=8_000), 0) == "stored"

    while not merging.is_set():
        deliver()
    for _ in range(5):
        deliver()
    go_on.set()
    log = Path(ledger._config.run_dir) / f"{FILE_NAME}-wal"
    begin = log.read_bytes()[16:24]
    deadline = time.monotonic() + 60
    while log.read_bytes()[16:24] == begin:
        assert time.monotonic() < deadline, "the log's salts change when it starts anew"
        deliver()
    ledger.close()
    assert audit(ledger._config.run_dir).problems == ()
