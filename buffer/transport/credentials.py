"""The credentials of a run: its id and its CURVE keys, made once per run, in files that only their owner can read.

`RUN_DIR/keys/client.json` is all that an actor or a learner rank needs to connect. The buffer and the weight server
also need `server.json`. A process on another host reads its copy of the folder, which the environment variable
`SLIPSTREAM_KEYS` names. Keys never appear in a command line, in a log or in config.yaml.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import stat
import uuid
from dataclasses import dataclass, field, replace
from pathlib import Path

import zmq

FOLDER = "keys"
FOLDER_VARIABLE = "SLIPSTREAM_KEYS"
LOCAL_ADDRESSES = ("tcp://127.", "tcp://[::1]:", "ipc://", "inproc://")
MAX_FILE_BYTES = 4096
_RUN_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True, slots=True)
class Credentials:
    """A run's id and keys (Z85, 40 characters each). With empty keys connections are unencrypted and local only.

    Raises:
        ValueError: when the run id or a key is malformed, or some keys are missing.
    """

    run_id: str
    server_public: bytes = b""
    client_public: bytes = b""
    client_secret: bytes = field(default=b"", repr=False)
    server_secret: bytes = field(default=b"", repr=False)
    """Empty in a client."""

    def __post_init__(self) -> None:
        if not _RUN_ID.fullmatch(self.run_id):
            raise ValueError(f"the run id {self.run_id[:80]!r} is not made of 1 to 64 letters, digits, - and _")
        needed = [self.server_public, self.client_public, self.client_secret]
        given = [key for key in (*needed, self.server_secret) if key]
        if any(len(key) != 40 for key in given) or (given and not all(needed)):
            raise ValueError(f"the keys of run {self.run_id} are incomplete; copy the folder {FOLDER} as a whole")

    @classmethod
    def plain(cls, run_id: str) -> Credentials:
        """Make credentials without keys: no encryption and no authentication."""
        return cls(run_id)

    @classmethod
    def new(cls, run_id: str) -> Credentials:
        """Make credentials with new keys for the server and for all clients."""
        server_public, server_secret = zmq.curve_keypair()
        client_public, client_secret = zmq.curve_keypair()
        return cls(run_id, server_public, client_public, client_secret, server_secret)

    @property
    def encrypted(self) -> bool:
        """Whether sockets with these credentials use CURVE."""
        return bool(self.server_public)

    def for_client(self) -> Credentials:
        """Return these credentials without the server's secret key."""
        return replace(self, server_secret=b"")

    def check_address(self, address: str) -> None:
        """Refuse unencrypted connections to other machines.

        Raises:
            ValueError: when `address` is not local and there are no keys.
        """
        if not self.encrypted and not address.startswith(LOCAL_ADDRESSES):
            raise ValueError(
                f"{address} is not local to this machine and cluster.encryption is none; set"
                " cluster.encryption=curve or use tcp://127.0.0.1:PORT or ipc://PATH"
            )


def ensure_credentials(run_dir: Path | str, *, encrypted: bool = True) -> Credentials:
    """Load the server's credentials of the run in `run_dir`, created if absent.

    Several processes may call this at once.

    Raises:
        ValueError: when the files cannot be written or read, other users can read them, or they have keys and
            `encrypted` is False, or the reverse.
    """
    folder = Path(run_dir) / FOLDER
    if not folder.is_dir():
        run_id = uuid.uuid4().hex
        try:
            _write_folder(folder, Credentials.new(run_id) if encrypted else Credentials.plain(run_id))
        except OSError as error:
            raise ValueError(f"{folder} cannot be written: {error.strerror}; choose another run_dir") from error
    found = _read(folder, with_server=True)
    if found.encrypted != encrypted:
        made = "curve" if found.encrypted else "none"
        raise ValueError(
            f"{folder} was made for cluster.encryption={made}; set that, or remove the folder for new keys"
        )
    return found


def server_credentials(run_dir: Path | str) -> Credentials:
    """Load the server's credentials of the run in `run_dir`, created with encryption if absent.

    Raises:
        ValueError: when the files cannot be written or read, or other users can read them.
    """
    folder = Path(run_dir) / FOLDER
    return _read(folder, with_server=True) if folder.is_dir() else ensure_credentials(run_dir)


def client_credentials(run_dir: Path | str) -> Credentials:
    """Load a client's credentials, from the folder that `SLIPSTREAM_KEYS` names, else from `run_dir`/keys.

    Raises:
        ValueError: when the files cannot be read, or other users can read them.
    """
    return _read(Path(os.environ.get(FOLDER_VARIABLE) or Path(run_dir) / FOLDER), with_server=False)


def _write_folder(folder: Path, credentials: Credentials) -> None:
    """Write the folder under a temporary name, then rename it, so that it is complete or absent.

    When another process has created the folder meanwhile, that one stays.
    """
    partial = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.partial")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial.mkdir(mode=0o700)
    try:
        client = {
            "run_id": credentials.run_id,
            "server_public": credentials.server_public.decode(),
            "client_public": credentials.client_public.decode(),
            "client_secret": credentials.client_secret.decode(),
        }
        _write_file(partial / "client.json", client)
        _write_file(partial / "server.json", {"server_secret": credentials.server_secret.decode()})
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_file(path: Path, content: dict[str, str]) -> None:
    # Created with mode 600, so that other users cannot open the file at any moment.
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())


def _read(folder: Path, *, with_server: bool) -> Credentials:
    content = _read_file(folder / "client.json")
    if with_server:
        content |= _read_file(folder / "server.json")
    run_id = content.pop("run_id", "")
    try:
        return Credentials(run_id, **{name: value.encode() for name, value in content.items()})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder} holds no usable keys ({error}); restore it, or remove it for new ones") from error


def _read_file(path: Path) -> dict[str, str]:
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise ValueError(f"{path} has mode {mode & 0o777:03o}, so others can read it; chmod 600 {path}")
            content = json.loads(file.read(MAX_FILE_BYTES))
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read: {error.strerror}; give the directory of a run that was started, or name the folder"
            f" of its keys in {FOLDER_VARIABLE}"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON; restore the folder, or remove it for new keys") from error
    if not isinstance(content, dict) or not all(isinstance(value, str) for value in content.values()):
        raise ValueError(f"{path} does not map names to strings; restore the folder, or remove it for new keys")
    return content
