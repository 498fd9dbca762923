import json
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from buffer.__main__ import main
from buffer.ledger.ledger import Holder, Ledger
from buffer.service.waits import load_waits, save_waits
from buffer.transport.messages import Wait


@pytest.fixture
def ledger(make_config: Any, make_group: Any):
    """An open ledger with one group done, one used, one ready, one leased, one dropped and one pending."""
    opened = Ledger(make_config(), 0.0)
    with opened.transaction():
        leases = [opened.issue(Holder("a-1", "a", 1), 0, 0.0) for _ in range(6)]
        for group_id, prompt_id in leases[:3]:
            opened.deliver(make_group(group_id, prompt_id), 0)
        opened.use([0], 0)
        opened.use([1], 1)
        opened.commit(1, 2)
        opened.give_back("4.0", "a-1", "too_long")
        opened.give_back("5.0", "a-1", "")
        opened.deliver(make_group("5.0", leases[5][1]), 0)
        opened.evaluations.request(0)
    yield opened
    opened.close()


def test_inspect_prints_a_running_ledger(ledger: Ledger, run_dir: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["inspect", str(run_dir)]) == 0
    lines = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines()[:-1])
    expected = ("pending", "leased", "ready", "used", "done", "dropped: too_long", "late", "evaluations pending")
    assert [lines[name] for name in expected] == ["1"] * len(expected)
    assert (lines["issued"], lines["uses"], lines["staleness_max"], lines["staleness_mean"]) == ("6", "2", "1", "0.50")


def test_inspect_prints_json(ledger: Ledger, run_dir: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["inspect", str(run_dir), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["counts"] == dict.fromkeys(("pending", "leased", "ready", "used", "done"), 1)
    assert (found["dropped"], found["issued"], found["holds"]) == ({"too_long": 1}, 6, True)


def test_inspect_says_who_waits_and_how_old_that_is(
    ledger: Ledger, run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    save_waits(run_dir, [Wait("actor-0", "room", 12.4), Wait("learner-0", "2 more groups", 3.0)])
    begin = time.time()
    monkeypatch.setattr(time, "time", lambda: begin + 30)
    assert main(["inspect", str(run_dir)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-3:-1] == ["actor-0 waits for room, since 12 s", "learner-0 waits for 2 more groups, since 3 s"]
    assert printed[-1] in ("waits as of 30 s ago", "waits as of 31 s ago")
    assert main(["inspect", str(run_dir), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["waits"][0] == {"who": "actor-0", "for_what": "room", "seconds": 12.4}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"waits": [{}], "saved_at": 1}', '{"waits": 3, "saved_at": 1}'])
def test_unreadable_waits_are_passed_over(ledger: Ledger, run_dir: Path, text: str):
    (run_dir / "waits.json").write_text(text)
    assert load_waits(run_dir) is None
    assert main(["inspect", str(run_dir)]) == 0


def test_waits_of_a_clock_that_was_set_back_are_not_older_than_nothing(run_dir: Path, monkeypatch: pytest.MonkeyPatch):
    save_waits(run_dir, [])
    begin = time.time()
    monkeypatch.setattr(time, "time", lambda: begin - 86_400)
    saved = load_waits(run_dir)
    assert saved is not None
    assert saved.age_seconds == 0.0
    save_waits(run_dir / "deleted", [])


def test_a_closed_ledger_is_read_too(ledger: Ledger, run_dir: Path):
    ledger.close()
    assert main(["inspect", str(run_dir)]) == 0
    ledger.__init__(ledger._config, 0.0)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        ("DELETE FROM occurrences WHERE occurrence = 3", "6 occurrences were issued, the states hold 5"),
        ("DELETE FROM payloads WHERE occurrence = 2", "1 ready or used groups without contents"),
        ("INSERT INTO payloads VALUES (3, '', '')", "1 contents without a ready or used group"),
        ("DELETE FROM uses WHERE occurrence = 1", "1 used or done groups that were in no batch"),
        ("UPDATE uses SET occurrence = 2 WHERE occurrence = 0", "1 places in a batch of groups that are neither"),
        ("UPDATE uses SET batch_order = 1 WHERE occurrence = 0", "1 batches with an empty place"),
        ("UPDATE occurrences SET occurrence = 77 WHERE occurrence = 3", "1 occurrences beyond the number issued"),
    ],
)
def test_damage_is_found(
    ledger: Ledger, run_dir: Path, capsys: pytest.CaptureFixture[str], damage: str, complaint: str
):
    with closing(sqlite3.connect(run_dir / "ledger.sqlite", isolation_level=None)) as database:
        database.execute(damage.replace("''", "x''"))
    assert main(["inspect", str(run_dir)]) == 1
    printed = capsys.readouterr().out
    assert f"broken: {complaint}" in printed
    assert printed.endswith("the invariant does not hold\n")


def test_no_ledger_or_another_file_gives_one_sentence(run_dir: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["inspect", str(run_dir)]) == 2
    assert "ledger.sqlite does not exist" in capsys.readouterr().err
    (run_dir / "ledger.sqlite").write_text("no database, but long enough to have a header of a hundred bytes" * 9)
    assert main(["inspect", str(run_dir)]) == 2
    assert "cannot be read as a ledger" in capsys.readouterr().err
    (run_dir / "ledger.sqlite").unlink()
    with closing(sqlite3.connect(run_dir / "ledger.sqlite")) as database:
        database.execute("PRAGMA user_version = 9")
    assert main(["inspect", str(run_dir)]) == 2
    assert "has ledger schema 9" in capsys.readouterr().err


def test_serving_without_a_configuration_gives_one_sentence(run_dir: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["serve", str(run_dir)]) == 2
    assert "config.yaml does not exist" in capsys.readouterr().err
    (run_dir / "config.yaml").write_text("learner: {}\n")
    assert main(["serve", str(run_dir)]) == 2
    assert "no section named buffer" in capsys.readouterr().err
