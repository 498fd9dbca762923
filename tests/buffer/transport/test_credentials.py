"""Keys: how they are made, kept, read and refused."""

import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from buffer.transport.credentials import Credentials, client_credentials, ensure_credentials, server_credentials


def modes(folder: Path) -> dict[str, int]:
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.iterdir())}


def test_keys_are_readable_by_their_owner_only_whatever_the_umask(tmp_path: Path):
    before = os.umask(0)
    try:
        ensure_credentials(tmp_path)
    finally:
        os.umask(before)
    assert modes(tmp_path / "keys") == {"keys": 0o700, "client.json": 0o600, "server.json": 0o600}
    assert [path.name for path in tmp_path.iterdir()] == ["keys"]


def test_files_have_their_mode_from_the_first_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[int] = []

    def look(descriptor: int) -> None:
        seen.append(stat.S_IMODE(os.fstat(descriptor).st_mode))

    monkeypatch.setattr(os, "fsync", look)
    monkeypatch.setattr(os, "chmod", lambda *_: pytest.fail("a mode was changed afterwards"))
    ensure_credentials(tmp_path)
    assert seen == [0o600, 0o600]


def test_a_resumed_run_keeps_its_id_and_keys(tmp_path: Path):
    first = ensure_credentials(tmp_path)
    assert first == ensure_credentials(tmp_path) == server_credentials(tmp_path)
    assert client_credentials(tmp_path) == first.for_client()
    assert ensure_credentials(tmp_path / "other").run_id != first.run_id


def test_whoever_comes_first_makes_them_and_all_get_the_same(tmp_path: Path):
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: server_credentials(tmp_path), range(8)))
    assert len({credentials.run_id for credentials in made}) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["keys"]


def test_a_client_reads_nothing_of_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = ensure_credentials(tmp_path)
    (tmp_path / "keys" / "server.json").unlink()
    (tmp_path / "keys").rename(tmp_path / "copied")
    monkeypatch.setenv("SLIPSTREAM_KEYS", str(tmp_path / "copied"))
    found = client_credentials(tmp_path)
    assert found == made.for_client()
    assert found.server_secret == b""


def test_secrets_do_not_show_in_a_log(tmp_path: Path):
    made = ensure_credentials(tmp_path)
    for secret in (made.client_secret, made.server_secret):
        assert secret.decode() not in f"{made} {made!r}"


def test_without_encryption_there_is_a_run_id_and_no_key(tmp_path: Path):
    made = ensure_credentials(tmp_path, encrypted=False)
    assert made == Credentials.plain(made.run_id) == server_credentials(tmp_path)
    with pytest.raises(ValueError, match="=none; set that, or remove the folder"):
        ensure_credentials(tmp_path, encrypted=True)


def test_only_local_addresses_may_be_plain():
    plain, encrypted = Credentials.plain("run"), Credentials.new("run")
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
    (tmp_path / "keys" / "client.json").chmod(mode)
    with pytest.raises(ValueError, match=f"client.json has mode {mode:03o}, so others can read it; chmod 600"):
        client_credentials(tmp_path)


def test_missing_keys_name_the_way_out(tmp_path: Path):
    with pytest.raises(ValueError, match="name the folder of its keys in SLIPSTREAM_KEYS"):
        client_credentials(tmp_path)


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
    (tmp_path / "keys" / "client.json").write_text(content)
    with pytest.raises(ValueError, match=complaint) as caught:
        client_credentials(tmp_path)
    assert "\n" not in str(caught.value)
