"""The buffer and disk failures: power cuts, damage, a full disk, read-only or deleted directories, held locks."""

import contextlib
import errno
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from buffer.__main__ import main
from buffer.config import BufferConfig
from buffer.ledger import ledger_file
from buffer.ledger.audit import audit
from buffer.ledger.ledger import Holder, Ledger
from buffer.ledger.ledger_file import FILE_NAME
from buffer.service.server import Server
from buffer.service.turn import Turns
from buffer.transport import messages
from buffer.transport.connection import Connection
from buffer.transport.credentials import Credentials
from buffer.transport.router import Incoming

HOLDER = Holder("actor-0-aa", "actor-0", 1)
PLAIN = Credentials.plain("run")
ROOT = Path(__file__).parents[2]


def lease(ledger: Ledger) -> tuple[str, int]:
    with ledger.transaction():
        return ledger.issue(HOLDER, 0, 0.0)


@contextmanager
def serving(config: BufferConfig) -> Iterator[Server]:
    server = Server(config, PLAIN)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join()


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """A separate file system, if this process may mount one."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", str(folder)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs privileges")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


# Power cuts and damage.


@pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")
@pytest.mark.parametrize(("durability", "is_synced"), [("full", True), ("normal", False)])
def test_under_full_the_log_is_on_the_disk_before_the_acknowledgement(
    make_config: Any, run_dir: Path, durability: str, is_synced: bool
):
    program = (
        "import os, sys\n"
        "from buffer.config import BufferConfig\n"
        "from buffer.ledger.ledger import Holder, Ledger\n"
        f"ledger = Ledger(BufferConfig({str(run_dir)!r}, 'ipc://x', 10, 'a', 2, 1, durability={durability!r}), 0.0)\n"
        "for _ in range(3):\n"
        "    with ledger.transaction():\n"
        "        ledger.issue(Holder('a', 'a', 1), 0, 0.0)\n"
        "    os.write(1, b'acknowledged')\n"
    )
    assert synced_before_acknowledged(program, run_dir) == [is_synced] * 3


@pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")
@pytest.mark.parametrize("durability", ["full", "normal", "memory"])
def test_what_a_checkpoint_contains_is_on_the_disk_before_the_answer(make_config: Any, run_dir: Path, durability: str):
    program = (
        "import os\n"
        "from buffer.config import BufferConfig\n"
        "from buffer.ledger.ledger import Holder, Ledger\n"
        "from buffer.service.turn import Turns\n"
        "from buffer.transport.messages import CheckpointBegun\n"
        "from buffer.transport.router import Incoming\n"
        f"config = BufferConfig({str(run_dir)!r}, 'ipc://x', 10, 'a', 2, 1, durability={durability!r})\n"
        "ledger = Ledger(config, 0.0)\n"
        "with ledger.transaction():\n"
        "    ledger.issue(Holder('a', 'a', 1), 0, 0.0)\n"
        "os.write(1, b'begins')\n"
        "Turns(config, ledger).carry_out([Incoming(b'learner', CheckpointBegun(0), 1)], False, 0.0)\n"
        "os.write(1, b'acknowledged')\n"
    )
    assert synced_before_acknowledged(program, run_dir) == [True]


def synced_before_acknowledged(program: str, run_dir: Path) -> list[bool]:
    """Run a program. Per `acknowledged` that it writes: was the log synced after its last write, and written at all?"""
    calls = run_dir / "calls"
    command = ["strace", "-f", "-y", "-o", str(calls), "-e", "trace=fsync,fdatasync,pwrite64,write"]
    subprocess.run([*command, sys.executable, "-c", program], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    found, synced, written = list[bool](), False, False
    for line in calls.read_text().splitlines():
        if "acknowledged" in line:
            assert written
            found.append(synced)
            synced, written = False, False
        elif "ledger.sqlite-wal" in line:
            synced = "sync(" in line
            written |= "pwrite64(" in line
    return found


def test_a_failed_sync_of_the_log_ends_the_buffer_and_is_not_tried_again(
    make_config: Any, monkeypatch: pytest.MonkeyPatch
):
    """A second sync would succeed without writing what the first one lost; no answer may rest on it."""
    ledger = Ledger(make_config(durability="normal"), 0.0)
    turns = Turns(make_config(), ledger)
    syncs: list[int] = []

    def fail(descriptor: int) -> None:
        syncs.append(descriptor)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=r"ledger.sqlite-wal cannot be synced: Input/output error"):
        turns.carry_out([Incoming(b"learner", messages.CheckpointBegun(0), 1)], False, 0.0)
    assert len(syncs) == 1
    ledger.close()


def test_a_checkpoint_with_batches_that_the_ledger_lost_is_refused(make_config: Any):
    ledger = Ledger(make_config(), 0.0)
    ((answer),) = Turns(make_config(), ledger).carry_out(
        [Incoming(b"learner", messages.CheckpointBegun(1), 1)], False, 0.0
    )
    assert isinstance(answer.message, messages.Refused)
    assert "its next batch is for policy 0" in answer.message.reason
    ledger.close()


@pytest.mark.parametrize("damage", ["cut", "garbage", "zeros"])
def test_a_damaged_end_of_the_log_costs_the_last_transactions_only(
    make_config: Any, make_group: Any, run_dir: Path, tmp_path: Path, damage: str
):
    ledger = Ledger(make_config(), 0.0)
    for _ in range(12):
        group_id, prompt_id = lease(ledger)
        with ledger.transaction():
            assert ledger.deliver(make_group(group_id, prompt_id, num_tokens=2_000), 0) == "stored"
    chance = random.Random(damage)
    log = (run_dir / f"{FILE_NAME}-wal").read_bytes()
    kept = set()
    for attempt in range(12):
        copy = tmp_path / str(attempt)
        copy.mkdir()
        shutil.copy(run_dir / FILE_NAME, copy)
        end = chance.randrange(len(log) // 8, len(log))
        tail = {"cut": b"", "garbage": chance.randbytes(len(log) - end), "zeros": bytes(len(log) - end)}[damage]
        (copy / f"{FILE_NAME}-wal").write_bytes(log[:end] + tail)
        reopened = Ledger(make_config(run_dir=str(copy)), 0.0)
        found = audit(copy)
        assert found.problems == ()
        assert found.issued - found.counts["ready"] in (0, 1), "transactions are kept whole and in order"
        kept.add(found.issued)
        assert lease(reopened)[0] == (f"{found.issued - 1}.1" if found.counts["pending"] else f"{found.issued}.0")
        reopened.close()
    ledger.close()
    assert len(kept) > 3


@pytest.mark.parametrize("where", [0, 2], ids=["the header", "a table"])
def test_a_damaged_file_is_refused_with_one_sentence(
    make_config: Any, run_dir: Path, capsys: pytest.CaptureFixture[str], where: int
):
    ledger = Ledger(make_config(), 0.0)
    for _ in range(300):
        lease(ledger)
    pages = [row[0] for row in ledger.file.rows("SELECT rootpage FROM sqlite_master WHERE rootpage > 0")]
    ledger.close()
    (run_dir / "config.yaml").write_text(
        f"buffer: {{run_dir: x, address: 'ipc://{run_dir}/b', num_prompts: 10, data_fingerprint: abc,"
        " groups_per_batch: 2, max_staleness: 1}\n"
    )
    with (run_dir / FILE_NAME).open("r+b") as file:
        file.seek(where and (pages[where] - 1) * ledger_file.PAGE_BYTES)
        file.write(random.Random(0).randbytes(5_000))
    assert main(["serve", str(run_dir)]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"buffer: {run_dir / FILE_NAME} is damaged or unusable: ")
    assert printed.count("\n") == 1


# A full disk.


def asking_for_status(connection: Connection) -> messages.Status:
    status = connection.call(messages.StatusRequest(), 60)
    assert isinstance(status, messages.Status)
    return status


def say_hello(learner: Connection) -> None:
    welcome = learner.call(messages.LearnerHello(0))
    assert isinstance(welcome, messages.LearnerWelcome)
    learner.epoch = welcome.epoch


def fill_and_free(config: BufferConfig, make_group: Any, free: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Deliver more groups than fit on the disk; `free` makes space; every receipt arrives in the end."""
    with serving(config) as server, Connection(server.address, "actor-0", PLAIN, resend_seconds=0.1) as actor:
        say_hello(actor)
        granted = actor.call(messages.LeaseRequest("actor-0", 0, 40, "abc"))
        assert isinstance(granted, messages.LeaseReply)
        groups = [make_group(item.group_id, item.prompt_id, num_tokens=10_000) for item in granted.leases]
        receipts = [actor.request(messages.GroupDelivery("actor-0", group), 120.0) for group in groups]
        while "buffer" not in {wait.who for wait in asking_for_status(actor).waits}:
            pass
        kept = audit(config.run_dir)
        assert kept.problems == ()
        assert sum(receipt.done() for receipt in receipts) <= kept.counts["ready"] < 40, "nothing is acknowledged"
        free(server)
        assert {getattr(receipt.result(), "outcome", "") for receipt in receipts} == {"stored"}
        while asking_for_status(actor).waits:
            actor.call(messages.EvaluationRequest(0))
            say_hello(actor)
    found = audit(config.run_dir)
    assert (found.counts["ready"], found.problems) == (40, ())
    assert len([r for r in caplog.records if "no space for the ledger" in r.message]) == 1
    assert len([r for r in caplog.records if "has space again" in r.message]) == 1


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("buffer.service.turn.SPACE_SECONDS", 0.5)


