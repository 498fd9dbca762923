import itertools
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from buffer.config import BufferConfig
from buffer.ledger.audit import audit
from buffer.ledger.ledger import Holder, Ledger
from buffer.ledger.states import STATES, TRANSITIONS
from buffer.transport.messages import (
    EvaluationReport,
)
from buffer.transport.packed_group import PackedGroup
from tests.buffer.reference_curriculum import ReferenceCurriculum

HOLDER = Holder("actor-0-aa", "actor-0", 1)


def issue(ledger: Ledger, version: int = 0, holder: Holder = HOLDER, now: float = 0.0) -> tuple[str, int]:
    with ledger.transaction():
        return ledger.issue(holder, version, now)


def deliver(ledger: Ledger, group: PackedGroup) -> str:
    with ledger.transaction():
        return ledger.deliver(group, 0)


def report(version: int) -> EvaluationReport:
    return EvaluationReport("actor-0", version, version, 10, 0.5, 0.25, 12.0, 1.0)


@pytest.fixture
def config(make_config: Any) -> BufferConfig:
    return make_config()


@pytest.fixture
def ledger(config: BufferConfig):
    opened = Ledger(config, 0.0)
    yield opened
    opened.close()
    assert audit(config.run_dir).problems == ()


def test_a_group_goes_through_all_states(ledger: Ledger, config: BufferConfig, make_group: Any):
    group_id, prompt_id = issue(ledger, version=3)
    assert group_id == "0.0"
    assert (ledger.counts["leased"], ledger.leased) == (1, Counter({3: 1}))
    group = make_group(group_id, prompt_id, version=4)
    assert deliver(ledger, group) == "stored"
    assert (ledger.leased, ledger.ready) == (Counter(), Counter({4: 1}))
    stored = ledger.payload(0)
    assert (stored.header, stored.arrays_frame) == (group.header, group.arrays_frame)
    with ledger.transaction():
        ledger.use([0], 6)
    assert [(row.occurrence, row.staleness, row.num_tokens) for row in ledger.batches.batch(6)] == [(0, 2, 10)]
    with ledger.transaction():
        assert ledger.commit(6, 7) == 0
        assert ledger.commit(7, 7) == 1
    assert (ledger.counts["done"], ledger.batches.batch(6)) == (1, [])
    found = audit(config.run_dir)
    assert (found.counts["done"], found.staleness_max, found.holds) == (1, 2, True)


def test_copies_are_told_apart_and_counted(ledger: Ledger, make_group: Any):
    group_id, prompt_id = issue(ledger)
    first = make_group(group_id, prompt_id)
    with ledger.transaction():
        assert not ledger.give_back(group_id, "another", ""), "it is another's lease"
        assert ledger.give_back(group_id, HOLDER.name, "")
        assert not ledger.give_back(group_id, HOLDER.name, "")
    assert deliver(ledger, first) == "late", "its lease was given up"
    again, same_prompt = issue(ledger)
    assert (again, same_prompt) == ("0.1", prompt_id)
    assert deliver(ledger, first) == "late", "its prompt was leased again"
    second = make_group(again, prompt_id)
    assert [deliver(ledger, second), deliver(ledger, second)] == ["stored", "duplicate"]
    for stranger in ("9.0", "0.2", "x", "-1.0", "0.1.1", "00.1", "9" * 30 + ".0"):
        assert deliver(ledger, make_group(stranger, prompt_id)) == "unknown"
    assert deliver(ledger, make_group(again, prompt_id + 1)) == "unknown"
    assert ledger.file.counters() == {"duplicate": 1, "late": 2, "reissued": 1, "unknown": 8}


def test_pending_occurrences_come_before_new_ones_oldest_first(ledger: Ledger):
    ids = [issue(ledger)[0] for _ in range(3)]
    with ledger.transaction():
        ledger.give_back(ids[2], HOLDER.name, "")
        ledger.give_back(ids[1], HOLDER.name, "")
    assert [issue(ledger)[0] for _ in range(3)] == ["1.1", "2.1", "3.0"]


def test_a_drop_names_its_reason(ledger: Ledger, config: BufferConfig, make_group: Any):
    group_id, prompt_id = issue(ledger)
    with ledger.transaction():
        ledger.give_back(group_id, HOLDER.name, "prompt_too_long")
    assert ledger.counts["dropped:prompt_too_long"] == 1
    assert deliver(ledger, make_group(group_id, prompt_id)) == "late"
    assert audit(config.run_dir).dropped == {"prompt_too_long": 1}
    assert issue(ledger)[0] == "1.0"


