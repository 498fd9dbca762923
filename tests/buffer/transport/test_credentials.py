"""Keys: how they are made, kept, read and refused."""

import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from buffer.transport.credentials import (
    WEIGHTS,
    Credentials,
    RunKeys,
    client_credentials,
    ensure_credentials,
    server_credentials,
)
from buffer.transport.roles import ROLES


def modes(folder: Path) -> dict[str, int]:
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.iterdir())}


def test_keys_are_readable_by_their_owner_only_whatever_the_umask(tmp_path: Path):
    before = os.umask(0)
    try:
        ensure_credentials(tmp_path)
    finally:
        os.umask(before)
    files = dict.fromkeys((f"{name}.json" for name in (*ROLES, "server", "weights")), 0o600)
    assert modes(tmp_path / "keys") == {"keys": 0o700, **files}
    assert [path.name for path in tmp_path.iterdir()] == ["keys"]


def test_files_have_their_mode_from_the_first_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[int] = []

    def look(descriptor: int) -> None:
        seen.append(stat.S_IMODE(os.fstat(descriptor).st_mode))

    monkeypatch.setattr(os, "fsync", look)
    monkeypatch.setattr(os, "chmod", lambda *_: pytest.fail("a mode was changed afterwards"))
    ensure_credentials(tmp_path)
    assert seen == [0o600] * 5


def everything(run_dir: Path) -> list[Credentials]:
    servers = [server_credentials(run_dir), server_credentials(run_dir, WEIGHTS)]
    return servers + [client_credentials(run_dir, role) for role in ROLES]


def test_a_resumed_run_keeps_its_id_and_keys(tmp_path: Path):
    ensure_credentials(tmp_path)
    first = everything(tmp_path)
    ensure_credentials(tmp_path)
    assert everything(tmp_path) == first
    assert server_credentials(tmp_path / "other").run_id != first[0].run_id


def test_every_process_has_a_key_of_its_own_and_both_servers_know_all_roles(tmp_path: Path):
    ensure_credentials(tmp_path)
    buffer, weights, *clients = everything(tmp_path)
    assert len({found.secret for found in (buffer, weights, *clients)}) == 5
    for role, client in zip(ROLES, clients, strict=True):
        assert (client.server_public, client.for_weights().server_public) == (buffer.public, weights.public)
        assert buffer.roles[client.public] == weights.roles[client.public] == role
        text = (tmp_path / "keys" / f"{role}.json").read_text()
        others = [other.secret for other in (buffer, weights, *clients) if other is not client]
        assert client.secret.decode() in text and not any(secret.decode() in text for secret in others)


def test_a_run_of_an_older_release_gets_new_keys_and_keeps_its_id(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    ensure_credentials(tmp_path)
    old = server_credentials(tmp_path)
    keys = tmp_path / "keys"
    content = {"run_id": old.run_id, "server_public": "k" * 40, "client_public": "k" * 40, "client_secret": "k" * 40}
    for path in keys.iterdir():
        path.unlink()
    (keys / "client.json").touch(0o600)
    (keys / "client.json").write_text(json.dumps(content))
    ensure_credentials(tmp_path)
    assert server_credentials(tmp_path).run_id == old.run_id
    assert len({found.secret for found in everything(tmp_path)}) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["keys"] and not (keys / "client.json").exists()
    assert "copy them again" in caplog.text


def test_whoever_comes_first_makes_them_and_all_get_the_same(tmp_path: Path):
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: server_credentials(tmp_path), range(8)))
    assert len({credentials.run_id for credentials in made}) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["keys"]


@pytest.mark.parametrize("role", ROLES)
def test_a_client_needs_the_file_of_its_role_alone(tmp_path: Path, role: str, monkeypatch: pytest.MonkeyPatch):
    ensure_credentials(tmp_path)
    made = client_credentials(tmp_path, role)
    (tmp_path / "copied").mkdir(0o700)
    (tmp_path / "keys" / f"{role}.json").rename(tmp_path / "copied" / f"{role}.json")
    monkeypatch.setenv("SLIPSTREAM_KEYS", str(tmp_path / "copied"))
    assert client_credentials(tmp_path, role) == made


def test_secrets_do_not_show_in_a_log(tmp_path: Path):
    ensure_credentials(tmp_path)
    for made in everything(tmp_path):
        assert made.secret.decode() not in f"{made} {made!r}"


def test_without_encryption_there_is_a_run_id_and_no_key(tmp_path: Path):
    ensure_credentials(tmp_path, encrypted=False)
    run_id = server_credentials(tmp_path).run_id
    assert everything(tmp_path) == [Credentials.plain(run_id)] * 5
    with pytest.raises(ValueError, match="=none; set that, or remove the folder"):
        ensure_credentials(tmp_path, encrypted=True)


def test_only_local_addresses_may_be_plain():
    plain, encrypted = Credentials.plain("run"), RunKeys.new("run").buffer
    for address in ("tcp://127.0.0.1:5", "ipc:///tmp/x", "tcp://10.0.0.1:5", "tcp://0.0.0.0:5"):
        encrypted.check_address(address)
    plain.check_address("tcp://127.0.0.1:5")
    plain.check_address("ipc:///tmp/x")
    for address in ("tcp://10.0.0.1:5", "tcp://0.0.0.0:5", "tcp://*:5"):
        with pytest.raises(ValueError, match="not local to this machine"):
            plain.check_address(address)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660])
def test_keys_that_others_can_read_are_refused(tmp_path: Path, mode: int):
    ensure_credentials(tmp_path)
    (tmp_path / "keys" / "actor.json").chmod(mode)
    with pytest.raises(ValueError, match=f"actor.json has mode {mode:03o}, so others can read it; chmod 600"):
        client_credentials(tmp_path, "actor")


def test_missing_keys_name_the_way_out(tmp_path: Path):
    with pytest.raises(ValueError, match="name the folder of its keys in SLIPSTREAM_KEYS"):
        client_credentials(tmp_path, "actor")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "is not JSON"),
        ("[1]", "does not map names to strings"),
        ('{"run_id": 3}', "does not map names to strings"),
        ('{"run_id": "../x"}', "no usable keys .the run id '../x'"),
        ('{"run_id": "x", "other": "y"}', "no usable keys"),
        ('{"run_id": "x", "server_public": "short"}', "are incomplete"),
        (json.dumps({"run_id": "x", "server_public": "k" * 40}), "are incomplete"),
    ],
)
def test_broken_keys_give_one_sentence(tmp_path: Path, content: str, complaint: str):
    ensure_credentials(tmp_path)
    (tmp_path / "keys" / "actor.json").write_text(content)
    with pytest.raises(ValueError, match=complaint) as caught:
        client_credentials(tmp_path, "actor")
    assert "\n" not in str(caught.value)