@pytest.mark.usefixtures("quickly")
def test_a_ledger_that_may_not_grow_waits_for_space(
    make_config: Any, make_group: Any, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    config = make_config(groups_per_batch=40)

    def limit(server: Server, pages: int) -> None:
        server._ledger.file.one(f"PRAGMA max_page_count = {pages}")

    original = Server.run

    def run_limited(server: Server) -> None:
        limit(server, 60)
        original(server)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Server, "run", run_limited)
        fill_and_free(config, make_group, lambda server: limit(server, 100_000), caplog)


@pytest.mark.usefixtures("quickly")
def test_a_full_disk_is_waited_for(make_config: Any, make_group: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    with small_disk(tmp_path, 3):
        config = make_config(run_dir=str(tmp_path), groups_per_batch=40)
        free = ["mount", "-o", "remount,size=100m", str(tmp_path)]
        fill_and_free(config, make_group, lambda _: subprocess.run(free, check=True), caplog)


def test_a_buffer_that_starts_again_on_a_full_disk_says_so_and_waits(make_config: Any, tmp_path: Path):
    with small_disk(tmp_path, 3):
        config = make_config(run_dir=str(tmp_path), address=f"ipc://{tmp_path}/socket")
        with serving(config) as server, Connection(server.address, "learner", PLAIN) as learner:
            say_hello(learner)
        with contextlib.suppress(OSError), (tmp_path / "ballast").open("wb", buffering=0) as ballast:
            while True:
                ballast.write(bytes(1 << 12))
        started: list[Server] = []

        def serve() -> None:
            started.append(Server(config, PLAIN))
            started[0].run()

        thread = threading.Thread(target=serve)
        thread.start()
        with Connection(config.address, "actor-0", PLAIN, resend_seconds=0.1) as actor:
            leases = actor.request(messages.LeaseRequest("actor-0", 0, 1, "abc"), 120.0)
            assert [wait.who for wait in asking_for_status(actor).waits] == ["buffer"]
            assert not leases.done() and not started
            (tmp_path / "ballast").unlink()
            assert len(leases.result().leases) == 1
        started[0].stop()
        thread.join()
    assert not thread.is_alive()


def test_a_disk_without_space_from_the_start_gives_one_sentence(
    make_config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with small_disk(tmp_path, 1):
        (tmp_path / "config.yaml").write_text(
            "buffer: {run_dir: x, address: 'ipc://nowhere', num_prompts: 10, data_fingerprint: abc,"
            " groups_per_batch: 2, max_staleness: 1}\n"
        )
        with contextlib.suppress(OSError):
            (tmp_path / "ballast").write_bytes(bytes(1 << 20))
        assert main(["serve", str(tmp_path)]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("buffer: ")
    assert printed.count("\n") == 1


# Directories and locks.


def test_a_read_only_directory_gives_one_sentence(make_config: Any, tmp_path: Path):
    with small_disk(tmp_path, 3):
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path)], check=True)
        with pytest.raises(ValueError, match="cannot be written: Read-only file system; choose another run_dir"):
            Ledger(make_config(run_dir=str(tmp_path)), 0.0)