def test_silence_ends_leases_and_signs_of_life_extend_them(ledger: Ledger, config: BufferConfig):
    other = Holder("actor-1-bb", "actor-1", 1)
    issue(ledger)
    issue(ledger, holder=other)
    ledger.extend_deadline(HOLDER.name, 100.0)
    ledger.extend_deadline("nobody", 100.0)
    assert ledger.silent_holders(config.lease_seconds - 1) == []
    assert ledger.silent_holders(config.lease_seconds) == [other.name]
    with ledger.transaction():
        assert ledger.release(other.name) == 1
    assert (ledger.counts["pending"], ledger.silent_holders(100 + config.lease_seconds)) == (1, [HOLDER.name])
    assert ledger.file.counters() == {"expired": 1}


def test_a_rollback_makes_used_groups_ready_and_resamples_what_was_committed(
    ledger: Ledger, config: BufferConfig, make_group: Any
):
    for version in (0, 1, 2):
        group_id, prompt_id = issue(ledger, version)
        deliver(ledger, make_group(group_id, prompt_id, version))
        with ledger.transaction():
            ledger.use([version], version)
    with ledger.transaction():
        ledger.commit(1, 3)
        assert ledger.roll_back(2) == 1
    assert (ledger.ready, ledger.counts["used"], ledger.counts["done"]) == (Counter({2: 1}), 1, 1)
    with ledger.transaction():
        assert ledger.roll_back(0) == 1
    assert (ledger.counts["pending"], ledger.counts["ready"], ledger.counts["done"]) == (1, 2, 0)
    assert issue(ledger)[0] == "0.1"
    assert [c.occurrence for c in ledger.candidates(0)] == [1, 2]


def test_only_ready_groups_are_used(ledger: Ledger):
    issue(ledger)
    with pytest.raises(RuntimeError, match="is leased, neither ready nor used"), ledger.transaction():
        ledger.use([0], 1)
    assert ledger.counts["leased"] == 1


def test_a_failed_transaction_leaves_nothing_behind(ledger: Ledger):
    with pytest.raises(KeyError), ledger.transaction():
        ledger.issue(HOLDER, 0, 0.0)
        raise KeyError
    assert (+ledger.counts, +ledger.leased) == (Counter(), Counter())
    assert issue(ledger)[0] == "0.0"


def test_only_the_transitions_of_the_table_are_possible(ledger: Ledger):
    """Every pair of states, tried directly on the database."""
    for origin, target in itertools.product(STATES, STATES):
        with pytest.raises(KeyError), ledger.transaction():
            occurrence = int(ledger.issue(HOLDER, 0, 0.0)[0].split(".")[0])
            path = {"leased": "", "used": "ready used", "done": "ready used done"}.get(origin, origin)
            for step in path.split():
                ledger.file.write("UPDATE occurrences SET state = ? WHERE occurrence = ?", step, occurrence)
            move = ("UPDATE occurrences SET state = ? WHERE occurrence = ?", target, occurrence)
            if (origin, target) in TRANSITIONS:
                assert ledger.file.write(*move) == 1
            else:
                with pytest.raises(sqlite3.IntegrityError, match="no such transition"):
                    ledger.file.write(*move)
            raise KeyError
    with pytest.raises(sqlite3.IntegrityError, match="begins as leased"), ledger.transaction():
        ledger.file.write(
            "INSERT INTO occurrences (occurrence, prompt_id, attempt, state, holder, actor_id, request_number,"
            " oldest_version) VALUES (0, 0, 0, 'done', '', '', 0, 0)"
        )


def test_a_failed_transaction_restores_deadlines(ledger: Ledger, config: BufferConfig):
    issue(ledger)
    with pytest.raises(KeyError), ledger.transaction():
        ledger.release(HOLDER.name)
        raise KeyError
    assert ledger.silent_holders(config.lease_seconds) == [HOLDER.name]


def test_writing_outside_a_transaction_is_an_error(ledger: Ledger):
    with pytest.raises(RuntimeError, match="outside a transaction"):
        ledger.issue(HOLDER, 0, 0.0)


