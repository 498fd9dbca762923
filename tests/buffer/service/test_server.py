"""The real server with real sockets, in this process and as a process that is killed."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import zmq
from omegaconf import OmegaConf

from buffer.__main__ import main
from buffer.ledger.audit import audit
from buffer.ledger.ledger_file import LedgerLostError
from buffer.service.server import Server
from buffer.service.service import Service
from buffer.transport import messages
from buffer.transport.connection import Connection, RequestRefused
from buffer.transport.credentials import Credentials, client_credentials, ensure_credentials
from buffer.transport.packed_group import BYTES_PER_TOKEN, unpack_group
from buffer.transport.roles import ROLES
from buffer.transport.router import GROUPS_PER_TURN, Router
from learner.batches.prefetch import Prefetch, Received

ROOT = Path(__file__).parents[3]
CREDENTIALS = Credentials.plain("test")


@pytest.fixture
def server(make_config: Any) -> Iterator[Server]:
    started = Server(make_config(address="tcp://127.0.0.1:*"), CREDENTIALS)
    thread = threading.Thread(target=started.run)
    thread.start()
    yield started
    started.stop()
    thread.join()


def credit(version: int = 0, num_groups: int = 4, held: tuple[str, ...] = ()) -> messages.LeaseRequest:
    return messages.LeaseRequest("actor-0", version, num_groups, "abc", held)


def connect(address: str, name: str, credentials: Credentials = CREDENTIALS) -> Connection:
    return Connection(address, name, credentials, timeout_seconds=20, resend_seconds=0.2)


def finish(connection: Connection, leases: tuple[messages.Lease, ...], version: int, make_group: Any) -> list[str]:
    groups = [make_group(lease.group_id, lease.prompt_id, version, num_tokens=20_000) for lease in leases]
    futures = [connection.request(messages.GroupDelivery("actor-0", group)) for group in groups]
    return [receipt.outcome for future in futures if isinstance(receipt := future.result(), messages.GroupReceipt)]


def test_leases_deliveries_and_batches_over_tcp(server: Server, make_group: Any):
    with connect(server.address, "actor-0") as actor, connect(server.address, "learner") as learner:
        assert learner.call(messages.LearnerHello(0)) == messages.LearnerWelcome(0, 0, 1)
        learner.epoch = 1
        for version in range(4):
            granted = actor.call(credit(version))
            assert isinstance(granted, messages.LeaseReply)
            waiting: Future[messages.Message] = learner.request(messages.BatchRequest(version, 0, 1))
            assert set(finish(actor, granted.leases, version, make_group)) == {"stored"}
            shard = waiting.result()
            assert isinstance(shard, messages.Shard)
            group = unpack_group(shard.groups[0])
            assert [t.num_tokens for t in group.trajectories] == [20_000, 20_000]
            assert max(shard.staleness) <= 1
            learner.call(messages.CheckpointCommitted(version))
        status = learner.call(messages.StatusRequest())
        assert isinstance(status, messages.Status)
        assert (status.counts["used"], status.counts["done"]) == (2, 6)


def test_broken_messages_are_counted_and_the_server_lives(
    server: Server, make_config: Any, caplog: pytest.LogCaptureFixture
):
    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.setsockopt(zmq.LINGER, 1000)
        stranger.setsockopt(zmq.IDENTITY, b"stranger")
        stranger.connect(server.address)
        for frames in ([b"hello"], [b""], [b"\x93\x01\x02\x03", b"x"]):
            stranger.send_multipart(frames)
        with connect(server.address, "learner") as learner:
            while True:
                status = learner.call(messages.StatusRequest())
                assert isinstance(status, messages.Status)
                if status.counts.get("wire_errors") == 3:
                    break
    assert len([r for r in caplog.records if "message of stranger dropped" in r.message]) == 1


def test_an_address_in_use_frees_the_ledger_again(server: Server, make_config: Any, tmp_path: Path):
    config = make_config(address=server.address, run_dir=str(tmp_path))
    for _ in range(2):
        with pytest.raises(ValueError, match="is in use; end the process that listens there"):
            Server(config, CREDENTIALS)


def write_config(run_dir: Path, **changes: object) -> str:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    section = {
        "run_dir": "moved since",
        "address": address,
        "num_prompts": 10,
        "data_fingerprint": "abc",
        "groups_per_batch": 2,
        "max_staleness": 1,
    }
    OmegaConf.save(OmegaConf.create({"buffer": section | changes}), run_dir / "config.yaml")
    return address


def make_keys(run_dir: Path) -> dict[str, Credentials]:
    ensure_credentials(run_dir)
    return {role: client_credentials(run_dir, role) for role in ROLES}


def start_process(run_dir: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "buffer", "serve", str(run_dir)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=run_dir, env=environment, text=True, stderr=subprocess.PIPE)


def test_a_killed_buffer_is_restarted_and_everybody_goes_on(run_dir: Path, make_group: Any):
    address, keys = write_config(run_dir), make_keys(run_dir)
    process = start_process(run_dir)
    with connect(address, "actor-0", keys["actor"]) as actor, connect(address, "learner", keys["learner"]) as learner:
        learner.call(messages.LearnerHello(0))
        learner.epoch = 1
        granted = actor.call(credit())
        assert isinstance(granted, messages.LeaseReply)
        assert finish(actor, granted.leases[:1], 0, make_group) == ["stored"]
        waiting = learner.request(messages.BatchRequest(0, 0, 1))
        more = actor.request(credit(1, held=tuple(lease.group_id for lease in granted.leases)))
        process.kill()
        process.communicate()
        deliveries = [
            actor.request(messages.GroupDelivery("actor-0", make_group(lease.group_id, lease.prompt_id)))
            for lease in granted.leases[1:]
        ]
        process = start_process(run_dir)
        shard = waiting.result()
        assert isinstance(shard, messages.Shard)
        assert [group.header.group_id for group in shard.groups] == ["0.0", "1.0"]
        outcomes = [receipt.outcome for d in deliveries if isinstance(receipt := d.result(), messages.GroupReceipt)]
        assert set(outcomes) <= {"stored", "duplicate"}
        regranted = more.result()
        assert isinstance(regranted, messages.LeaseReply)
        assert [lease.group_id for lease in regranted.leases] == ["4.0", "5.0"]
        again = learner.call(messages.BatchRequest(0, 0, 1))
        assert isinstance(again, messages.Shard)
        assert [group.header.group_id for group in again.groups] == ["0.0", "1.0"]
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 0, errors
    found = audit(run_dir)
    assert (found.counts["used"], found.counts["ready"], found.counts["leased"]) == (2, 2, 2)
    assert found.holds


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"max_staleness": -2}, "buffer: buffer.max_staleness is -2; use 0 for strictly in turn, or more\n"),
        ({"leases": 3}, "buffer: buffer.leases is not a known setting"),
    ],
)
def test_a_wrong_setting_ends_with_one_sentence(run_dir: Path, changes: dict[str, object], sentence: str):
    write_config(run_dir, **changes)
    process = start_process(run_dir)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 2
    assert errors.startswith(sentence)
    assert errors.count("\n") == 1


def test_sigint_closes_the_ledger_cleanly(run_dir: Path):
    address, keys = write_config(run_dir), make_keys(run_dir)
    process = start_process(run_dir)
    with connect(address, "learner", keys["learner"]) as learner:
        learner.call(messages.LearnerHello(0))
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == 0
    assert not (run_dir / "ledger.sqlite-wal").exists()


@pytest.mark.parametrize(("error", "status"), [(ValueError("boom"), 1), (LedgerLostError("it is gone"), 2)])
def test_only_a_lost_ledger_forbids_a_restart_once_the_buffer_serves(
    run_dir: Path, error: Exception, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    write_config(run_dir)
    monkeypatch.setattr(Router, "receive", mock.Mock(side_effect=error))
    monkeypatch.setattr(signal, "signal", mock.Mock())
    assert main(["serve", str(run_dir)]) == status
    assert capsys.readouterr().err.splitlines()[-1].endswith(str(error))


def test_an_answer_that_cannot_be_sent_is_refused(server: Server, monkeypatch: pytest.MonkeyPatch):
    unsendable = messages.Status({"\ud800": 1}, 0, False, (), ())
    monkeypatch.setattr(Service, "status", lambda *_: unsendable)
    with connect(server.address, "launcher") as observer, pytest.raises(RequestRefused, match="failed to handle the"):
        observer.call(messages.StatusRequest())
    with connect(server.address, "learner") as learner:
        assert learner.call(messages.LearnerHello(0)) == messages.LearnerWelcome(0, 0, 1)


def test_a_batch_of_large_groups_is_sent_a_few_groups_per_turn_while_others_are_answered(
    make_config: Any, make_group: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("buffer.service.service.SHARD_BYTES", 0)
    monkeypatch.setattr("learner.batches.prefetch.WINDOW_BYTES", 1 << 40)
    num_groups, group_bytes = 96, 2 * 5_000 * BYTES_PER_TOKEN
    server = Server(make_config(groups_per_batch=num_groups, max_staleness=0), CREDENTIALS)
    sent: list[int] = []
    send = server._router.send

    def count(identity: bytes, message: messages.Message, number: int) -> None:
        if isinstance(message, messages.ShardGroup):
            sent[-1] += message.group.num_bytes
        send(identity, message, number)

    monkeypatch.setattr(server._router, "send", count)
    with connect(server.address, "actor-0") as actor, connect(server.address, "learner") as learner:

        def answer(future: Future[Any]) -> Any:
            while not future.done():
                server._router.socket.poll(10)
                sent.append(0)
                server._turn()
            return future.result()

        learner.epoch = answer(learner.request(messages.LearnerHello(0))).epoch
        for lease in answer(actor.request(credit(num_groups=num_groups))).leases:
            group = make_group(lease.group_id, lease.prompt_id, num_tokens=5_000)
            answer(actor.request(messages.GroupDelivery("actor-0", group)))
        prefetch = Prefetch(learner, 0, 1, torch.device("cpu"), 0.0)
        coming = prefetch.ask(0)
        while not coming.done():
            # A heartbeat is answered in the turn that reads it, whatever the learner has asked for.
            answer(actor.request(messages.Heartbeat("actor", "actor-0", 0, "", {})))
        received = coming.result()
        prefetch.close()
    server._router.close()
    server._ledger.close()
    assert isinstance(received, Received)
    assert [group.header.group_id for group in received.shard.groups] == [f"{k}.0" for k in range(num_groups)]
    assert max(sent) <= 1.1 * GROUPS_PER_TURN * group_bytes


def test_one_poisoned_message_costs_its_sender_alone(run_dir: Path):
    """The real process, as the launcher starts it; an actor's key, and the learner's messages."""
    address, keys = write_config(run_dir, groups_per_batch=8, updates_per_batch=2, max_staleness=2), make_keys(run_dir)
    process = start_process(run_dir)
    try:
        with (
            connect(address, "actor-0", keys["actor"]) as actor,
            connect(address, "learner", keys["learner"]) as learner,
        ):
            learner.call(messages.LearnerHello(0))
            learner.epoch = 1
            for message in (messages.BatchRequest(0, 0, 8), messages.LearnerHello(0), messages.CheckpointCommitted(9)):
                with pytest.raises(RequestRefused, match=r"the key actor.json does not allow \w+; that takes one of"):
                    actor.call(message)
            with pytest.raises(RequestRefused, match="sent the heartbeat of another role"):
                actor.call(messages.Heartbeat("learner", "learner-0", 10**12, "", {}))
            with pytest.raises(RequestRefused, match="in each of 2 optimizer steps"):
                learner.call(messages.BatchRequest(0, 0, 8))
            with connect(address, "launcher", keys["observer"]) as observer:
                status = observer.call(messages.StatusRequest())
                assert isinstance(status, messages.Status)
                assert status.counts["wrong_role"] == 4 and "message_errors" not in status.counts
                with pytest.raises(RequestRefused, match=r"the key observer\.json does not allow Close"):
                    observer.call(messages.Close())
        assert process.poll() is None
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