@pytest.mark.parametrize("replaced", [False, True])
def test_a_deleted_run_directory_ends_the_buffer(make_config: Any, run_dir: Path, replaced: bool):
    config = make_config(run_dir=str(run_dir / "run"))
    server = Server(config, PLAIN)
    shutil.rmtree(config.run_dir)
    if replaced:
        Path(config.run_dir).mkdir()
        (Path(config.run_dir) / FILE_NAME).touch()
    with pytest.raises(ValueError, match="was deleted or replaced while in use"):
        server.run()


def test_a_dying_predecessor_is_waited_for(make_config: Any, monkeypatch: pytest.MonkeyPatch):
    waiting = threading.Event()
    clock = types.SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: waiting.set() or time.sleep(seconds))
    monkeypatch.setattr(ledger_file, "time", clock)
    first = Ledger(make_config(), 0.0)
    lease(first)
    opened: list[Ledger] = []
    thread = threading.Thread(target=lambda: opened.append(Ledger(make_config(), 0.0)))
    thread.start()
    assert waiting.wait(30)
    assert opened == []
    first.close()
    thread.join()
    assert lease(opened[0])[0] == "1.0"
    opened[0].close()


def test_a_living_one_is_not_waited_for_for_ever(make_config: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ledger_file, "LOCK_SECONDS", 0.2)
    first = Ledger(make_config(), 0.0)
    with pytest.raises(ValueError, match="in use by another buffer"):
        Ledger(make_config(), 0.0)
    first.close()