def test_evaluations_are_handed_out_once_and_reported_once(ledger: Ledger):
    evaluations = ledger.evaluations
    with ledger.transaction():
        for version in (4, 0, 4):
            evaluations.request(version)
        assert evaluations.oldest_pending == 0
        evaluations.assign(0, "a", 1)
        assert (evaluations.taken("a", 1), evaluations.taken("a", 2)) == (0, -1)
        assert evaluations.oldest_pending == 4
        evaluations.assign(4, "b", 1)
        assert (evaluations.oldest_pending, evaluations.newest_request("b")) == (None, 1)
        assert evaluations.release("b") == 1
        evaluations.assign(4, "a", 3)
        assert evaluations.release("a", before=3, kept=(0,)) == 0, "one is kept, and one is newer"
        assert not evaluations.report(report(4), "b"), "it is not b's any more"
        assert [evaluations.report(report(4), "a"), evaluations.report(report(4), "a")] == [True, False]
        assert evaluations.num_unfinished == 1
        assert evaluations.report(report(0), "a")
    assert evaluations.reports() == (report(0), report(4))
    assert evaluations.reports(1) == (report(4),)
    with ledger.transaction():
        evaluations.roll_back(3)
    assert evaluations.reports() == (report(0),)


def test_reopening_keeps_everything_and_gives_leases_a_full_deadline(config: BufferConfig, make_group: Any):
    ledger = Ledger(config, 0.0)
    issue(ledger)
    group_id, prompt_id = issue(ledger, version=2)
    deliver(ledger, make_group(group_id, prompt_id, 2))
    counts, leased, ready = +ledger.counts, ledger.leased, ledger.ready
    ledger.close()
    ledger = Ledger(config, 1000.0)
    assert (+ledger.counts, ledger.leased, ledger.ready) == (counts, leased, ready)
    assert ledger.silent_holders(1000 + config.lease_seconds - 1) == []
    assert ledger.silent_holders(1000 + config.lease_seconds) == [HOLDER.name]
    assert ledger.leases_of(HOLDER.name, HOLDER.request_number) == [("0.0", ReferenceCurriculum(config).draw())]
    assert issue(ledger)[0] == "2.0"
    ledger.close()


@pytest.mark.parametrize("change", [{"num_prompts": 11}, {"data_fingerprint": "x"}, {"seed": 1}, {"shuffle": False}])
def test_a_ledger_of_other_prompts_is_refused(config: BufferConfig, make_config: Any, change: dict[str, Any]):
    Ledger(config, 0.0).close()
    with pytest.raises(ValueError, match=f"made with {next(iter(change))} .* restore that setting"):
        Ledger(make_config(**change), 0.0)
    Ledger(config, 0.0).close()


@pytest.mark.parametrize(("durability", "synchronous"), [("full", 2), ("normal", 1), ("memory", 0)])
def test_durability_is_the_databases(make_config: Any, durability: str, synchronous: int):
    ledger = Ledger(make_config(durability=durability), 0.0)
    assert ledger.file.one("PRAGMA synchronous") == synchronous
    assert ledger.file.one("PRAGMA journal_mode") == "wal"
    ledger.close()


def test_a_killed_process_loses_nothing_it_committed(config: BufferConfig, run_dir: Path):
    """A child process commits leases one by one, prints each, and is killed inside a transaction."""
    program = textwrap.dedent(f"""
        import os, signal
        from buffer.config import BufferConfig
        from buffer.ledger.ledger import Holder, Ledger
        ledger = Ledger(BufferConfig({str(run_dir)!r}, {config.address!r}, 10, "abc", 2, 1), 0.0)
        holder = Holder("actor-0-aa", "actor-0", 1)
        for _ in range(5):
            with ledger.transaction():
                ledger.issue(holder, 0, 0.0)
        with ledger.transaction():
            ledger.issue(holder, 0, 0.0)
            os.kill(os.getpid(), signal.SIGKILL)
    """)
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[3], env={**os.environ}, check=False
    )
    assert ended.returncode == -signal.SIGKILL
    assert audit(run_dir).counts["leased"] == 5
    ledger = Ledger(config, 0.0)
    assert len(ledger.leases_of(HOLDER.name, HOLDER.request_number)) == 5
    assert issue(ledger)[0] == "5.0"
    ledger.close()
    assert audit(run_dir).holds