# Size and clock.


def test_the_file_stays_as_large_as_what_is_outstanding(make_config: Any, make_group: Any, run_dir: Path):
    ledger = Ledger(make_config(durability="normal"), 0.0)
    sizes = []
    for version in range(700):
        group_id, prompt_id = lease(ledger)
        with ledger.transaction():
            ledger.deliver(make_group(group_id, prompt_id, version, num_tokens=4_096, size=8), version)
            ledger.use([version], version)
            ledger.commit(version, version + 1)
        sizes.append(sum(path.stat().st_size for path in run_dir.iterdir()))
    ledger.close()
    # A busy machine may keep the thread that merges the log from its work for a while.
    assert max(sizes) < 3 * ledger_file.WAL_BYTES, "700 groups are 207 MB, and more in pages"
    assert (run_dir / FILE_NAME).stat().st_size < 3_000_000


def test_the_log_is_cut_back_after_a_reader_held_it_up(make_config: Any, make_group: Any, run_dir: Path):
    config = make_config(durability="memory")
    ledger = Ledger(config, 0.0)

    def work(first: int, number: int) -> int:
        for version in range(first, first + number):
            group_id, prompt_id = lease(ledger)
            with ledger.transaction():
                ledger.deliver(make_group(group_id, prompt_id, version, num_tokens=4_096, size=8), version)
                ledger.use([version], version)
                ledger.commit(version, version + 1)
        return (run_dir / f"{FILE_NAME}-wal").stat().st_size

    work(0, 3)
    with closing(sqlite3.connect(run_dir / FILE_NAME, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT COUNT(*) FROM payloads").fetchone()
        assert work(3, 400) > 1.5 * ledger_file.WAL_BYTES
    assert work(403, 300) < 1.2 * ledger_file.WAL_BYTES
    ledger.close()
    assert audit(run_dir).problems == ()


def test_wall_clock_steps_do_not_matter(make_config: Any, make_group: Any, monkeypatch: pytest.MonkeyPatch):
    """The wall clock goes back a day at every reading: leases live, the learner is served, no wait is negative."""
    steps = iter(range(10**9))
    begin = time.time()
    monkeypatch.setattr(time, "time", lambda: begin - 86_400.0 * next(steps))
    with serving(make_config(lease_seconds=30.0)) as server, Connection(server.address, "actor-0", PLAIN) as actor:
        say_hello(actor)
        granted = actor.call(messages.LeaseRequest("actor-0", 0, 2, "abc"))
        assert isinstance(granted, messages.LeaseReply)
        waiting = actor.request(messages.BatchRequest(0, 0, 1))
        assert all(wait.seconds >= 0 for wait in asking_for_status(actor).waits)
        for item in granted.leases:
            actor.call(messages.GroupDelivery("actor-0", make_group(item.group_id, item.prompt_id)))
        assert isinstance(waiting.result(), messages.Shard)
        assert asking_for_status(actor).counts["pending"] == 0
